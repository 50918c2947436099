"""Data-parallel training: two processes on one machine, without a GPU."""

import socket

import numpy as np
import pytest

from tests.fairseq.checkpoints import logits_of, read, same_training_state, weights_of
from tests.fairseq.command_lines import DSP, VOITA
from tests.fairseq.runner import WATCHED

UPDATES = 6


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_two(runner, line, watch) -> None:
    """Run a training command line on two ranks."""
    watch.mkdir(exist_ok=True)
    port = free_port()
    two = f"--distributed-init-method tcp://127.0.0.1:{port} --distributed-no-spawn --distributed-world-size 2 \
        --ddp-backend legacy_ddp --distributed-backend gloo"
    ranks = [
        runner.start("train", [*line, *two.split(), "--distributed-rank", rank], WATCHED_FOLDER=str(watch))
        for rank in (0, 1)
    ]
    for rank in ranks:
        assert rank.wait().code == 0, rank.out[-2000:] + rank.err[-3000:]


def record(watch, rank, update) -> dict:
    with np.load(watch / f"{rank}-{update}.npz") as data:
        return dict(data)


@pytest.mark.parametrize("options", [DSP, VOITA], ids=["dsp", "voita"])
def test_ranks_agree_with_each_other_and_with_one_process(runner, translation, tmp_path, options):
    watched = f"{options} --user-dir {WATCHED} --task translation_watched --dropout 0"
    run_two(runner, translation.train(tmp_path / "two", watched, updates=UPDATES), tmp_path / "watch")
    for update in range(UPDATES):
        mine, other = (record(tmp_path / "watch", rank, update) for rank in (0, 1))
        for name in ("gates", "logits", "after", "first_moment"):
            assert np.array_equal(mine[name], other[name]), (update, name)
        assert not np.array_equal(mine["gradients"], other["gradients"])  # different sentences
        assert not np.array_equal(mine["logits"], mine["after"])

    one = translation.train(tmp_path / "one", options, "--dropout 0 --update-freq 2", updates=UPDATES)
    runner.run("train", one)
    first, second = tmp_path / "two" / "checkpoint_last.pt", tmp_path / "one" / "checkpoint_last.pt"
    np.testing.assert_allclose(logits_of(first), logits_of(second), atol=2e-3)
    weights = weights_of(second)
    for name, value in weights_of(first).items():
        np.testing.assert_allclose(value, weights[name], atol=2e-3, err_msg=name)


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
