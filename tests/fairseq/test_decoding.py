"""Commands that run a stored model: which sentences, which heads, which alignments."""

import re
import shlex
import sys
from argparse import Namespace

import fairseq_cli.validate
import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils, utils

from fairseq_plugin import host
from fairseq_plugin.exporting.checkpoints import export_compact
from fairseq_plugin.patches import sentence_of
from head_pruning import HeadMask
from head_pruning.cli import main
from head_pruning.weights import load_compressed
from tests.fairseq.command_lines import DSP, decoded, same_decoding
from tests.fairseq.files import mask_beside, read, weights_of, zeroed_by_hand
from tests.fairseq.in_process import generated
from tests.fairseq.runner import PLUGIN, Runner

CROSS = "decoder.layers.1.encoder_attn"  # the last one


class Models:
    """Checkpoints of one model: with its mask, dense, and masks for the dense one in files."""

    def __init__(self, folder) -> None:
        self.folder, self.pruned = folder, folder / "run" / "checkpoint_last.pt"
        self.dense = zeroed_by_hand(self.pruned, folder / "dense.pt")
        self.mask, self.file = mask_beside(self.pruned), folder / "run" / "masks.safetensors"

    def masked(self, name, last) -> tuple:
        """Mask file and compact checkpoint of a mask that keeps the heads ``last`` of the last cross-attention."""
        keep = np.arange(self.mask.keep.size) % 3 > 0
        for site, where in self.mask.unit_map.slices():
            if site.name == CROSS:
                keep[where] = [head in last for head in range(site.heads)]
        mask, file = HeadMask(self.mask.unit_map, keep), self.folder / f"{name}.safetensors"
        mask.save(file)
        export_compact(self.dense, self.folder / f"{name}.pt", mask)
        return file, self.folder / f"{name}.pt"


