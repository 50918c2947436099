"""Methods that were registered from outside the tree, on the scripts' command line."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from head_pruning import HeadMask, HeadPruningError
from head_pruning.weights import load_weight_masks
from hf_plugin.command_line.arguments import parse
from hf_plugin.glue.run import run
from tests.hf.script_runs import TINY, write_place
from tests.own_methods import registered

LINE = "--model_name_or_path bert-base-uncased --task_name MNLI --data_dir data/MNLI --do_train --do_eval".split()
HEADS = "--pruner dimmer --num_of_heads 7 --dimming 0.6 --joint_pruning".split()
WEIGHTS = "--weight_pruner steady --final_threshold 0.25 --warmup_steps 0.2 --steadiness 0.8 --save_steps 4".split()
ECHO = "--distill echo --echo_strength 2.0".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("own"))


@pytest.fixture(autouse=True)
def own_methods(place, monkeypatch):
    monkeypatch.chdir(place)
    with registered():
        yield


def test_one_of_each_kind_in_one_run_and_resumed_bit_equal(place):
    line = [*LINE, *TINY, *HEADS, *WEIGHTS, *ECHO]
    arguments = parse([*line, "--output_dir", "whole"], "run_glue")
    assert [pruner.name for pruner in arguments.pruners] == ["dimmer", "steady", "echo"]
    run(arguments)
    assert HeadMask.load(place / "whole" / "masks.safetensors").kept == 7
    masks = load_weight_masks(place / "whole" / "masks.safetensors")
    # Without the weights and biases of the 17 heads that are gone: four projections of width 2, three biases.
    left = sum(keep.numel() for keep in masks.values()) - 17 * (2 * 4 * 24 + 3 * 2)
    assert sum(int(keep.sum()) for keep in masks.values()) / left == pytest.approx(0.25, abs=1e-3)
    report = json.loads((place / "whole" / "pruning.json").read_text())
    assert report["method"] == "dimmer+steady+echo" and report["options"]["echo_strength"] == 2.0

    (place / "part").mkdir()
    shutil.copytree(place / "whole" / "checkpoint-8", place / "part" / "checkpoint-8")
    run(parse([*line, "--output_dir", "part"], "run_glue"))
    for name in ("model.safetensors", "masks.safetensors", "checkpoint-12/pruning_state.safetensors"):
        assert (place / "whole" / name).read_bytes() == (place / "part" / name).read_bytes(), name
    # The distiller took part: without it training ends elsewhere.
    run(parse([*LINE, *TINY, *HEADS, *WEIGHTS, "--output_dir", "alone"], "run_glue"))
    ours, theirs = (load_file(place / name / "model.safetensors") for name in ("whole", "alone"))
    assert not all(np.array_equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.slow
def test_a_distiller_alone(place):
    run(parse([*LINE, *TINY, *ECHO, "--save_steps", "8", "--output_dir", "echo"], "run_glue"))
    (place / "echo_part").mkdir()
    shutil.copytree(place / "echo" / "checkpoint-8", place / "echo_part" / "checkpoint-8")
    run(parse([*LINE, *TINY, *ECHO, "--save_steps", "8", "--output_dir", "echo_part"], "run_glue"))
    one, other = (place / name / "model.safetensors" for name in ("echo", "echo_part"))
    assert one.read_bytes() == other.read_bytes()
    with pytest.raises(HeadPruningError, match="is of a run with --echo_strength 2.0, this one is with --echo_stren"):
        words = [*LINE, *TINY, "--distill", "echo", "--echo_strength", "3", "--output_dir", "echo_part"]
        run(parse(words, "run_glue"))


@pytest.mark.parametrize("words, sentence", [
    ("--echo_strength 1",
     "--echo_strength belongs to echo, but no distiller is chosen; drop it or add --distill echo."),
    ("--distill ech", "There is no distiller ech; choose one of dfd, echo, logits, spd."),
    ("--distill dimmer", "dimmer is none of the methods that learn from a teacher; choose it with --pruner dimmer."),
    ("--pruner echo", "echo is none of the methods that prune heads or prune weights; choose it with --distill echo."),
    ("--pruner dsp --num_of_heads 3 --dimming 0.3",
     "--dimming belongs to dimmer, but the pruner is dsp; drop it or choose --pruner dimmer."),
])  # fmt: skip
def test_mistakes(words, sentence):
    with pytest.raises(HeadPruningError) as refused:
        parse([*LINE, "--output_dir", "no", *words.split()], "run_glue")
    assert str(refused.value) == sentence


def test_the_help_has_them_in_their_groups(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"], "run_glue")
    text = " ".join(capsys.readouterr().out.split())
    assert "--distill VALUE methods that learn from a teacher, by registered name; several with commas" in text
    assert "distiller echo (Holds the model near to what it said before training; it keeps no state):" in text
    assert "--unit_pruner" not in text  # nothing of this kind is registered
