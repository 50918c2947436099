"""Checkpoints from before the plugin had rooms: they go on, decode, and are exported, as they did then."""

import json

import pytest
import torch
from safetensors.torch import load_file

from head_pruning.cli import main
from tests.fairseq.before_rooms.make import END, HERE, OPTIONS, corpus, decoding, training, unpack
from tests.fairseq.command_lines import decoded
from tests.fairseq.files import mask_in_state, read
from tests.fairseq.runner import PLUGIN, Runner
from tests.few import few


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The corpus that the checkpoints were trained on."""
    folder = tmp_path_factory.mktemp("old")
    return corpus(Runner(folder), folder / "corpus")


def export(source, target, kind, capsys) -> str:
    main(["export", str(source), str(target), "--to", kind])
    return capsys.readouterr().out


@pytest.mark.parametrize("name", few([name for name in OPTIONS if name != "both"], "dsp"))
def test_a_run_goes_on_to_the_end_that_it_had(words, runner, tmp_path, name):
    (tmp_path / "run").mkdir()
    last = unpack(name, tmp_path / "run").rename(tmp_path / "run" / "checkpoint_last.pt")
    before = read(last)["model"]
    runner.run("train", training(words, tmp_path / "run", name, END, PLUGIN))
    end, expected = read(last)["model"], load_file(HERE / f"{name}_end.safetensors")
    torch.testing.assert_close(end, expected, rtol=0, atol=1e-6)
    assert (before["encoder.layers.0.fc1.weight"] - end["encoder.layers.0.fc1.weight"]).abs().max() > 1e-3


@pytest.mark.slow
def test_a_run_of_heads_and_weights_goes_on_to_the_target_of_what_is_left(words, runner, tmp_path):
    """When the checkpoint was made, weights of removed heads counted too."""
    (tmp_path / "run").mkdir()
    last = unpack("both", tmp_path / "run").rename(tmp_path / "run" / "checkpoint_last.pt")
    runner.run("train", training(words, tmp_path / "run", "both", END, PLUGIN))
    told = json.loads((tmp_path / "run" / "pruning.json").read_text(encoding="utf-8"))["weights"]
    left, kept = told["weights_total"], told["weights_kept"]
    assert left < told["weights_of_dense"] and kept == left - (int(left * 0.6) - 1)
    model = read(last)["model"]
    assert kept == sum(int(torch.count_nonzero(model[name])) for name in told["kept_by_tensor"])
    end = load_file(HERE / "both_end.safetensors")
    torch.testing.assert_close(
        model["encoder.embed_tokens.weight"], end["encoder.embed_tokens.weight"], rtol=0, atol=0.1
    )


@pytest.mark.parametrize("name", few([*OPTIONS, "compact"], "both", "compact"))
def test_a_checkpoint_decodes_as_it_did(words, runner, tmp_path, name):
    found = decoded(runner.run("generate", decoding(words, unpack(name, tmp_path), PLUGIN)).out)
    expected = json.loads((HERE / "decoded.json").read_text(encoding="utf-8"))[name]
    assert {str(number): text for number, (text, _) in found.items()} == {n: text for n, (text, _) in expected.items()}
    for number, (_, scores) in found.items():
        assert scores == pytest.approx(expected[str(number)][1], abs=2e-4)


def test_the_compact_export_is_what_it_was(tmp_path, capsys):
    said = export(unpack("dsp", tmp_path), tmp_path / "again.pt", "compact", capsys)
    assert "3 of 6 heads" in said
    again, before = (read(path)["model"] for path in (tmp_path / "again.pt", unpack("compact", tmp_path)))
    torch.testing.assert_close(again, before, rtol=0, atol=0)


def test_heads_and_weights_are_zero_in_the_masked_export(tmp_path, capsys):
    said = export(unpack("both", tmp_path), tmp_path / "masked.pt", "masked", capsys)
    source, written = read(tmp_path / "both.pt"), read(tmp_path / "masked.pt")["model"]
    kept = source["extra_state"]["head_pruning"]["masks"]
    assert kept and "3 of 6 heads" in said and " weights" in said
    assert not any(name.startswith("head_pruning") for name in written)
    mask = mask_in_state(source)
    assert mask.kept == 3
    for site, where in mask.unit_map.slices():
        heads = written[f"{site.out_proj}.weight"].unflatten(1, (site.heads, site.head_dim))
        assert not heads[:, ~torch.from_numpy(mask.keep[where])].any()
    name = "encoder.layers.0.fc1.weight"
    assert torch.equal(written[name] != 0, unpacked(kept[name], written[name].shape))


def unpacked(bits: torch.Tensor, shape) -> torch.Tensor:
    """A mask of one bit for each weight, the first in the highest bit."""
    places = bits[:, None] >> torch.arange(7, -1, -1)
    return (places & 1).flatten()[: shape.numel()].view(shape).bool()


def test_a_compact_checkpoint_is_trained_on_and_its_heads_pruned(words, runner, tmp_path, capsys):
    source = unpack("compact", tmp_path)
    line = training(words, tmp_path / "run", "dsp", 4, PLUGIN)
    line[line.index("--num-of-heads") + 1] = "2"
    runner.run("train", [*line, "--finetune-from-model", source])
    said = export(tmp_path / "run" / "checkpoint_last.pt", tmp_path / "smaller.pt", "compact", capsys)
    assert "2 of 3 heads" in said
    main(["inspect", str(tmp_path / "smaller.pt"), "--length", "4", "--json"])
    assert json.loads(capsys.readouterr().out)["heads_kept"] == 2
