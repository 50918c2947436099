"""The contract between session and host, in transformers' Trainer: ours, and one of one's own."""

import json

import numpy as np
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainerCallback

from head_pruning import HeadPruningError
from head_pruning.outputs import Recorder
from hf_plugin import HeadPruningCallback, HeadPruningTrainer, open_session, pruner, unit_map
from hf_plugin.training import checkpoints
from hf_plugin.training.wrapping import token_masks
from tests.contract import FACTORS, SECOND, UPDATE, UPDATES, Probe, expected, watching
from tests.few import few
from tests.hf.tiny import arguments, collate, sentences, tiny_bert

LR = 1e-3
DSP = {"num_of_heads": 3, "joint_pruning": True, "annealing": True, "initial_temperature": 1.0, "cooldown_steps": 4}


class StopAt(TrainerCallback):
    """Ends training after an update, as a time limit would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


def trainer_of(folder, own, *callbacks, seed=0, pruners=None, **training):
    """A Trainer with DSP and the probe: ours, or transformers' with the callback."""
    model, probe = tiny_bert(seed), Probe()
    pruners = [pruner("dsp", **DSP), probe] if pruners is None else pruners
    training = {"max_steps": UPDATES, "gradient_accumulation_steps": 2, "learning_rate": LR, **training}
    options = {"args": arguments(folder, **training), "train_dataset": sentences(64), "data_collator": collate}
    options["callbacks"] = list(callbacks)
    if own:
        session = open_session(model, pruners)
        trainer = Trainer(model=model, **options)
        HeadPruningCallback(session).add_to(trainer)
    else:
        trainer = HeadPruningTrainer(model=model, pruners=pruners, **options)
        session = trainer.session
    return trainer, session, pruners[-1]


OWN = pytest.mark.parametrize("own", [False, True], ids=["trainer", "callback"])
MOSTLY_CALLBACK = pytest.mark.parametrize(
    "own", [pytest.param(False, marks=pytest.mark.slow), True], ids=["trainer", "callback"]
)


@OWN
@pytest.mark.parametrize("accumulation", few([1, 2], 2))
def test_hooks_in_order_and_learning_rates(tmp_path, own, accumulation):
    trainer, session, probe = trainer_of(tmp_path, own, gradient_accumulation_steps=accumulation)
    with watching(probe):
        trainer.train()
    hooks = expected()
    if accumulation == 1:
        hooks = [hook for place, hook in enumerate(hooks) if (hook, hooks[place - 1]) != ("loss", "loss")]
    assert probe.seen == hooks
    # Each phase decays anew, over its own length; what the schedule says is logged, with the factor beside it.
    rates = np.array([LR * (1 - step % SECOND / SECOND) for step in range(UPDATES)])
    np.testing.assert_allclose(probe.rates, rates * FACTORS, rtol=1e-9)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    np.testing.assert_allclose([entry["learning_rate"] for entry in logs], rates, rtol=1e-9)
    assert [entry["lr_factor"] for entry in logs] == list(FACTORS)
    assert trainer.optimizer.param_groups[0]["lr"] == trainer.lr_scheduler.get_last_lr()[0]
    assert session.head_mask().kept == 3 and trainer.model.config._attn_implementation == "eager"
    session.detach()
    assert trainer.model.config._attn_implementation == "sdpa"


def test_an_overflow_ends_in_a_skipped_update(tmp_path):
    """Loss scaling with torch's own scaler, on the CPU: what is skipped, and that training goes on."""
    trainer, session, probe = trainer_of(tmp_path, True, optim="adamw_torch", max_grad_norm=0.0, warmup_steps=0)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-60)
    logits = session.pruners[0].logits.copy()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    left_alone = []

    class Looks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            same = all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
            left_alone.append(same and np.array_equal(session.pruners[0].logits, logits))

    trainer.add_callback(Looks())
    with watching(probe):
        trainer.train()
    skipped = probe.seen.count("skip_update")
    assert 0 < skipped < UPDATES and left_alone == [True] * skipped + [False] * (UPDATES - skipped)
    hooks = []
    for step in range(UPDATES):
        ended = ["skip_update"] if step < skipped else ["optimizer", "after_step"]
        hooks += [*(["enter_phase 1"] if step == SECOND else []), *UPDATE[:5], *ended]
    assert probe.seen == hooks
    assert session.metrics()["gate_skip"] == 0
    rates = {group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {trainer.lr_scheduler.get_last_lr()[0]}


@MOSTLY_CALLBACK
@pytest.mark.parametrize(
    "stop", [SECOND, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (SECOND - 1, SECOND + 1))]
)
def test_resumed_in_either_phase(tmp_path, own, stop):
    training = {"save_strategy": "steps", "save_steps": stop}
    whole, whole_session, _ = trainer_of(tmp_path / "whole", own, **training)
    whole.train()
    trainer_of(tmp_path / "parts", own, StopAt(stop), **training)[0].train()
    parts, session, probe = trainer_of(tmp_path / "parts", own, seed=1, **training)
    with watching(probe):
        parts.train(resume_from_checkpoint=True)
    assert probe.seen == expected(stop)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, parts.model.state_dict()[name]), name
    ours, theirs = session.state_dict(), whole_session.state_dict()
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert parts.optimizer.state_dict()["state"][0]["step"] == UPDATES - SECOND


