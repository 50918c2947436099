"""Gates that learn to the end of training, beside a teacher."""

import copy

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import (
    LongformerConfig,
    LongformerForSequenceClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

from head_pruning import HeadPruningError
from hf_plugin import HeadPruningTrainer, open_session, pruner
from hf_plugin.mapping.unit_map import unit_map
from tests.hf.few_models import batch_of, make
from tests.hf.tiny import arguments, tiny_bert

RUNS = {
    "plain": None,
    "checkpointed": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
    "compiled": None,
}
REFUSED = {"reentrant": "checkpointed reentrantly", "compiled": "donated buffers"}


def gate_gradients(name: str, run: str, **options) -> torch.Tensor:
    """Of an update with the straight-through estimator and, where ``options`` are given, a teacher."""
    model, teacher = make(name).train(), make(name)
    model.config.use_cache = False
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    if RUNS[run] is not None:
        older = model.gradient_checkpointing_enable
        enable = getattr(model, "activation_checkpointing_enable", older)
        enable(**{f"{'gradient' if enable == older else 'activation'}_checkpointing_kwargs": RUNS[run]})
    pruners = [pruner("ste", num_of_heads=2, joint_pruning=True)]
    if options:
        pruners.append(pruner("logits", distill_logits=1.0, teacher_path="given", **options))
    given = lambda path, needs: (copy.deepcopy(teacher).eval(), unit_map(teacher))  # noqa: E731
    session = open_session(model, pruners, load_teacher=given, total_steps=4)
    torch.manual_seed(3)  # dropout's draws
    session.before_update(0)
    inputs = batch_of(name)
    called = torch.compile(model) if run == "compiled" else model
    session.loss(called(**inputs).loss, inputs).backward()
    return session.gates.gradients.clone()


def wav2vec():
    """A model whose convolutions shorten what the mask is of."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 16}
    sizes |= {"conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (2, 2), "num_feat_extract_layers": 2}
    sizes |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 4, "classifier_proj_size": 8}
    model = Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**sizes, layerdrop=0.0, mask_time_prob=0.0))
    return model, {"input_values": torch.randn(2, 100), "attention_mask": torch.ones(2, 100, dtype=torch.long)}


def longformer():
    """A model that fills its windows up."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 16}
    config = LongformerConfig(
        **sizes, vocab_size=20, max_position_embeddings=32, attention_window=[4, 4], pad_token_id=1
    )
    ids = torch.arange(2, 12).expand(2, -1)
    return LongformerForSequenceClassification(config), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def prompted():
    """A model whose prompt comes before the tokens."""
    model = get_peft_model(tiny_bert(), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))
    ids = torch.arange(5, 11).expand(2, -1)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("make_one", [wav2vec, longformer, prompted])
def test_a_mask_of_another_length_is_left_out_and_told_of_once(make_one, tmp_path, caplog):
    torch.manual_seed(0)
    model, batch = make_one()
    examples = [{name: value[i % 2] for name, value in batch.items()} | {"labels": i % 2} for i in range(8)]
    trainer = HeadPruningTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=3, per_device_train_batch_size=2),
        train_dataset=examples,
        pruners=[
            pruner("ste", num_of_heads=4, joint_pruning=True),
            pruner("logits", distill_hidden=1.0, distill_attention=0.0 if make_one is longformer else 1.0),
        ],
    )
    trainer.train()
    assert trainer.session.metrics()["logits_hidden_loss"] >= 0
    assert caplog.text.count("the mask of the tokens is of the shape [2, ") == 1


@pytest.mark.parametrize("run", [*list(RUNS)[:3], pytest.param("compiled", marks=pytest.mark.slow)])
def test_they_learn_from_the_task_loss_alone_unless_told_to(run):
    alone = gate_gradients("llama", run)
    mixed = gate_gradients("llama", run, distill_while_choosing=True)
    assert (mixed - alone).abs().max() > 1e-2 * alone.abs().max()
    if run in REFUSED:
        with pytest.raises(HeadPruningError, match=f"{REFUSED[run]}.* Add --distill-while-choosing"):
            gate_gradients("llama", run, distill_while_choosing=False)
        return
    taught = gate_gradients("llama", run, distill_while_choosing=False)
    torch.testing.assert_close(taught, alone, rtol=0, atol=1e-4 * float(alone.abs().max()))
