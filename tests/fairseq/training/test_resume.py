"""A run that was stopped, or killed, and resumed ends bit-equal to one that was not."""

import json
import shutil

import numpy as np
import pytest

from tests.fairseq.command_lines import DSP, PIPELINED, SENSITIVITY, SUBSET, VOITA
from tests.fairseq.files import logits_of, read, same_training_state, session_of

STOP, END = 9, 26  # in the first and in the second epoch
STE = "--num-of-heads 4 --pruning-lr 0.2 --joint-pruning --use-ste"
LATE = 23  # in the second epoch too: its batches must be those of a run that came from the first


@pytest.mark.parametrize(
    "options, stop",
    [
        pytest.param(f"{DSP} --cooldown-steps 24", LATE, id="dsp"),
        pytest.param(VOITA, STOP, id="voita", marks=pytest.mark.slow),
        pytest.param(STE, LATE, id="ste", marks=pytest.mark.slow),
    ],
)
def test_stopped_run_goes_on(runner, translation, tmp_path, options, stop):
    runner.run("train", translation.train(tmp_path / "whole", options, updates=END))
    runner.run("train", translation.train(tmp_path / "parts", options, updates=stop))
    parts = tmp_path / "parts" / "checkpoint_last.pt"
    stopped = logits_of(parts)
    assert read(parts)["extra_state"]["train_iterator"]["epoch"] == (1 if stop == STOP else 2)
    runner.run("train", translation.train(tmp_path / "parts", options, updates=END))
    assert not np.array_equal(stopped, logits_of(parts))
    assert read(parts)["extra_state"]["train_iterator"]["epoch"] == 2
    same_training_state(tmp_path / "whole" / "checkpoint_last.pt", tmp_path / "parts" / "checkpoint_last.pt")


@pytest.mark.slow
@pytest.mark.parametrize("options", [SUBSET, SENSITIVITY], ids=["subset", "head_sensitivity"])
def test_run_that_was_stopped_while_heads_were_chosen_goes_on(runner, translation, tmp_path, options):
    """From a checkpoint on the way: a training that ends before its number of heads has fallen is refused."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = f"{options} --count-schedule 0:0.9 --save-interval-updates {STOP}"
    line = translation.train(whole, options, updates=END)
    runner.run("train", line)
    parts.mkdir()
    shutil.copy(whole / f"checkpoint_1_{STOP}.pt", parts / "checkpoint_last.pt")
    stopped = logits_of(parts / "checkpoint_last.pt")
    runner.run("train", [parts if word == whole else word for word in line])
    assert not np.array_equal(stopped, logits_of(parts / "checkpoint_last.pt"))
    same_training_state(whole / "checkpoint_last.pt", parts / "checkpoint_last.pt")


@pytest.mark.slow
def test_killed_run_goes_on(runner, translation, tmp_path):
    options = f"{DSP} --cooldown-steps 20"
    runner.run("train", translation.train(tmp_path / "whole", options, updates=END))

    line = translation.train(tmp_path / "killed", options, "--save-interval-updates 10", updates=END)
    report = tmp_path / "killed" / "pruning.json"
    started = runner.start("train", line)
    started.kill_once(lambda: report.exists() and json.loads(report.read_text())["history"][0]["updates"] == 10)
    assert session_of(tmp_path / "killed" / "checkpoint_last.pt")["step"] == 9

    runner.run("train", line)
    same_training_state(tmp_path / "whole" / "checkpoint_last.pt", tmp_path / "killed" / "checkpoint_last.pt")


@pytest.mark.slow
def test_finished_run_is_left_as_it_is(runner, translation, tmp_path):
    line = translation.train(tmp_path / "run", DSP, "--save-interval-updates 4", updates=8)
    runner.run("train", line)
    files = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    for name in ("masks.safetensors", "pruning.json"):  # as if it had been killed behind its last checkpoint
        (tmp_path / "run" / name).unlink()
    runner.run("train", line)
    report = json.loads((tmp_path / "run" / "pruning.json").read_text())
    assert report["history"][-1]["updates"] == 8 and report["heads_kept"] == 4
    rewritten = (tmp_path / "run" / "pruning.json").read_bytes()
    done = runner.run("train", line)
    assert "training was over after 8 updates" in done.out
    again = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert again == {**files, "pruning.json": rewritten}


@pytest.mark.slow
def test_run_killed_between_a_checkpoint_and_its_reports_loses_none(runner, translation, tmp_path):
    line = translation.train(tmp_path / "run", DSP, "--save-interval-updates 2", updates=8)
    runner.run("train", line)
    report = json.loads((tmp_path / "run" / "pruning.json").read_text())
    assert report["history"][0]["gate_norm"] > 0  # of the update before: the session that is loaded does not know it
    (tmp_path / "run" / "checkpoint_1_2.pt").replace(tmp_path / "run" / "checkpoint_last.pt")
    for name in ("masks.safetensors", "pruning.json"):
        (tmp_path / "run" / name).unlink()
    runner.run("train", line)
    assert [entry["updates"] for entry in report["history"]] == [2, 4, 6, 8]
    assert json.loads((tmp_path / "run" / "pruning.json").read_text()) == report


@pytest.mark.slow
def test_pipelined_run_goes_on(runner, translation, tmp_path):
    runner.run("train", translation.train(tmp_path / "dense", task="translation"))
    start = f"{PIPELINED} --finetune-from-model {tmp_path / 'dense' / 'checkpoint_last.pt'} --cooldown-steps 20"
    runner.run("train", translation.train(tmp_path / "whole", start, updates=END))
    runner.run("train", translation.train(tmp_path / "parts", start, updates=STOP))
    runner.run("train", translation.train(tmp_path / "parts", start, updates=END))
    same_training_state(tmp_path / "whole" / "checkpoint_last.pt", tmp_path / "parts" / "checkpoint_last.pt")


@pytest.mark.slow
def test_half_precision_run_goes_on(runner, translation, tmp_path):
    options = f"{DSP} --cooldown-steps 20 --fp16 --fp16-no-flatten-grads --fp16-init-scale 4 --min-loss-scale 1e-6"
    runner.run("train", translation.train(tmp_path / "whole", options, updates=END))
    runner.run("train", translation.train(tmp_path / "parts", options, updates=STOP))
    runner.run("train", translation.train(tmp_path / "parts", options, updates=END))
    whole, parts = (session_of(tmp_path / name / "checkpoint_last.pt") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)
    assert whole["step"] == END - 1
