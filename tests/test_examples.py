"""The examples run as their users run them, and do what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from head_pruning import HeadMask
from tests import forked

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
# Each is run by the test of this name below.
TESTED = {"fairseq_translation.sh", "own_method.py", "plain_loop.py", "trainer.py"}


def _python(folder: Path, *command: str) -> str:
    done = forked.run("transformers", command, folder)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def _run(folder: Path, *command: str) -> str:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # The scripts of the environment that the tests run in; they find the packages of this working tree first.
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PYTHONPATH": path, "PATH": programs, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == TESTED


def test_plain_loop(tmp_path):
    printed = _python(tmp_path, str(EXAMPLES / "plain_loop.py"))
    (score,) = re.findall(r"accuracy with 4 of 16 heads: ([\d.]+) %", printed)
    assert float(score) > 80
    mask = HeadMask.load(tmp_path / "plain_loop_masks.safetensors")
    assert (mask.kept, mask.keep.size) == (4, 16)


@pytest.mark.slow
def test_trainer(tmp_path):
    pytest.importorskip("transformers")
    printed = _python(tmp_path, str(EXAMPLES / "trainer.py"), "out")
    (score,) = re.findall(r"accuracy with 4 of 16 heads: ([\d.]+)", printed)
    assert float(score) > 0.8
    ((before, after, difference),) = re.findall(
        r"parameters: (\d+) before, (\d+) after; largest difference of logits: (\S+)", printed
    )
    # 12 heads of 8 go: rows of q, k, v with their biases, columns of the output, at width 32.
    assert int(before) - int(after) == 12 * 8 * (4 * 32 + 3) and float(difference) < 1e-5
    assert HeadMask.load(tmp_path / "out" / "pruned" / "masks.safetensors").kept == 4


@pytest.mark.slow
def test_own_method(tmp_path):
    pytest.importorskip("transformers")
    printed = _python(tmp_path, str(EXAMPLES / "own_method.py"))
    (score,) = re.findall(r"accuracy with 4 of 16 heads by the method sigmoid: ([\d.]+)", printed)
    assert float(score) > 0.8


@pytest.mark.slow
def test_fairseq_translation(tmp_path):
    pytest.importorskip("fairseq")
    printed = _run(tmp_path, "bash", str(EXAMPLES / "fairseq_translation.sh"), "out")
    (score,) = re.findall(r"BLEU4 = ([\d.]+)", printed)
    assert float(score) > 50
    ((left, of),) = re.findall(r"small.pt: 6 of 24 heads, ([\d,]+) of ([\d,]+) parameters", printed)
    # 18 heads of 8 go, at width 32.
    assert int(of.replace(",", "")) - int(left.replace(",", "")) == 18 * 8 * (4 * 32 + 3)
    assert HeadMask.load(tmp_path / "out" / "checkpoints" / "masks.safetensors").kept == 6