@pytest.fixture(scope="module")
def models(translation, tmp_path_factory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    Runner(folder).run("train", translation.train(folder / "run", DSP, updates=3))
    utils.import_user_module(Namespace(user_dir=PLUGIN))
    return Models(folder)


def under(file) -> str:
    return f"--task translation_head_pruning --head-mask-file {file}"


def refused(translation, path, options, capsys) -> str:
    with pytest.raises(Exception) as caught:
        generated(translation.generate(path, options), capsys)
    sentence = sentence_of(caught.value)
    assert sentence is not None, repr(caught.value)
    return sentence


def test_no_sentence_is_left_out_unless_asked_for(translation, models, capsys):
    line = translation.generate(models.pruned)
    at = line.index("--required-batch-size-multiple")
    out = generated([*line[:at], *line[at + 2 :]], capsys)
    assert len(decoded(out)) == 10
    out = generated([*line[:at], *line[at + 2 :], "--required-batch-size-multiple", "8"], capsys)
    assert len(decoded(out)) == 8  # fairseq's own default


@pytest.mark.slow
def test_a_dense_model_is_decoded_under_a_mask(translation, models, tmp_path, capsys):
    ours = decoded(generated(translation.generate(models.dense, under(models.file)), capsys))
    hand = zeroed_by_hand(models.dense, tmp_path / "hand.pt", models.mask)
    same_decoding(ours, decoded(generated(translation.generate(hand), capsys)))
    assert ours != decoded(generated(translation.generate(models.dense), capsys))
    line = shlex.split(
        f"--valid-subset valid --batch-size 5 --cpu --num-workers 0 --log-format json {under(models.file)}"
    )
    losses = [
        validated([translation.data, "--user-dir", PLUGIN, "--path", path, *options], capsys)
        for path, options in ((models.dense, line), (hand, line[:-4]), (models.dense, line[:-4]))
    ]
    assert losses[0] == losses[1] != losses[2]


def validated(line, capsys) -> str:
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fairseq-validate", *map(str, line)])
        fairseq_cli.validate.cli_main()
    captured = capsys.readouterr()
    return re.findall(r'"valid_loss": "([\d.]+)"', captured.out + captured.err)[-1]


@pytest.mark.parametrize(
    "path, options, words",
    [
        ("pruned", "--head-mask-file {file}", "has a head mask of its own"),
        ("dense", "--head-mask-file nowhere.safetensors", "There is no file nowhere.safetensors"),
        pytest.param("dense", "--num-of-heads 4", "--num-of-heads takes a training", marks=pytest.mark.slow),
        pytest.param("dense", "--num-of-heads 4 --pruner random", "takes a training", marks=pytest.mark.slow),
        pytest.param("dense", "--annealing", "--annealing takes a training", marks=pytest.mark.slow),
        ("dense", "--head-mask-file {file} --weight-pruner lock", "--weight-pruner"),
        (
            "nowhere",
            "--weight-pruner platon --final-threshold 0.1",
            "takes a training",
        ),  # before a model is looked for
    ],
)
def test_other_options_of_pruning_are_refused(translation, models, capsys, path, options, words):
    path = getattr(models, path, models.folder / "nowhere.pt")
    options = f"--task translation_head_pruning {options.format(file=models.file)}"
    assert words in refused(translation, path, options, capsys)


def test_options_of_the_stored_run_are_not_those_of_the_command(models):
    """The task of a checkpoint has the options of its run; overrides of them are refused as flags are."""
    checkpoint_utils.load_model_ensemble_and_task([str(models.pruned)])
    with pytest.raises(Exception) as caught:
        checkpoint_utils.load_model_ensemble_and_task([str(models.pruned)], {"num_of_heads": 7})
    assert "--num-of-heads takes a training" in sentence_of(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("last", [(0, 2), ()])
def test_alignments_are_those_of_the_heads_that_stay(translation, models, capsys, last):
    file, compact = models.masked(f"last{len(last)}", last)
    found = []
    for path, options in ((models.dense, under(file)), (compact, ""), (models.dense, "")):
        out = generated(translation.generate(path, options, "--print-alignment soft"), capsys)
        lines = re.findall(r"^A-(\d+)\t(.*)$", out, re.MULTILINE)
        found.append({number: np.array([w.split(",") for w in words.split()], float) for number, words in lines})
    masked, cut, dense = found
    assert len(masked) == 10 and masked.keys() == cut.keys()
    for number, weights in masked.items():
        np.testing.assert_allclose(weights, cut[number], atol=2e-3)
    assert any(masked[n].shape != dense[n].shape or abs(masked[n] - dense[n]).max() > 1e-2 for n in masked)


def test_a_model_whose_alignments_say_nothing_is_told_of(models, caplog):
    file, compact = models.masked("none", ())
    for path, overrides in ((compact, {}), (models.dense, {"head_mask_file": str(file)}), (models.dense, {})):
        caplog.clear()
        checkpoint_utils.load_model_ensemble_and_task([str(path)], overrides)
        assert (f"no head of {CROSS} is left" in caplog.text) == bool(overrides or path == compact)


def test_compressed_is_the_masked_model(models, tmp_path, capsys):
    main(["export", str(models.pruned), str(tmp_path / "small.safetensors"), "--to", "compressed"])
    assert "load_compressed reads it" in capsys.readouterr().out
    main(["export", str(models.pruned), str(tmp_path / "masked.pt"), "--to", "masked"])
    found, expected = load_compressed(tmp_path / "small.safetensors"), weights_of(tmp_path / "masked.pt")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    main(["export", str(models.masked("c", (1,))[1]), str(tmp_path / "cut.safetensors"), "--to", "compressed"])
    model = host.load(models.dense).model
    model.load_state_dict(load_compressed(tmp_path / "cut.safetensors"))
    assert model.get_submodule(CROSS).num_heads == 1


def test_the_masked_export_needs_no_class(models, tmp_path):
    """torch's own list of what may be loaded is enough for it."""
    main(["export", str(models.pruned), str(tmp_path / "masked.pt"), "--to", "masked"])
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        state = torch.load(tmp_path / "masked.pt", weights_only=True)
    finally:
        torch.serialization.add_safe_globals(allowed)
    assert state["cfg"]["model"] == vars(read(models.pruned)["cfg"]["model"])
