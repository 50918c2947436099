"""head_sensitivity where fairseq-train begins from nothing, and where it goes on from a model."""

import json
import shutil

import pytest

from tests.fairseq.files import mask_beside, same_training_state
from tests.fairseq.runner import logged

KEEP = "--num-of-heads 4 --joint-pruning"
SPREAD = "--count-schedule 0:0.1 --site-discount 2 --min-heads-per-kind 1"
GOES_ON = "--count-schedule 0:0.2 --site-discount 1 --min-heads-per-kind 0"
SAVES = "--save-interval-updates 1 --keep-interval-updates 20"
SAYS = "training begins from nothing"


def test_what_training_begins_with_decides_on_the_defaults(translation, runner, tmp_path):
    def train(name, *options, updates=10):
        return runner.run("train", translation.train(tmp_path / name, KEEP, *options, updates=updates))

    def end(name):
        return tmp_path / name / "checkpoint_last.pt"

    def stays_open(done):
        return logged(done.out, "heads_expected")

    new, spelt = train("new"), train("spelt", SPREAD)
    assert SAYS in new.out + new.err
    assert stays_open(new) == stays_open(spelt)
    assert mask_beside(end("new")).keep.tolist() == mask_beside(end("spelt")).keep.tolist()
    on = f"--finetune-from-model {end('spelt')}"
    new, spelt = train("on", on), train("on-spelt", on, GOES_ON)
    assert SAYS not in new.out + new.err
    same_training_state(end("on"), end("on-spelt"))


def test_a_run_in_stages_begins_from_nothing_too(translation, runner, tmp_path):
    """Its first stage is planned before the first epoch."""
    line = translation.train(tmp_path / "run", "--joint-pruning --save-at 8,4 --num-of-heads 4", updates=20)
    done = runner.run("train", line)
    assert SAYS in done.out + done.err
    options = json.loads((tmp_path / "run" / "pruning.json").read_text())["options"]
    told = {name: options[name] for name in ("count_schedule", "site_discount", "min_heads_per_kind")}
    assert told == {"count_schedule": "0:0.1", "site_discount": 2.0, "min_heads_per_kind": 1}


@pytest.mark.slow
def test_a_run_from_nothing_that_was_stopped_goes_on_as_one(translation, runner, tmp_path):
    line = translation.train(
        tmp_path / "run", KEEP, "--save-interval-updates 1 --keep-interval-updates 20", updates=20
    )
    runner.run("train", line)
    (tmp_path / "again").mkdir()
    shutil.copy(tmp_path / "run" / "checkpoint_1_1.pt", tmp_path / "again" / "checkpoint_last.pt")
    runner.run("train", [tmp_path / "again" if word == tmp_path / "run" else word for word in line])
    ours, theirs = (tmp_path / name / "checkpoint_last.pt" for name in ("again", "run"))
    same_training_state(ours, theirs)
