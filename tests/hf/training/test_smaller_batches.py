"""--auto_find_batch_size: when memory is full, training begins once more with smaller batches, and so do methods."""

import numpy as np
import pytest
import torch
from transformers import Trainer

from head_pruning import Pruner
from hf_plugin import HeadPruningCallback, HeadPruningTrainer, open_session, pruner
from tests.few import few
from tests.hf.tiny import arguments, collate, sentences, tiny_bert

FITS = 7  # sentences; of 8 the Trainer goes on to these
ROWS = 42  # 6 updates an epoch of 8, or of 7 with all of them
CUBIC = {"final_threshold": 0.3, "warmup_steps": 0.1, "deltaT": 2}
SCHEDULE = {"policy_end_step": 0.5, "end_pruning_step": 0.75, "pruning_frequency": 2}
METHODS = {
    "gpp": [("gpp", {"prune_epochs": 1.0, "prepruning_finetune_epochs": 0.5})],
    "subset": [("subset", {"num_of_heads": 3, "joint_pruning": True, "count_schedule": "0.1:0.5"})],
    "sizes": [("head_sensitivity", {"num_of_heads": 2, "joint_pruning": True, "save_at": "4,2"})],
    "dsp": [("dsp", {"num_of_heads": 3, "joint_pruning": True, "annealing": True, "cooldown_steps": 0.5})],
    "voita": [("voita", {"l0_penalty": 0.01, "joint_pruning": True})],
    "platon": [("platon", CUBIC)],
    "gradual": [("gradual_magnitude", {"target_sparsity": 0.7, "mask_policy": "retained", **SCHEDULE})],
    "spd": [("spd_magnitude", {"sparsity": 0.7}), ("spd", {"replacing_rate": 0.95})],
    "learnt": [("magnitude", CUBIC), ("logits", {})],
}


class Memory:
    """Of a Trainer: for ``FITS`` sentences, for more of them until update ``full_at``."""

    full_at = 0

    def training_step(self, model, inputs, *args, **options):
        if len(inputs["labels"]) > FITS and self.state.global_step >= self.full_at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is.")
        return super().training_step(model, inputs, *args, **options)


class Small(Memory, HeadPruningTrainer):
    """Prunes."""


class Plain(Memory, Trainer):
    """Knows nothing of pruning."""


def built(method: str) -> list[Pruner]:
    return [pruner(name, **options) for name, options in METHODS[method]]


def options_of(folder, batch: int, **training) -> dict:
    training = {"per_device_train_batch_size": batch, "num_train_epochs": 4, "max_steps": -1, **training}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return {
        "model": tiny_bert(**still),
        "args": arguments(folder, auto_find_batch_size=batch > FITS, **training),
        "train_dataset": sentences(ROWS + 2),
        "data_collator": collate,
    }


def trained(trainer: Trainer, full_at: int = 0) -> Trainer:
    trainer.full_at = full_at
    trainer.train()
    assert trainer._train_batch_size == FITS and trainer.state.global_step == 28
    return trainer


@pytest.mark.parametrize("method", few(METHODS, "gpp", "subset"))
def test_memory_that_runs_out_at_once_changes_nothing(tmp_path, caplog, method):
    first, then = (
        trained(Small(pruners=built(method), **options_of(tmp_path / str(batch), batch))) for batch in (FITS, 8)
    )
    _same(then, first)
    assert "begins anew" not in caplog.text


@pytest.mark.parametrize("method", few(METHODS, "gradual"))
def test_methods_begin_anew_where_the_model_was_trained_already(tmp_path, caplog, method):
    trainer = trained(Small(pruners=built(method), **options_of(tmp_path, 8)), full_at=15)
    assert "keeps the weights that 15 updates left" in caplog.text
    fresh = trained(Small(pruners=built(method), **options_of(tmp_path / "fresh", FITS)))
    for ours, theirs in zip(_log(trainer), _log(fresh), strict=True):  # what follows the schedule alone
        names = {n for n in theirs if n.endswith(("sparsity", "temperature", "prune_target", "rate", "lr_factor"))}
        assert {n: ours[n] for n in names} == {n: theirs[n] for n in names}
    assert trainer.session.at_target() == fresh.session.at_target()
    masks, others = trainer.session.weight_masks(), fresh.session.weight_masks()
    assert sum(int(m.sum()) for m in masks.values()) == pytest.approx(
        sum(int(m.sum()) for m in others.values()), abs=2
    )
    if trainer.head_mask is not None and method != "voita":
        assert trainer.head_mask.kept == fresh.head_mask.kept


def test_a_callback_without_its_trainer(tmp_path):
    """As transformers takes callbacks: gates alone."""

    def run(batch: int) -> Plain:
        given = options_of(tmp_path / str(batch), batch)
        session = open_session(given["model"], built("subset"))
        trainer = Plain(callbacks=[HeadPruningCallback(session)], **given)
        trainer.session = session
        return trained(trainer)

    _same(run(8), run(FITS))


def _log(trainer) -> list[dict]:
    return [each for each in trainer.state.log_history if "loss" in each]


def _same(trainer, other) -> None:
    states = trainer.session.state_dict(), other.session.state_dict()
    assert states[0].keys() == states[1].keys()
    for name in states[0]:
        np.testing.assert_array_equal(states[0][name], states[1][name], err_msg=name)
    weights = trainer.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
