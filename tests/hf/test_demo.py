"""The demo, shrunk: every row of its table, the picture, and nothing is trained twice."""

import json
import subprocess
import sys

import pytest

from tests.hf.script_runs import HEADS, ROOT, write_model, write_task


@pytest.mark.slow
def test_the_demo_runs_and_does_not_repeat_what_is_finished(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    write_task(data, "SST-2", rows=64)
    write_model(data / "model")
    command = [sys.executable, "-m", "hf_plugin.demo", "--data", str(data), "--output", str(out), "--keep", "6"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert [row["method"] for row in rows] == ["dense", "head sensitivity", "DSP", "random heads", "Michel (cut only)"]
    assert [row["heads"] for row in rows] == [HEADS, 6, 6, 6, 6]
    assert all(row["method"] in done.stdout for row in rows)
    assert (out / "heads.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/model.safetensors")}
    assert len(before) == 5
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and json.loads((out / "results.json").read_text()) == rows
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/model.safetensors")} == before
