"""What checkpoints of fairseq keep, in the process of the test: commands that are forked show no change of a line."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fairseq_plugin import open_session, remove_heads
from fairseq_plugin.checkpoints.keeper import StateKeeper, keep_heads, keeper_of
from fairseq_plugin.checkpoints.reports import reported
from fairseq_plugin.checkpoints.stored import NUMBERS, stored_task, take_numbers
from fairseq_plugin.modules.unit_map import unit_map
from head_pruning import HeadMask, HeadPruningError, build_pruner, methods
from head_pruning.report.artifacts import write_artifacts
from tests.fairseq.modules.test_surgery import SMALL, translator


@pytest.fixture(scope="module")
def mask_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("mask") / "masks.safetensors"
    sites = unit_map(translator(**SMALL))
    HeadMask(sites, np.arange(sites.num_heads) % 2 == 0).save(path)
    return path


def given(mask_file):
    return build_pruner(methods("heads")["given"], SimpleNamespace(head_mask_file=str(mask_file)))


def test_numbers_of_a_session_are_read_or_refused():
    assert take_numbers({}) is None
    state = {NUMBERS: {"gate_norm": 0.5, "heads_kept": 4}, "best": 1.0}
    assert take_numbers(state) == {"gate_norm": 0.5, "heads_kept": 4} and state == {"best": 1.0}
    for broken in ([0.5], {"gate_norm": "0.5"}, {1: 0.5}):
        with pytest.raises(HeadPruningError, match="state is damaged .its numbers: .*; use the checkpoint before it"):
            take_numbers({NUMBERS: broken})


def test_the_task_of_a_checkpoint_is_told_by_new_and_old_ones():
    assert stored_task({"cfg": {"task": {"_name": "translation"}}}) == "translation"
    assert stored_task({"cfg": None, "args": SimpleNamespace(task="denoising")}) == "denoising"
    assert stored_task({"cfg": 5}) is None and stored_task({}) is None


def test_a_report_is_of_an_update(mask_file, tmp_path):
    mask, session = HeadMask.load(mask_file), SimpleNamespace(weight_masks=dict)
    write_artifacts(tmp_path, mask, method="given", options={}, history=[{"updates": 1000}], versions={})
    assert reported(tmp_path, session, 1000) and not reported(tmp_path, session, 999)
    assert not reported(tmp_path, SimpleNamespace(weight_masks=lambda: {"w": torch.ones(1)}), 1000)


def test_heads_alone_leave_nothing_beside_the_model(mask_file):
    model = translator(**SMALL)
    assert StateKeeper(model).of_weights(resumable=True) == {}
    session = open_session(model, [given(mask_file)])
    assert StateKeeper(model, session=session).of_weights(resumable=True) == {}
    session.detach()


def test_a_loaded_model_runs_under_a_mask_once(mask_file):
    model, pruner = translator(**SMALL), given(mask_file)
    keep_heads(model, [pruner])
    assert keeper_of(model).gates is not None
    with pytest.raises(HeadPruningError, match="has a head mask of its own"):
        keep_heads(model, [pruner])


def test_heads_are_cut_out_of_models_without_a_session(mask_file):
    mask = HeadMask.load(mask_file)
    held = translator(**SMALL)
    StateKeeper(held)
    assert remove_heads(held, mask) == remove_heads(translator(**SMALL), mask)
    open_one = translator(**SMALL)
    StateKeeper(open_one, session=open_session(open_one, [given(mask_file)]))
    with pytest.raises(HeadPruningError, match="A pruning session is on the model"):
        remove_heads(open_one, mask)
