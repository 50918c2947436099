"""Damaged and hostile checkpoints end every command that reads them with one sentence, and nothing in them is run."""

import pickle
import re
from argparse import Namespace

import pytest
import torch
from fairseq import checkpoint_utils, utils

from fairseq_plugin.checkpoints.stored import KEEP, KEY, META
from fairseq_plugin.exporting.checkpoints import export_masked
from head_pruning import HeadPruningError
from head_pruning.cli import main
from tests.fairseq.command_lines import DSP
from tests.fairseq.files import read, weights_of
from tests.fairseq.in_process import in_process
from tests.fairseq.runner import PLUGIN, Runner

PLATON = "--weight-pruner platon --initial-threshold 1 --final-threshold 0.3 --warmup-steps 3 --initial-warmup 1 \
    --final-warmup 1 --deltaT 2 --beta2 0.95"
OPTIONS = f"{DSP} --cooldown-steps 3 {PLATON}"
NAME = "encoder.layers.0.fc1.weight"


@pytest.fixture(scope="module")
def folder(translation, tmp_path_factory):
    """The folder of a run that prunes heads and weights, with a checkpoint of update 7, between two masks."""
    folder = tmp_path_factory.mktemp("both") / "run"
    line = translation.train(folder, OPTIONS, "--save-interval-updates 7", updates=10)
    Runner(folder.parent).run("train", line)
    utils.import_user_module(Namespace(user_dir=PLUGIN))
    return folder


@pytest.fixture(scope="module")
def trainer(translation, folder, tmp_path_factory):
    """Of a run that would go on from a checkpoint; what is refused leaves it as it is."""
    return in_process(translation.train(tmp_path_factory.mktemp("resumed") / "run", OPTIONS, updates=12))[0]


def generate(path, trainer, tmp_path):
    """What fairseq-generate, -interactive, -validate and eval-lm do first."""
    return checkpoint_utils.load_model_ensemble_and_task([str(path)])[0][0]


def resume(path, trainer, tmp_path):
    trainer.load_checkpoint(str(path))


def inspect(path, trainer, tmp_path):
    try:
        main(["inspect", str(path), "--length", "3", "--json"])
    except SystemExit as error:
        raise HeadPruningError(str(error)) from error


def export(path, trainer, tmp_path):
    export_masked(path, tmp_path / "exported.pt")
    return tmp_path / "exported.pt"


COMMANDS = (generate, resume, inspect, export)


def refused(command, path, trainer, tmp_path) -> str:
    """The sentence with which a command ends; fairseq wraps errors of loading."""
    from fairseq_plugin.patches import sentence_of

    with pytest.raises(Exception) as caught:
        command(path, trainer, tmp_path)
    sentence = sentence_of(caught.value)
    assert sentence is not None, repr(caught.value)
    assert "\n" not in sentence and "weights_only" not in sentence and "torch.load" not in sentence
    assert not (tmp_path / "exported.pt").exists()
    return sentence


