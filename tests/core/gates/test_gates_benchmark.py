"""The benchmark of the gates runs and prints what it promises."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_json_is_one_object_with_the_promised_keys(repo):
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gates", "--json", "--repeats", "5"],
        cwd=repo, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    results = json.loads(run.stdout)
    assert len(run.stdout.splitlines()) == 1
    slow, fast = results["topk_autograd_ms_n144_k132"], results["topk_ms_n144_k132"]
    assert results["topk_speedup_n144_k132"] == pytest.approx(slow / fast, rel=1e-2)
    assert 0 < results["topk_ms_saturated_n144_k132"] and slow > 0
    assert results["subset_over_dsp_n144_k132"] == pytest.approx(results["subset_ms_n144_k132"] / fast, rel=0.05)
    # Far from what is measured (0.1; 1.2): other programs may take turns here, too.
    assert results["subset_over_dsp_n144_k132"] < 1 and 1 <= results["subset_flat_n144"] < 4


@pytest.mark.slow
def test_table_has_a_line_per_size(repo):
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gates", "--repeats", "1"],
        cwd=repo, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    lines = run.stdout.splitlines()
    assert lines[0].split()[:2] == ["heads", "kept"] and lines[2].split()[:3] == ["144", "132", "0.1"]
    assert len(lines) == 9 and lines[-1].startswith("subset ms of 144 heads by how many stay: 12: ")
