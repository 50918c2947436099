"""head_importance per example is what the examples give one by one, whatever the loss of a batch leaves out."""

import logging

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from head_pruning import HeadPruningError
from hf_plugin import head_importance, head_mask, least_important, mask_heads, open_session, pruner
from tests.hf.few_models import batch_of, make
from tests.hf.heads.test_importance import close

RAW = {"normalize_by_layer": False, "normalize_globally": False, "progress": False}
LENGTHS = (12, 5, 9, 3)
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
SIZES |= {"vocab_size": 40, "initializer_range": 0.3}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 40, "n_positions": 16, "initializer_range": 0.3}


def gpt2(**options) -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(**GPT2, bos_token_id=1, eos_token_id=2, **options))


def mixtral(**options) -> nn.Module:
    few = {"num_local_experts": 2, "num_experts_per_tok": 1, "num_key_value_heads": 2, **options}
    return MixtralForCausalLM(MixtralConfig(**SIZES, **few))


CAUSAL = {
    "gpt2": gpt2,
    "llama": lambda: make("llama"),
    "balanced experts": lambda: mixtral(output_router_logits=True, router_aux_loss_coef=0.0),
    "experts": lambda: mixtral(output_router_logits=True, router_aux_loss_coef=0.5),
}
TOKENS = {
    "bart": lambda: make("bart"),
    "t5": lambda: make("t5"),
    "tokens": lambda: BertForTokenClassification(BertConfig(**SIZES, num_labels=3)),
}


def built(make_it) -> nn.Module:
    torch.manual_seed(3)
    return make_it().eval()


def ragged(name: str = "", labels: int = 40, lengths=LENGTHS) -> dict:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(5, 40, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    targets = ids if labels == 40 else torch.randint(0, labels, ids.shape, generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": targets.masked_fill(mask == 0, -100)}


def rows(batch: dict) -> list[dict]:
    return [{name: value[i : i + 1] for name, value in batch.items()} for i in range(len(batch["input_ids"]))]


@pytest.mark.parametrize("name", [*CAUSAL, *TOKENS])
def test_ragged_rows_together_are_what_they_are_alone(name):
    model = built({**CAUSAL, **TOKENS}[name])
    batch = ragged(labels=3 if name == "tokens" else 40)
    together = head_importance(model, [batch], per_example=True, **RAW)
    close(together, head_importance(model, rows(batch), per_example=True, **RAW))
    close(together, head_importance(model, rows(batch), **RAW))  # the absolute value of a batch of one


def test_ragged_rows_go_through_the_model_together_where_the_loss_is_known():
    model, passes = built(gpt2), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(len(kwargs["labels"])), with_kwargs=True
    )
    head_importance(model, [ragged()], per_example=True, **RAW)
    assert passes == [4]


def test_a_loss_of_ones_own_over_ragged_rows():
    model, batch = built(gpt2), ragged()

    def mean(model, batch):
        return model(**batch).loss

    expected = head_importance(model, [batch], per_example=True, **RAW)
    close(head_importance(model, [batch], per_example=True, loss=mean, **RAW), expected)


def test_answers_that_were_cut_off():
    model = built(lambda: BertForQuestionAnswering(BertConfig(**SIZES)))
    batch = {name: value for name, value in ragged().items() if name != "labels"}
    batch |= {"start_positions": torch.tensor([1, 2, 40, 1]), "end_positions": torch.tensor([3, 40, 4, 2])}
    with pytest.raises(HeadPruningError, match="The loss of batch 1 of 1 is NaN"):
        head_importance(model, [batch], per_example=True, **RAW)  # two of the examples have no loss alone
    batch["start_positions"][2] = batch["end_positions"][1] = 4
    together = head_importance(model, [batch], per_example=True, **RAW)
    close(together, head_importance(model, rows(batch), per_example=True, **RAW))


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("where", ["all", "one"])
def test_examples_without_labels_have_no_importance(per_example, where):
    model, batches = built(gpt2), [ragged(), ragged()]
    batches[1]["labels"] = batches[1]["labels"].clone()
    batches[1]["labels"][slice(None) if where == "all" else 1] = -100
    if where == "one" and not per_example:  # a mean over the labels of a batch leaves it out
        assert np.isfinite(head_importance(model, batches, **RAW)).all()
        return
    with pytest.raises(HeadPruningError, match="The loss of batch 2 of 2 is NaN .* labels are all -100"):
        head_importance(model, batches, per_example=per_example, **RAW)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_scores_that_are_not_finite_choose_no_head():
    model = make("bert")
    for value in (float("nan"), float("inf")):
        with pytest.raises(HeadPruningError, match="Scores are NaN or infinite"):
            least_important(model, np.array([*np.zeros(7), value]), 2)
    for count in (1.5, True):
        with pytest.raises(HeadPruningError, match="choose from 0 to 8"):
            least_important(model, np.zeros(8), count)


def test_gates_that_the_importance_is_measured_under_are_named(caplog):
    caplog.set_level(logging.WARNING)
    model, batch = make("bert"), batch_of("bert")
    mask_heads(model, {0: [1]})
    head_importance(model, [batch], **RAW)
    assert not caplog.records
    session = open_session(model := make("bert"), [pruner("dsp", num_of_heads=3)])
    under = head_importance(model, [batch], **RAW)
    assert "measured under its present mask of 3 of 8 heads; detach() the session" in caplog.text
    assert np.count_nonzero(under) == 3
    session.detach()
    caplog.clear()
    whole = head_importance(model, [batch], **RAW)
    assert np.count_nonzero(whole) == 8 and not caplog.records
    with head_mask(model, [1.0, 1.0, 0.0, 1.0]):
        head_importance(model, [batch], **RAW)
    assert "mask of 6 of 8 heads" in caplog.text
