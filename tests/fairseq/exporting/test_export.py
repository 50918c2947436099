"""The masked export: an ordinary checkpoint that plain fairseq decodes to the same sentences."""

import pytest
import torch

from fairseq_plugin.exporting import checkpoints as export
from head_pruning import HeadMask, HeadPruningError
from tests import forked
from tests.fairseq.command_lines import DSP, decoded


def without_plugin(line: list) -> list:
    """A command line of plain fairseq."""
    where = line.index("--user-dir")
    return [*line[:where], *line[where + 2 :]]


def plain_user_dir(folder):
    """What plain fairseq needs to read the checkpoints that it writes itself under torch 2.6 and later."""
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "import argparse, torch\ntorch.serialization.add_safe_globals([argparse.Namespace])\n", encoding="utf-8"
    )
    return folder


def _export(*arguments):
    return forked.run("fairseq_plugin", ["-m", "head_pruning.cli", "export", *arguments, "--to", "masked"])


def test_plain_fairseq_decodes_the_export_as_the_plugin_decodes_the_checkpoint(translation, runner, tmp_path):
    runner.run("train", translation.train(tmp_path / "out", DSP, updates=20))
    checkpoint, exported = tmp_path / "out" / "checkpoint_last.pt", tmp_path / "masked.pt"
    done = _export(checkpoint, exported)
    assert done.returncode == 0 and "4 of 24 heads" in done.stdout, done.stderr

    pruned = decoded(runner.run("generate", translation.generate(checkpoint)).out)
    # In a process that knows nothing of this package, with torch's own list of what may be loaded.
    assert decoded(runner.run("generate", without_plugin(translation.generate(exported))).out) == pruned
    rest = "--task translation --valid-subset valid --batch-size 5 --cpu --num-workers 0"
    assert (
        "valid on 'valid' subset" in runner.run("validate", [translation.data, "--path", exported, *rest.split()]).out
    )

    state = torch.load(exported, weights_only=False)
    assert not any(name.startswith("head_pruning") for name in state["model"])
    assert state["cfg"]["task"]["_name"] == "translation" and "num_of_heads" not in state["cfg"]["task"]
    mask = HeadMask.load(tmp_path / "out" / "masks.safetensors")
    for site, where in mask.unit_map.slices():
        heads = state["model"][f"{site.out_proj}.weight"].unflatten(1, (site.heads, site.head_dim))
        assert heads.ne(0).any(dim=(0, 2)).tolist() == mask.keep[where].tolist()

    # The dense model behind the same gates decodes something else: the mask matters here. Plain fairseq reads what
    # fairseq-train writes with this setting alone.
    dense = torch.load(checkpoint, weights_only=False)
    dense["model"] = {n: v for n, v in dense["model"].items() if not n.startswith("head_pruning")}
    torch.save(dense, tmp_path / "dense.pt")
    line, setting = (
        without_plugin(translation.generate(tmp_path / "dense.pt")),
        {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"},
    )
    assert decoded(runner.run("generate", line, **setting).out) != pruned


@pytest.mark.slow
def test_export_applies_a_mask_file_to_a_dense_checkpoint(translation, runner, tmp_path):
    runner.run("train", translation.train(tmp_path / "dense", task="translation", updates=2))
    runner.run("train", translation.train(tmp_path / "pruned", DSP, updates=2))
    mask_file = tmp_path / "pruned" / "masks.safetensors"
    exported = tmp_path / "masked.pt"
    assert _export(tmp_path / "dense" / "checkpoint_last.pt", exported, "--mask", mask_file).returncode == 0
    mask = HeadMask.load(mask_file)
    weights = torch.load(exported, weights_only=False)["model"]
    site, where = next(mask.unit_map.slices())
    rows = weights[f"{site.projections[0]}.weight"].unflatten(0, (site.heads, site.head_dim))
    assert rows.ne(0).any(dim=(1, 2)).tolist() == mask.keep[where].tolist()


def test_export_refuses_bad_files_and_writes_nothing(tmp_path):
    (tmp_path / "damaged.pt").write_bytes(b"no checkpoint")
    torch.save({"model": {}, "extra_state": {}, "args": None, "cfg": {}}, tmp_path / "dense.pt")
    for name, words in (
        ("missing.pt", "missing.pt; check the path"),
        ("damaged.pt", "damaged"),
        ("dense.pt", "no head mask"),
    ):
        done = _export(tmp_path / name, tmp_path / "out.pt")
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 1 and last.startswith("error: ") and words in last, done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.pt").exists()


def test_a_folder_is_no_file_to_write(tmp_path, monkeypatch):
    # Told before the checkpoint is read: an export takes long.
    monkeypatch.setattr(export, "load_checkpoint", lambda path: pytest.fail("the checkpoint was read first"))
    for write in (export.masked, export.compact):
        with pytest.raises(HeadPruningError, match=f"{tmp_path} is a folder; name a file .*model.pt"):
            write(tmp_path / "checkpoint.pt", tmp_path, None)
