"""Starting from a checkpoint: --restore-file, --reset-optimizer, --finetune-from-model."""

import numpy as np
import pytest
import torch

from tests.fairseq.checkpoints import logits_of, mask_beside, read, session_of, weights_of
from tests.fairseq.command_lines import DSP, PIPELINED, VOITA
from tests.fairseq.runner import Runner


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


def test_another_pruner_starts_new_gates(runner, translation, pruned, tmp_path):
    options = f"{VOITA} --pruning-lr 1e-6"
    runner.run("train", translation.train(tmp_path / "fresh", options, updates=1))
    start = f"--restore-file {pruned} --reset-optimizer --lr 1e-7"
    runner.run("train", translation.train(tmp_path / "run", options, start, updates=1))
    after = tmp_path / "run" / "checkpoint_last.pt"
    np.testing.assert_allclose(logits_of(after), logits_of(tmp_path / "fresh" / "checkpoint_last.pt"), atol=1e-5)
    name = "encoder.layers.0.fc1.weight"  # but the weights are those of the checkpoint
    torch.testing.assert_close(weights_of(after)[name], weights_of(pruned)[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [DSP, VOITA], ids=["same", "another"])
def test_finetuning_a_pruned_model_resets_the_optimizer(runner, translation, pruned, tmp_path, options):
    start = f"{options} --pruning-lr 1e-6 --finetune-from-model {pruned}"
    for updates in (2, 3):  # the second command resumes what the first one left
        runner.run("train", translation.train(tmp_path / "run", start, updates=updates))
        state = session_of(tmp_path / "run" / "checkpoint_last.pt")
        name = "dsp" if options == DSP else "voita"
        assert state[f"{name}.adam.steps"] == updates
    kept = np.abs(state[f"{name}.logits"] - logits_of(pruned)).max() < 1e-5
    assert kept == (options == DSP)


@pytest.mark.parametrize("start", ["--finetune-from-model {}", "--restore-file {} --reset-optimizer"])
def test_pipelined_leaves_the_model_as_it_was(runner, translation, dense, tmp_path, start):
    line = translation.train(tmp_path / "run", PIPELINED, start.format(dense), updates=12)
    runner.run("train", line)
    after = tmp_path / "run" / "checkpoint_last.pt"
    before, now = weights_of(dense), weights_of(after)
    assert before.keys() == now.keys() and all(torch.equal(before[name], now[name]) for name in before)
    assert mask_beside(after).kept == 4
    assert read(after)["optimizer_history"][-1]["num_updates"] == 12


def test_pipelined_voita(runner, translation, dense, tmp_path):
    options = f"{VOITA} --l0-pipelined --finetune-from-model {dense}"
    runner.run("train", translation.train(tmp_path / "run", options, updates=3))
    before, now = weights_of(dense), weights_of(tmp_path / "run" / "checkpoint_last.pt")
    assert all(torch.equal(before[name], now[name]) for name in before)


def test_joint_pruning_from_a_dense_model(runner, translation, dense, tmp_path):
    options = f"{DSP} --finetune-from-model {dense} --lr 1e-7 --pruning-lr 0.2"
    runner.run("train", translation.train(tmp_path / "run", options, updates=3))
    after = weights_of(tmp_path / "run" / "checkpoint_last.pt")
    name = "encoder.layers.0.fc1.weight"
    assert not torch.equal(after[name], weights_of(dense)[name])
    torch.testing.assert_close(after[name], weights_of(dense)[name], atol=1e-5, rtol=0)
