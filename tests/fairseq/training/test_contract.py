"""The contract between session and host, in fairseq-train."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from fairseq import utils

from tests.contract import FACTORS, SECOND, UPDATES, expected
from tests.fairseq.command_lines import DSP
from tests.fairseq.files import same_training_state
from tests.fairseq.in_process import in_process
from tests.fairseq.runner import logged
from tests.few import few

PROBING = str(Path(__file__).resolve().parents[1] / "probing")
LR = 0.01


@pytest.fixture
def run(runner, translation, tmp_path):
    """Train with DSP and the probe; returns what it was asked, the learning rates, and the output."""

    def train(name, *options, updates=UPDATES):
        task = f"--user-dir {PROBING} --task translation_probing --update-freq 2"
        line = translation.train(tmp_path / name, DSP, task, *options, updates=updates)
        folder = tmp_path / f"seen-{name}"
        folder.mkdir(exist_ok=True)
        done = runner.run("train", line, PROBING_FOLDER=str(folder))
        found = json.loads((folder / "seen.json").read_text())
        return found["seen"], found["rates"], done.out

    return train


def rates(schedule) -> np.ndarray:
    """The learning rates that the optimizer steps with: each phase has its own schedule."""
    return LR * np.array([schedule(step % SECOND) for step in range(UPDATES)]) * FACTORS


def test_hooks_in_order_and_learning_rates(run):
    seen, found, out = run("run")
    assert seen == expected()
    np.testing.assert_allclose(found, rates(lambda step: step / 4), rtol=1e-9)  # four updates of warm-up
    np.testing.assert_allclose(logged(out, "lr_factor")[:UPDATES], FACTORS, rtol=1e-3)


@pytest.mark.parametrize("start", few(["", "--reset-optimizer"], ""))
def test_a_schedule_that_ends_ends_with_its_phase(run, start):
    options = f"--lr-scheduler polynomial_decay --total-num-update {UPDATES} --warmup-updates 0"
    _, found, _ = run("run", f"{options} {start}")
    np.testing.assert_allclose(found, rates(lambda step: 1 - step / SECOND), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "stop", [SECOND, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (SECOND - 1, SECOND + 1))]
)
def test_resumed_in_either_phase(run, tmp_path, stop):
    _, whole, _ = run("whole")
    run("parts", updates=stop)
    seen, parts, _ = run("parts")
    assert seen == expected(stop)
    np.testing.assert_array_equal(parts, whole[stop:])
    same_training_state(tmp_path / "whole" / "checkpoint_last.pt", tmp_path / "parts" / "checkpoint_last.pt")


@pytest.mark.parametrize(
    "options",
    ["", pytest.param("--fp16 --fp16-no-flatten-grads --fp16-init-scale 4", marks=pytest.mark.slow)],
    ids=["float32", "fp16"],
)
def test_the_optimizer_of_the_second_phase(translation, tmp_path, options):
    """It is a new one, whose averages begin anew; its float32 copies and loss scale are those of the first."""
    utils.import_user_module(Namespace(user_dir=PROBING))
    task = f"--user-dir {PROBING} --task translation_probing {options}"
    trainer, epochs = in_process(translation.train(tmp_path / "run", DSP, task))
    samples = iter(epochs.next_epoch_itr(shuffle=False))
    with trainer.task.probe.session.evaluating():
        pass
    for _ in range(SECOND):
        trainer.train_step([next(samples)])
    first, scaler = trainer.optimizer, getattr(trainer.optimizer, "scaler", None)
    master = (lambda parameter: parameter) if not options else trainer.task.session.master_of
    parameter = next(trainer.get_model().parameters())
    copy = master(parameter).detach().clone()
    seen = []
    trainer.task.probe.before_update = lambda step: seen.append(trainer.optimizer)
    before_step = trainer.task.session.before_step

    def look(optimizer, **more):
        master = trainer.task.session.master_of if options else (lambda parameter: parameter)
        assert master(parameter).detach().equal(copy)
        return before_step(optimizer, **more)

    trainer.task.session.before_step = look
    trainer.train_step([next(samples)])
    assert seen == [trainer.optimizer] and trainer.optimizer is not first
    assert getattr(trainer.optimizer, "scaler", None) is scaler
    steps = {state["step"] for state in trainer.optimizer.optimizer.state.values()}
    assert steps == {1}
    trainer.task.watch.__exit__(*sys.exc_info())


def test_a_phase_that_goes_on_with_the_optimizer(translation, tmp_path):
    """Its averages stay; the learning-rate schedule begins anew all the same."""
    utils.import_user_module(Namespace(user_dir=PROBING))
    task = f"--user-dir {PROBING} --task translation_probing"
    trainer, epochs = in_process(translation.train(tmp_path / "run", DSP, task))
    probe, samples = trainer.task.probe, iter(epochs.next_epoch_itr(shuffle=False))
    probe.keeps_optimizer = True
    for _ in range(UPDATES - 1):
        trainer.train_step([next(samples)])
    steps = {state["step"] for state in trainer.optimizer.optimizer.state.values()}
    assert steps == {UPDATES - 1} and "enter_phase 1" in probe.seen
    np.testing.assert_allclose(probe.rates, rates(lambda step: step / 4)[:-1], rtol=1e-9)
    trainer.task.watch.__exit__(*sys.exc_info())


def test_an_overflow_ends_in_a_skipped_update(translation, tmp_path):
    utils.import_user_module(Namespace(user_dir=PROBING))
    half = "--dropout 0 --fp16 --fp16-no-flatten-grads --fp16-init-scale 2097152 --fp16-scale-tolerance 0"
    task = f"--user-dir {PROBING} --task translation_probing {half}"
    trainer, epochs = in_process(translation.train(tmp_path / "run", DSP, task))
    samples = list(epochs.next_epoch_itr(shuffle=False))[:1]
    probe, attempts = trainer.task.probe, 0
    while trainer.get_num_updates() == 0:
        attempts += 1
        try:
            trainer.train_step(samples)
        except AssertionError as error:  # without CUDA fairseq fails right after it has skipped the update
            assert "CUDA" in str(error)
    failed = ["before_update", "loss", "skip_update"] * (attempts - 1)
    stepped = ["before_update", "loss", "after_backward", "before_step", "optimizer", "after_step"]
    assert attempts > 1 and probe.seen == [*failed, *stepped]
    trainer.task.watch.__exit__(*sys.exc_info())
