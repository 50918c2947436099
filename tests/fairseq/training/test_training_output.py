"""What a run shows and leaves: the log, the mask, the report, and checkpoint_best only from the target on."""

import json
import math
import re

import numpy as np
import pytest

from head_pruning import HeadMask
from tests.fairseq.command_lines import DSP, VOITA
from tests.fairseq.files import logits_of, read, session_of
from tests.fairseq.runner import Runner, logged


def validated(line: list) -> list:
    return [word for word in line if word != "--disable-validation"]


def test_best_checkpoint_only_once_the_target_is_reached(runner, translation, tmp_path):
    often = "--validate-interval-updates 4 --save-interval-updates 4 --keep-interval-updates 1 --cooldown-steps 14"
    for updates in (12, 16):
        line = translation.train(tmp_path / "run", DSP, often, updates=updates)
        done = runner.run("train", validated(line))
        best = tmp_path / "run" / "checkpoint_best.pt"
        assert best.exists() == (updates == 16)
    assert "not a candidate for checkpoint_best" not in done.out  # from 14 on
    assert session_of(best)["step"] == 15
    assert read(best)["extra_state"]["best"] == read(best)["extra_state"]["val_loss"]


@pytest.mark.slow
def test_score_before_the_target_is_no_bar_for_later_ones(runner, translation, tmp_path):
    # Updates after the first validation make the model worse on purpose: best must still be a hard one.
    often = "--validate-interval-updates 4 --save-interval-updates 4 --cooldown-steps 6 --lr 0.5 --warmup-updates 1"
    runner.run("train", validated(translation.train(tmp_path / "run", DSP, often, updates=8)))
    assert session_of(tmp_path / "run" / "checkpoint_best.pt")["step"] == 7


@pytest.mark.slow
def test_patience_counts_only_from_the_target_on(runner, translation, tmp_path):
    # A learning rate of zero: no validation is better than the first, so patience alone decides when to stop.
    still = "--validate-interval-updates 1 --patience 2 --lr 1e-30 --dropout 0 --no-save"
    line = translation.train(tmp_path / "run", "--pruner random --num-of-heads 4", still, updates=20)
    assert max(logged(runner.run("train", validated(line)).out, "num_updates")) == 3
    line = translation.train(tmp_path / "run", DSP, still, "--cooldown-steps 10 --pruning-lr 1e-30", updates=20)
    assert max(logged(runner.run("train", validated(line)).out, "num_updates")) == 12


def test_validation_scores_the_hard_mask(runner, translation, tmp_path):
    line = translation.train(tmp_path / "run", DSP, "--cooldown-steps 1000 --initial-temperature 10", updates=6)
    done = runner.run("train", validated(line))
    again = runner.run(
        "validate",
        [
            translation.data, "--user-dir", line[line.index("--user-dir") + 1], "--valid-subset", "valid", "--cpu",
            "--path", tmp_path / "run" / "checkpoint_last.pt", "--max-tokens", "90", "--log-format", "json",
            "--task", "translation", "--num-workers", "0", "--required-batch-size-multiple", "1",
        ],
    )  # fmt: skip
    # The checkpoint's own decoding is with the K heads; the training log must say the same although gates are soft.
    losses = logged(done.out, "valid_loss"), re.findall(r'"valid_loss": "([\d.]+)"', again.out)
    assert losses[0][-1] == float(losses[1][-1])


@pytest.fixture(scope="module")
def run(translation, tmp_path_factory):
    """The folder of a run of two epochs, and its output."""
    folder = tmp_path_factory.mktemp("run")
    line = translation.train(folder / "run", DSP, "--final-temperature 1e-4", updates=25)
    return folder / "run", Runner(folder).run("train", validated(line))


def test_log_and_artifacts(run):
    folder, done = run
    report = json.loads((folder / "pruning.json").read_text(encoding="utf-8"))
    updates = [entry["updates"] for entry in report["history"]]
    assert updates == sorted(set(updates)) and updates[-1] == 25 and len(updates) > 1
    temperature = logged(done.out, "temperature")
    assert math.isclose(temperature[0], 0.1) and math.isclose(temperature[10], 1e-4)
    assert math.isclose(temperature[3], 0.1 * (1e-4 / 0.1) ** (3 / 6), rel_tol=1e-2)
    assert set(logged(done.out, "heads_kept")) == {4}
    assert all(math.isclose(value, 4, abs_tol=0.01) for value in logged(done.out, "heads_expected"))
    assert max(logged(done.out, "gate_norm")) > 0 and set(logged(done.out, "penalty")) == {0}

    mask = HeadMask.load(folder / "masks.safetensors")
    logits = logits_of(folder / "checkpoint_last.pt")
    assert sorted(np.flatnonzero(mask.keep)) == sorted(np.argsort(-logits)[:4])
    report = json.loads((folder / "pruning.json").read_text())
    assert report["method"] == "dsp" and report["options"]["num_of_heads"] == 4
    assert report["heads_kept"] == 4 and report["heads_total"] == 24
    assert report["kept_heads_by_site"] == mask.kept_heads()
    assert report["sparsity"]["heads_removed"] == 1 - 4 / 24
    assert report["versions"]["fairseq"]
    removed = report["sparsity"]["parameters"] - report["sparsity"]["nonzero_parameters"]
    assert removed == 20 * (4 * 16 * 4 + 3 * 4)  # 20 heads of width 4: four projections of 16, three biases


def test_table_of_kept_heads(run):
    folder, done = run
    rows = re.findall(r"^([a-z]+coder\.layers\.\d\.\w+) +([#.]{4}) +(\d)/4$", done.out, re.MULTILINE)
    assert len(rows) == 12  # six sites, at the end of the first epoch and at the end of training
    assert sum(int(count) for _, _, count in rows[6:]) == 4
    mask = HeadMask.load(folder / "masks.safetensors")
    assert {name: [c == "#" for c in heads] for name, heads, _ in rows[6:]} == mask.by_site()


@pytest.mark.slow
def test_penalty_falls_in_the_log(runner, translation, tmp_path):
    own = f"{VOITA} --criterion label_smoothed_cross_entropy_head_pruning --log-interval 1"
    done = runner.run("train", translation.train(tmp_path / "run", own, updates=20))
    penalty = logged(done.out, "penalty")
    assert penalty[-1] < penalty[0] < 5 * 24
    loss, objective = logged(done.out, "loss"), logged(done.out, "objective")
    assert len(objective) >= 20 and all(a < b for a, b in zip(loss, objective))


@pytest.mark.slow
def test_the_heads_of_another_run_from_the_start(runner, translation, tmp_path):
    first = translation.train(tmp_path / "first", "--pruner random --num-of-heads 5", updates=2)
    runner.run("train", first)
    found = tmp_path / "first" / "masks.safetensors"
    done = runner.run("train", translation.train(tmp_path / "second", "--head-mask-file", str(found), updates=2))
    assert HeadMask.load(tmp_path / "second" / "masks.safetensors") == HeadMask.load(found)
    assert logged(done.out, "heads_kept") == [5.0, 5.0]
    assert json.loads((tmp_path / "second" / "pruning.json").read_text())["method"] == "given"
