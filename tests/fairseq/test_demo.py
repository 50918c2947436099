"""The demo, shrunk: every method runs, and what shows nothing is called so."""

import json
import subprocess
import sys

import pytest

from tests.fairseq.runner import ROOT, Runner


@pytest.mark.slow
def test_the_demo_runs_and_refuses_a_comparison_that_shows_nothing(data, tmp_path):
    text = data.parent
    prefixes = [f"--{split}pref={text / split}" for split in ("train", "valid", "test")]
    languages = ["--source-lang", "de", "--target-lang", "en", "--joined-dictionary"]
    joined = tmp_path / "data-bin"
    Runner(tmp_path).run("preprocess", [*languages, *prefixes, "--destdir", joined, "--workers", "1"])

    command = [sys.executable, "-m", "fairseq_plugin.demo", "--data", str(joined), "--output", str(tmp_path / "out")]
    command += ["--updates", "4", "--more-updates", "4", "--keep", "6"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    # After so few updates nothing translates: random heads are as good as all, and the demo must say so.
    assert done.returncode == 1 and "error: Random heads reach BLEU" in done.stderr.splitlines()[-1], done.stderr
    for row in ("dense", "head sensitivity", "DSP", "STE", "Voita", "random heads, 3 draws", "Michel (cut only)"):
        assert any(line.startswith(row) for line in done.stdout.splitlines()), done.stdout
    rows = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert {row["heads"] for row in rows if row["method"] in ("head sensitivity", "DSP", "STE", "random heads")} == {6}
    assert (tmp_path / "out" / "heads.png").read_bytes().startswith(b"\x89PNG")

    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 1 and json.loads((tmp_path / "out" / "results.json").read_text()) == rows
