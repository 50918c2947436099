"""The head-pruning command, as its users call it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from head_pruning import AttentionSite, HeadMask, UnitMap

ROOT = Path(__file__).resolve().parents[1]


def _run(*arguments, cwd=ROOT):
    command = [sys.executable, "-m", "head_pruning.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.fixture
def unit_map():
    return UnitMap(
        tuple(
            AttentionSite(f"layers.{i}.attn", "encoder_self", f"layers.{i}", 4, 2, f"layers.{i}.attn.out")
            for i in range(2)
        )
    )


def test_user_dir_prints_the_plugin_folder():
    done = _run("user-dir")
    assert done.returncode == 0
    assert Path(done.stdout.strip()).samefile(ROOT / "fairseq_plugin")


def test_pruners_lists_every_method_with_its_options():
    done = _run("pruners")
    for name in ("dsp:", "ste:", "voita:", "random:", "--num-of-heads", "--cooldown-steps", "--l0-penalty"):
        assert name in done.stdout


def test_show_prints_compares_and_draws(unit_map, tmp_path):
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    HeadMask(unit_map, np.array([1, 1, 0, 0, 0, 0, 0, 1])).save(first)
    HeadMask(unit_map, np.array([1, 0, 0, 0, 0, 0, 1, 1])).save(second)
    picture = tmp_path / "masks.png"
    done = _run("show", first, second, "--plot", picture)
    assert done.returncode == 0, done.stderr
    assert "##.." in done.stdout and "3/8" in done.stdout and "0.50" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("content", [None, b"not a mask"])
def test_show_refuses_what_is_no_mask_with_one_sentence(tmp_path, content):
    path = tmp_path / "mask.safetensors"
    if content is not None:
        path.write_bytes(content)
    done = _run("show", path)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