def bytes_missing(data: bytes) -> bytes:
    return data[: len(data) // 2] + data[len(data) // 2 + 1000 :]


def bit_of_a_tensor(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "damage",
    [
        bytes_missing,
        bit_of_a_tensor,
        lambda data: data[:1],
        lambda data: b"",
        lambda data: b"Q" + data[1:],
        lambda data: data[:4000],
        lambda data: b"no checkpoint at all",
    ],
    ids=["bytes missing", "one bit", "one byte", "empty", "first byte", "cut off", "text"],
)
def test_a_damaged_file_is_refused_in_one_sentence(folder, trainer, tmp_path, command, damage):
    path = tmp_path / "damaged.pt"
    path.write_bytes(damage((folder / "checkpoint_last.pt").read_bytes()))
    sentence = refused(command, path, trainer, tmp_path)
    assert "damaged.pt is damaged" in sentence


def test_a_file_without_checksums_is_read(folder, trainer, tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(read(folder / "checkpoint_last.pt"), tmp_path / "unchecked.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    generate(tmp_path / "unchecked.pt", trainer, tmp_path)


class Hostile:
    """Touches a file where it is unpickled."""

    def __init__(self, target) -> None:
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


@pytest.mark.parametrize(
    "command, old_format", [*((command, False) for command in COMMANDS), (generate, True), (export, True)]
)
def test_code_in_a_checkpoint_is_not_run(folder, trainer, tmp_path, command, old_format):
    state = {**read(folder / "checkpoint_last.pt"), "more": Hostile(tmp_path / "touched")}
    torch.save(state, tmp_path / "hostile.pt", _use_new_zipfile_serialization=not old_format)
    sentence = refused(command, tmp_path / "hostile.pt", trainer, tmp_path)
    assert re.search(r"hostile.pt asks for \w+\.open, which no checkpoint of fairseq needs", sentence)
    assert not (tmp_path / "touched").exists()


def test_a_pickle_of_another_kind_is_named(trainer, tmp_path):
    (tmp_path / "other.pt").write_bytes(pickle.dumps({"model": {1, 2}}))
    assert "other.pt" in refused(export, tmp_path / "other.pt", trainer, tmp_path)
    torch.save({"model": {"weight": torch.ones(2)}}, tmp_path / "bare.pt")  # of torch, but not of fairseq
    assert "fairseq cannot use the checkpoint" in refused(generate, tmp_path / "bare.pt", trainer, tmp_path)
    sentence = refused(generate, tmp_path / "none.pt", trainer, tmp_path)
    assert re.search("There is no checkpoint .*none.pt; check the path", sentence)


def heads(state):
    return state["model"]


def weights(state):
    return state["extra_state"][KEY]


@pytest.mark.parametrize(
    "change, commands",
    [
        (lambda s: weights(s)["masks"].pop(NAME), COMMANDS),
        (lambda s: [weights(s)[part].pop(NAME) for part in ("masks", "shapes")], (resume,)),
        (lambda s: weights(s)["masks"].update({NAME: torch.zeros(3, dtype=torch.uint8)}), COMMANDS),
        (lambda s: weights(s)["shapes"].update({NAME: [3, 3]}), COMMANDS),
        (lambda s: weights(s)["tensors"].pop(f"platon.average.{NAME}"), (resume,)),
        (lambda s: weights(s)["session"]["platon.progress"].fill_(float("nan")), COMMANDS),
        (lambda s: weights(s)["session"]["platon.progress"].fill_(1e300), (resume,)),
        (lambda s: weights(s)["tensors"][f"platon.average.{NAME}"].fill_(float("nan")), (resume,)),
        (lambda s: weights(s).update({"masks": [1]}), COMMANDS),
        (lambda s: s["extra_state"].update({KEY: [1]}), COMMANDS),
        (lambda s: heads(s)[KEEP].zero_(), COMMANDS),
        (lambda s: heads(s)[KEEP].fill_(float("nan")), COMMANDS),
        (lambda s: heads(s)[KEEP].fill_(1e300), COMMANDS),
        (lambda s: heads(s)[KEEP].resize_(5), COMMANDS),
        (lambda s: heads(s).update({KEEP: heads(s)[KEEP].flip(0)}), (resume,)),
        (lambda s: heads(s)["head_pruning.session.dsp.logits"].fill_(float("nan")), COMMANDS),
        (lambda s: heads(s)["head_pruning.session.dsp.logits"].resize_(3), (resume,)),
        (lambda s: heads(s).update({"head_pruning.session.dsp.logits": "text"}), COMMANDS),
        (lambda s: heads(s).update({KEEP: torch.ones(1).expand(10**11)}), COMMANDS),
        (lambda s: heads(s).update({META: torch.tensor(list(b"[" * 100000))}), (export, resume)),
    ],
    ids=[
        *(
            "no mask",
            "neither mask nor shape",
            "short mask",
            "other shape",
            "no average",
            "NaN",
            "1e300",
            "NaN average",
        ),
        *("no masks", "a list", "no head", "NaN heads", "1e300 heads", "few heads", "other heads", "NaN logits"),
        *("few logits", "no tensor", "a claim", "nested"),
    ],
)
def test_a_damaged_state_is_refused(folder, trainer, tmp_path, change, commands):
    state = read(folder / "checkpoint_last.pt")
    change(state)
    torch.save(state, tmp_path / "damaged.pt")
    for command in commands:
        refused(command, tmp_path / "damaged.pt", trainer, tmp_path)


def average(*paths, target):
    """As fairseq's script does: the weights are means, all else is of the first."""
    states = [read(path) for path in paths]
    for name, value in states[0]["model"].items():
        total = torch.stack([state["model"][name].double() for state in states]).mean(0)
        states[0]["model"][name] = total.to(value.dtype)
    torch.save(states[0], target)
    return target


def test_an_average_of_different_masks_is_refused(folder, trainer, tmp_path):
    first, last = next(folder.glob("checkpoint_*_7.pt")), folder / "checkpoint_last.pt"
    path = average(first, last, target=tmp_path / "mean.pt")
    for command in COMMANDS:
        assert "average of checkpoints with different masks" in refused(command, path, trainer, tmp_path)
    again = average(last, last, target=tmp_path / "same.pt")  # of one mask
    assert torch.equal(weights_of(export(again, trainer, tmp_path))[NAME], weights_of(last)[NAME])


def test_generate_and_export_are_one_model_between_two_masks(folder, trainer, tmp_path):
    between = next(folder.glob("checkpoint_*_7.pt"))
    exported = weights_of(export(between, trainer, tmp_path))[NAME]
    assert not torch.equal(exported, weights_of(between)[NAME])  # not masked in the checkpoint
    assert torch.equal(generate(between, trainer, tmp_path).state_dict()[NAME], exported)
