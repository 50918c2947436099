"""fairseq's installed commands with the manual's relative ``--user-dir``, each in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fairseq.command_lines import DSP
from tests.fairseq.files import mask_beside
from tests.fairseq.runner import PLUGIN, ROOT

pytestmark = pytest.mark.slow


def run(command: str, line: list) -> subprocess.CompletedProcess:
    words = ["fairseq_plugin" if word == PLUGIN else str(word) for word in line]
    script = Path(sys.executable).with_name(command)
    return subprocess.run([str(script), *words], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_train_and_generate(translation, tmp_path):
    done = run("fairseq-train", translation.train(tmp_path / "run", DSP, updates=2))
    assert done.returncode == 0, done.stderr
    checkpoint = tmp_path / "run" / "checkpoint_last.pt"
    assert mask_beside(checkpoint).kept == 4
    done = run("fairseq-generate", translation.generate(checkpoint))
    assert done.returncode == 0 and "BLEU" in done.stdout, done.stderr


def test_mistake(translation, tmp_path):
    done = run("fairseq-train", translation.train(tmp_path / "run", "--num-of-heads 25"))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: 25 heads to keep are more than the 24 heads of the model")
