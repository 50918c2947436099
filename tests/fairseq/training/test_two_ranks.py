"""Data-parallel training: two processes on one machine, without a GPU."""

import json
import socket
from pathlib import Path

import numpy as np
import pytest

from tests.fairseq.command_lines import DSP, SENSITIVITY, SUBSET, VOITA
from tests.fairseq.files import logits_of, read, same_training_state, weights_of
from tests.fairseq.runner import WATCHED

WEIGHTS = Path(__file__).parents[1] / "watched_weights"
PLATON = "--weight-pruner platon --initial-threshold 1 --final-threshold 0.3 --pruner-warmup-steps 2 \
    --initial-warmup 1 --final-warmup 1 --deltaT 2"
UPDATES = 6


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_two(runner, line, watch) -> list:
    """Start a training command line on two ranks."""
    watch.mkdir(exist_ok=True)
    port = free_port()
    two = f"--distributed-init-method tcp://127.0.0.1:{port} --distributed-no-spawn --distributed-world-size 2 \
        --ddp-backend legacy_ddp --distributed-backend gloo"
    return [
        runner.start("train", [*line, *two.split(), "--distributed-rank", rank], WATCHED_FOLDER=str(watch))
        for rank in (0, 1)
    ]


def run_two(runner, line, watch) -> None:
    """Run a training command line on two ranks."""
    for rank in start_two(runner, line, watch):
        assert rank.wait() == 0, rank.out[-2000:] + rank.err[-3000:]


def record(watch, rank, update) -> dict:
    with np.load(watch / f"{rank}-{update}.npz") as data:
        return dict(data)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(DSP, id="dsp"),
        pytest.param(VOITA, id="voita", marks=pytest.mark.slow),
        pytest.param(f"{SUBSET} --count-schedule 0:{UPDATES}", id="subset", marks=pytest.mark.slow),
        pytest.param(f"{SENSITIVITY} --count-schedule 0:{UPDATES}", id="head_sensitivity", marks=pytest.mark.slow),
    ],
)
def test_ranks_agree_with_each_other_and_with_one_process(runner, translation, tmp_path, options):
    watched = f"{options} --user-dir {WATCHED} --task translation_watched --dropout 0"
    run_two(runner, translation.train(tmp_path / "two", watched, updates=UPDATES), tmp_path / "watch")
    for update in range(UPDATES):
        mine, other = (record(tmp_path / "watch", rank, update) for rank in (0, 1))
        for name in ("gates", "logits", "after", "first_moment"):
            assert np.array_equal(mine[name], other[name]), (update, name)
        assert not np.array_equal(mine["gradients"], other["gradients"])  # different sentences
        if mine["gates"].sum() < mine["gates"].size:  # of all heads there is one subset only
            assert not np.array_equal(mine["logits"], mine["after"])

    one = translation.train(tmp_path / "one", options, "--dropout 0 --update-freq 2", updates=UPDATES)
    runner.run("train", one)
    first, second = tmp_path / "two" / "checkpoint_last.pt", tmp_path / "one" / "checkpoint_last.pt"
    np.testing.assert_allclose(logits_of(first), logits_of(second), atol=2e-3)
    weights = weights_of(second)
    for name, value in weights_of(first).items():
        np.testing.assert_allclose(value, weights[name], atol=2e-3, err_msg=name)


@pytest.mark.slow
def test_resume(runner, translation, tmp_path):
    watched = f"{DSP} --user-dir {WATCHED} --task translation_watched"

    def line(name, updates):
        return translation.train(tmp_path / name, watched, updates=updates)

    run_two(runner, line("whole", UPDATES), tmp_path / "watch")
    run_two(runner, line("parts", 3), tmp_path / "watch-parts")
    run_two(runner, line("parts", UPDATES), tmp_path / "watch-parts")
    whole, parts = (tmp_path / name / "checkpoint_last.pt" for name in ("whole", "parts"))
    assert read(parts)["optimizer_history"][-1]["num_updates"] == UPDATES
    same_training_state(whole, parts)
    last = [record(tmp_path / "watch-parts", rank, UPDATES - 1)["after"] for rank in (0, 1)]
    assert np.array_equal(*last) and np.array_equal(last[0], logits_of(whole))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [DSP, f"{DSP} {PLATON}", VOITA, f"{SUBSET} --count-schedule 0:0.9", f"{SENSITIVITY} --count-schedule 0:0.9"],
    ids=["dsp", "dsp+platon", "voita", "subset", "head_sensitivity"],
)
def test_masks_in_memory_are_those_of_one_process(runner, translation, tmp_path, options):
    options, updates = f"{options} --user-dir {WEIGHTS} --task translation_watched_weights --dropout 0", 10
    run_two(runner, translation.train(tmp_path / "two", options, updates=updates), tmp_path / "watch")
    one = translation.train(tmp_path / "one", options, "--update-freq 2", updates=updates)
    (tmp_path / "alone").mkdir()
    runner.run("train", one, WATCHED_FOLDER=str(tmp_path / "alone"))
    for update in range(updates):
        mine, other = (record(tmp_path / "watch", rank, update) for rank in (0, 1))
        alone = record(tmp_path / "alone", 0, update)
        masks = [name for name in mine if name.startswith("stays.")]
        assert "stays.heads" in masks and mine.keys() == other.keys() == alone.keys()
        assert all(np.array_equal(mine[name], other[name]) for name in masks), update
        differ = sum(int((mine[name] != alone[name]).sum()) for name in masks)
        assert differ <= 0.02 * sum(mine[name].size for name in masks), update  # sums in another order
    assert np.array_equal(mine["stays.heads"], alone["stays.heads"]) and 0 < mine["stays.heads"].sum() < 24
    assert (len(masks) > 1) == ("platon" in options)
    assert np.array_equal(mine["stays.heads"], read_keep(tmp_path / "two" / "checkpoint_last.pt"))


def read_keep(checkpoint) -> np.ndarray:
    return read(checkpoint)["model"]["head_pruning.keep"].numpy() > 0.5


@pytest.mark.slow
def test_both_ranks_are_killed_and_go_on(runner, translation, tmp_path):
    options = f"{DSP} {PLATON} --user-dir {WEIGHTS} --task translation_watched_weights --save-interval-updates 4"

    def line(name):
        return translation.train(tmp_path / name, options, updates=12)

    run_two(runner, line("whole"), tmp_path / "watch")
    report = tmp_path / "killed" / "pruning.json"
    ranks = start_two(runner, line("killed"), tmp_path / "killed-watch")
    ranks[1].kill_once(lambda: report.exists() and json.loads(report.read_text())["history"][-1]["updates"] >= 4)
    ranks[0].kill_once(lambda: True)
    last = tmp_path / "killed" / "checkpoint_last.pt"
    assert 4 <= read(last)["optimizer_history"][-1]["num_updates"] < 12
    run_two(runner, line("killed"), tmp_path / "killed-watch")
    same_training_state(tmp_path / "whole" / "checkpoint_last.pt", last)
    for rank in (0, 1):
        mine, theirs = (record(tmp_path / folder, rank, 11) for folder in ("killed-watch", "watch"))
        assert mine.keys() == theirs.keys() and all(np.array_equal(mine[name], theirs[name]) for name in mine)
