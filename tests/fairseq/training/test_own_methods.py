"""Methods that a user-dir registers, on fairseq's command line."""

import json
from pathlib import Path

import pytest

from head_pruning.weights import load_weight_masks
from tests.fairseq.files import mask_beside, read, same, same_training_state, weights_of
from tests.fairseq.runner import ROOT, Runner

OWN = f"--user-dir {Path(__file__).parents[1] / 'own_methods'}"
HEADS = "--pruner dimmer --num-of-heads 7 --dimming 0.6 --joint-pruning"
WEIGHTS = "--weight-pruner steady --final-threshold 0.25 --pruner-warmup-steps 2 --steadiness 0.8"
ECHO = "--distill echo --echo-strength 2.0"
UPDATES = 12


@pytest.fixture(scope="module")
def whole(translation, tmp_path_factory) -> Path:
    """The folder of a run with one method of each kind that also saved its update 8."""
    folder = tmp_path_factory.mktemp("own")
    line = translation.train(folder / "run", OWN, HEADS, WEIGHTS, ECHO, "--save-interval-updates 8", updates=UPDATES)
    Runner(folder).run("train", line, PYTHONPATH=str(ROOT))
    return folder / "run"


def test_one_of_each_kind_in_one_run(whole):
    masks, tensors = load_weight_masks(whole / "masks.safetensors"), weights_of(whole / "checkpoint_last.pt")
    assert mask_beside(whole / "checkpoint_last.pt").kept == 7
    told = json.loads((whole / "pruning.json").read_text())["weights"]
    assert sum(int(keep.sum()) for keep in masks.values()) == told["weights_kept"]
    assert sum(keep.numel() for keep in masks.values()) == told["weights_of_dense"] > told["weights_total"]
    assert told["weights_kept"] / told["weights_total"] == pytest.approx(0.25, abs=1e-3)
    assert all(not tensors[name][~keep].any() for name, keep in masks.items())


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_equal(whole, translation, runner, tmp_path):
    start = f"--restore-file {whole / 'checkpoint_1_8.pt'}"
    line = translation.train(tmp_path / "run", OWN, HEADS, WEIGHTS, ECHO, start, updates=UPDATES)
    runner.run("train", line)
    ours, theirs = tmp_path / "run" / "checkpoint_last.pt", whole / "checkpoint_last.pt"
    same_training_state(ours, theirs)
    same(read(ours)["extra_state"]["head_pruning"], read(theirs)["extra_state"]["head_pruning"])


@pytest.mark.slow
def test_the_distiller_takes_part_and_can_run_alone(whole, translation, runner, tmp_path):
    ends = {}
    for name, options in (("both", (HEADS, WEIGHTS)), ("echo", (ECHO,)), ("dense", ())):
        runner.run("train", translation.train(tmp_path / name, OWN, *options, updates=UPDATES))
        ends[name] = weights_of(tmp_path / name / "checkpoint_last.pt")
    name = "encoder.layers.0.fc1.weight"
    assert not (ends["both"][name] == weights_of(whole / "checkpoint_last.pt")[name]).all()
    assert not (ends["echo"][name] == ends["dense"][name]).all()


@pytest.mark.parametrize(
    "options, sentence",
    [
        (
            "--echo-strength 0.5",
            "--echo-strength belongs to echo, but no distiller is chosen; drop it or add --distill ",
        ),
        pytest.param(
            "--pruner steady",
            "steady is none of the methods that prune heads; choose it with --weight-pruner steady.",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            f"{HEADS} --steadiness 0.5",
            "--steadiness belongs to steady, but no pruner of weights is chosen; drop it or ",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_mistakes(translation, runner, tmp_path, options, sentence):
    assert runner.fail("train", translation.train(tmp_path / "run", OWN, options)).startswith(f"error: {sentence}")
