"""Starting from a checkpoint: --restore-file, --reset-optimizer, --finetune-from-model."""

import json
import shutil

import numpy as np
import pytest
import torch

from fairseq_plugin.checkpoints.stored import KEEP, META, PruningState
from head_pruning import AttentionSite, HeadPruningError, UnitMap
from head_pruning.session import STATE_VERSION
from tests.fairseq.command_lines import DSP, PIPELINED, VOITA
from tests.fairseq.files import logits_of, mask_beside, read, session_of, weights_of
from tests.fairseq.runner import Runner
from tests.few import few

RESTORED = pytest.param("--restore-file {} --reset-optimizer", marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def pruned(translation, tmp_path_factory):
    """The last checkpoint of a DSP run of 8 updates."""
    folder = tmp_path_factory.mktemp("pruned")
    Runner(folder).run("train", translation.train(folder / "run", DSP))
    return folder / "run" / "checkpoint_last.pt"


@pytest.fixture(scope="module")
def dense(translation, tmp_path_factory):
    """The last checkpoint of an ordinary run."""
    folder = tmp_path_factory.mktemp("dense")
    Runner(folder).run("train", translation.train(folder / "run", task="translation"))
    return folder / "run" / "checkpoint_last.pt"


def test_reset_optimizer_keeps_the_logits(runner, translation, pruned, tmp_path):
    options = f"{DSP} --restore-file {pruned} --reset-optimizer --pruning-lr 1e-6"
    runner.run("train", translation.train(tmp_path / "run", options, updates=2))
    state = session_of(tmp_path / "run" / "checkpoint_last.pt")
    assert state["dsp.adam.steps"] == 2
    assert 0 < np.abs(state["dsp.logits"] - logits_of(pruned)).max() < 1e-5
    assert session_of(pruned)["dsp.adam.steps"] == 6


def test_another_pruner_needs_reset_optimizer(runner, translation, pruned, tmp_path):
    options = f"{VOITA} --restore-file {pruned}"
    sentence = runner.fail("train", translation.train(tmp_path / "run", options, updates=12))
    assert "dsp" in sentence and "voita" in sentence and "--reset-optimizer" in sentence
    assert not list((tmp_path / "run").glob("*"))


@pytest.mark.slow
def test_another_pruner_starts_new_gates(runner, translation, pruned, tmp_path):
    options = f"{VOITA} --pruning-lr 1e-6"
    runner.run("train", translation.train(tmp_path / "fresh", options, updates=1))
    start = f"--restore-file {pruned} --reset-optimizer --lr 1e-7"
    runner.run("train", translation.train(tmp_path / "run", options, start, updates=1))
    after = tmp_path / "run" / "checkpoint_last.pt"
    np.testing.assert_allclose(logits_of(after), logits_of(tmp_path / "fresh" / "checkpoint_last.pt"), atol=1e-5)
    name = "encoder.layers.0.fc1.weight"  # but the weights are those of the checkpoint
    torch.testing.assert_close(weights_of(after)[name], weights_of(pruned)[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [DSP, pytest.param(VOITA, marks=pytest.mark.slow)], ids=["same", "another"])
def test_finetuning_a_pruned_model_resets_the_optimizer(runner, translation, pruned, tmp_path, options):
    start = f"{options} --pruning-lr 1e-6 --finetune-from-model {pruned}"
    for updates in (2, 3):  # the second command resumes what the first one left
        runner.run("train", translation.train(tmp_path / "run", start, updates=updates))
        state = session_of(tmp_path / "run" / "checkpoint_last.pt")
        name = "dsp" if options == DSP else "voita"
        assert state[f"{name}.adam.steps"] == updates
    kept = np.abs(state[f"{name}.logits"] - logits_of(pruned)).max() < 1e-5
    assert kept == (options == DSP)


@pytest.mark.parametrize("start", ["--finetune-from-model {}", RESTORED])
def test_pipelined_leaves_the_model_as_it_was(runner, translation, dense, tmp_path, start):
    line = translation.train(tmp_path / "run", PIPELINED, start.format(dense), updates=12)
    runner.run("train", line)
    after = tmp_path / "run" / "checkpoint_last.pt"
    before, now = weights_of(dense), weights_of(after)
    assert before.keys() == now.keys() and all(torch.equal(before[name], now[name]) for name in before)
    assert mask_beside(after).kept == 4
    assert read(after)["optimizer_history"][-1]["num_updates"] == 12


def test_what_begins_after_its_last_epoch_is_refused(runner, translation, tmp_path):
    """fairseq counts the epochs of a restored file on, without its optimizer too; a run that ended stays quiet."""
    dense = tmp_path / "dense" / "checkpoint_last.pt"
    runner.run("train", translation.train(dense.parent, "--max-epoch 1", task="translation", updates=0))
    line = translation.train(tmp_path / "run", PIPELINED, f"--restore-file {dense} --reset-optimizer", "--max-epoch 1")
    sentence = runner.fail("train", line)
    assert "--max-epoch is 1, and the run goes on from epoch 2" in sentence
    assert f"--finetune-from-model {dense}" in sentence and not list((tmp_path / "run").glob("*"))
    line = translation.train(tmp_path / "run", PIPELINED, f"--finetune-from-model {dense} --max-epoch 1", updates=0)
    for _ in range(2):
        runner.run("train", line)
    assert mask_beside(tmp_path / "run" / "checkpoint_last.pt").kept == 4


@pytest.mark.slow
def test_pipelined_voita(runner, translation, dense, tmp_path):
    options = f"{VOITA} --l0-pipelined --finetune-from-model {dense}"
    runner.run("train", translation.train(tmp_path / "run", options, updates=3))
    before, now = weights_of(dense), weights_of(tmp_path / "run" / "checkpoint_last.pt")
    assert all(torch.equal(before[name], now[name]) for name in before)


@pytest.mark.slow
def test_joint_pruning_from_a_dense_model(runner, translation, dense, tmp_path):
    options = f"{DSP} --finetune-from-model {dense} --lr 1e-7 --pruning-lr 0.2"
    runner.run("train", translation.train(tmp_path / "run", options, updates=3))
    after = weights_of(tmp_path / "run" / "checkpoint_last.pt")
    name = "encoder.layers.0.fc1.weight"
    assert not torch.equal(after[name], weights_of(dense)[name])
    torch.testing.assert_close(after[name], weights_of(dense)[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (f"{DSP} --num-of-heads 7", "was pruned with --num-of-heads 4, this run has --num-of-heads 7"),
        pytest.param(f"{DSP} --pruning-lr 0.9", "this run has --pruning-lr 0.9", marks=pytest.mark.slow),
    ],
)
def test_a_run_of_other_options_does_not_go_on(runner, translation, pruned, tmp_path, options, sentence):
    shutil.copytree(pruned.parent, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert sentence in runner.fail("train", translation.train(tmp_path / "run", options, updates=12))
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(DSP, id="heads"),
        pytest.param(
            "--weight-pruner platon --final-threshold 0.3 --pruner-warmup-steps 2",
            id="weights",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_schedule_does_not_start_in_the_middle(runner, translation, dense, tmp_path, options):
    line = translation.train(tmp_path / "run", f"{options} --restore-file {dense}", updates=12)
    assert "whose schedule would start in the middle of training; add --reset-optimizer" in runner.fail("train", line)
    assert not list((tmp_path / "run").glob("*"))


class TestHeadsFromTheStart:
    """Random and given heads are those of the run's own options."""

    @pytest.fixture(scope="class")
    def twelve(self, translation, tmp_path_factory):
        folder = tmp_path_factory.mktemp("random")
        Runner(folder).run("train", translation.train(folder, "--pruner random --num-of-heads 12", updates=2))
        return folder / "checkpoint_last.pt"

    @pytest.mark.slow
    @pytest.mark.parametrize("start", ["--finetune-from-model {}", RESTORED])
    def test_a_new_run_has_its_own(self, runner, translation, twelve, tmp_path, start):
        few = f"--pruner random --num-of-heads 4 {start.format(twelve)}"
        runner.run("train", translation.train(tmp_path / "few", few, updates=2))
        assert mask_beside(tmp_path / "few" / "checkpoint_last.pt").kept == 4
        start = start.format(tmp_path / "few" / "checkpoint_last.pt")
        given = f"--head-mask-file {twelve.parent / 'masks.safetensors'} {start}"
        runner.run("train", translation.train(tmp_path / "given", given, updates=2))
        assert mask_beside(tmp_path / "given" / "checkpoint_last.pt") == mask_beside(twelve)

    @pytest.mark.slow
    def test_a_resumed_run_does_not_change_them(self, runner, translation, twelve, tmp_path):
        shutil.copytree(twelve.parent, tmp_path / "run")
        for options, sentence in (
            ("--pruner random --num-of-heads 4", "was pruned with --num-of-heads 12, this run has --num-of-heads 4"),
            ("--pruner random --num-of-heads 12 --seed 9", None),
        ):
            line = translation.train(tmp_path / "run", options, updates=3)
            if sentence:
                assert sentence in runner.fail("train", line)
            else:
                runner.run("train", line)
        assert mask_beside(tmp_path / "run" / "checkpoint_last.pt") == mask_beside(twelve)


def test_an_average_of_different_masks_is_refused(translation, tmp_path):
    unit_map = UnitMap((AttentionSite("a", "encoder_self", "a", 4, 2, "a.out"),))
    meta = {"version": 1, "pruners": ["ste"], "unit_map": unit_map.to_dict()}
    state = {META: torch.tensor(list(json.dumps({**meta, "version": STATE_VERSION}).encode()), dtype=torch.int32)}
    for values, kept in (([1.0, 1.0, 0.5, 0.5], None), ([1.0, 0.9, 0.1, 0.0], 2), ([0.5, 0.5, 0.5, 0.5], None)):
        state[KEEP] = torch.tensor(values, dtype=torch.float64)
        if kept is None:
            with pytest.raises(HeadPruningError, match="an average of checkpoints that keep different heads"):
                PruningState(state).head_mask()
        else:
            assert PruningState(state).head_mask().kept == kept


@pytest.mark.parametrize("command", few(["train", "generate"], "train"))
def test_a_checkpoint_that_was_cut_off(runner, translation, pruned, tmp_path, command):
    short = tmp_path / "short.pt"
    short.write_bytes(pruned.read_bytes()[:4000])
    line = translation.train(tmp_path / "run", f"{DSP} --restore-file {short}")
    if command == "generate":
        line = translation.generate(short)
    assert f"The checkpoint {short} is damaged (it ends too early)" in runner.fail(command, line)


@pytest.mark.slow
def test_pruned_weights_are_not_trained_on_unawares(runner, translation, tmp_path):
    options = "--weight-pruner magnitude --final-threshold 0.3 --pruner-warmup-steps 1"
    runner.run("train", translation.train(tmp_path / "run", options, updates=6))
    sentence = runner.fail("train", translation.train(tmp_path / "run", updates=8))
    assert "trained with magnitude, this run uses no such method" in sentence