@OWN
def test_a_checkpoint_is_read_and_checked_once(tmp_path, own, monkeypatch):
    training = {"save_strategy": "steps", "save_steps": 2}
    trainer_of(tmp_path, own, StopAt(2), **training)[0].train()
    read, checked = [], []
    reads, checks = json.loads, checkpoints._check_parts
    monkeypatch.setattr(json, "loads", lambda text, **more: read.append(str(text)) or reads(text, **more))
    monkeypatch.setattr(checkpoints, "_check_parts", lambda folder: checked.append(folder) or checks(folder))
    trainer = trainer_of(tmp_path, own, **training)[0]
    trainer.train(resume_from_checkpoint=True)
    states = [text for text in read if "stateful_callbacks" in text]
    assert checked == [tmp_path / "checkpoint-2"]
    assert len(states) == 3  # ours, and the Trainer's own two


def test_the_loss_is_replaced_in_training_only(tmp_path):
    class Zero(Probe):
        def loss(self, loss, inputs, outputs):
            assert "labels" in inputs and outputs.weight == 0.5
            return super().loss(loss, inputs, outputs) * 0

    for own in (False, True):
        trainer, _, _ = trainer_of(
            tmp_path, own, pruners=[Zero()], weight_decay=0.0, label_smoothing_factor=0.1, eval_strategy="no"
        )
        trainer.eval_dataset = sentences(8, seed=1)
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        trainer.train()
        assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
        assert trainer.evaluate()["eval_loss"] > 0.1


def test_a_term_weighs_the_same_however_batches_are_split(tmp_path):
    """Half the batch size and twice the micro-batches is the same objective, but for padding."""

    class Alone(Probe):
        needs = frozenset()

        def loss(self, loss, inputs, outputs):
            (logits,) = outputs.logits
            return outputs.weight * logits.square().mean()

    weights = []
    for size, accumulation in ((8, 1), (4, 2)):
        model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        args = arguments(
            tmp_path, max_steps=2, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation
        )
        HeadPruningTrainer(
            model=model, args=args, pruners=[Alone()], train_dataset=sentences(64), data_collator=collate
        ).train()
        weights.append(model.classifier.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(weights[0], tiny_bert().classifier.weight)


def test_a_sequence_to_sequence_model(tmp_path):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(vocab_size=40, decoder_start_token_id=0, **sizes))
    given = []

    class Looks(Probe):
        def loss(self, loss, inputs, outputs):
            given.append(outputs)
            return super().loss(loss, inputs, outputs)

    session = open_session(model, [Looks()])
    batch = collate(sentences(4))
    batch["labels"] = torch.randint(1, 40, (4, 3), generator=torch.Generator().manual_seed(0))
    batch["labels"][0, 2] = -100
    model.train()
    session.before_update(0)
    session.loss(model(**batch).loss, batch, masks=token_masks(session.unit_map, batch)).backward()
    (outputs,) = given
    lengths = [state.shape[1] for state in outputs.hidden_states]
    source = batch["input_ids"].shape[1]
    assert lengths == [source] * 3 + [3] * 2  # what goes into each stack, and what comes out of each layer
    assert [mask.shape[1] for mask in outputs.masks] == lengths and not outputs.masks[-1][0, 2]
    model.eval()
    with torch.no_grad():
        own = model(**batch, output_hidden_states=True, output_attentions=True)
    assert [a.shape for a in outputs.attentions] == [
        a.shape for a in (*own.encoder_attentions, *own.cross_attentions, *own.decoder_attentions)
    ]
    for each in outputs.attentions:
        assert each.min() >= 0  # probabilities, not the bias of relative positions


def test_hidden_state_0_goes_into_the_first_layer_and_attention_0_is_its_own():
    model = tiny_bert(attn_implementation="eager")
    recorder = Recorder(model, unit_map(model), {"hidden_states", "attentions"})
    recorder.attach()
    batch = collate(sentences(3))
    own = model(**batch, output_hidden_states=True, output_attentions=True)
    found = recorder.take()
    for name in ("hidden_states", "attentions"):
        mine, theirs = getattr(found, name), getattr(own, name)
        assert len(mine) == len(theirs) and all(map(torch.equal, mine, theirs)), name


def test_what_is_refused(tmp_path):
    model = tiny_bert()
    session = open_session(model, [Probe()])
    options = {"model": model, "train_dataset": sentences(8), "data_collator": collate}
    listed = Trainer(args=arguments(tmp_path), callbacks=[HeadPruningCallback(session)], **options)
    with pytest.raises(HeadPruningError, match=r"Add the callback with its add_to\(trainer\)"):
        listed.train()
    ready = (torch.optim.SGD(model.parameters(), lr=0.1), None)
    with pytest.raises(HeadPruningError, match="probe trains in phases.*given ready ones"):
        HeadPruningCallback(session).add_to(Trainer(args=arguments(tmp_path), optimizers=ready, **options))
    sharding = Trainer(args=arguments(tmp_path), **options)
    sharding.is_fsdp_enabled = True  # the real one needs several processes
    with pytest.raises(HeadPruningError, match="not done under FSDP"):
        HeadPruningCallback(session).add_to(sharding)
