"""The benchmark of pruned models' speed runs, prints what it promises and goes on where it was stopped."""

import json
import subprocess
import sys

import pytest

TINY = ("--layers", "2", "--hidden", "48", "--heads", "12", "--rounds", "2", "--seconds", "0", "--runtimes", "torch")
KEEPS = ["12 heads", "6 heads", "2 heads", "2 heads in 2 layers", "0 heads"]
KEEPS += ["12 heads, 1/2 of the units", "2 heads, 1/4 of the units"]


@pytest.fixture
def run(repo):
    def call(*arguments: object) -> str:
        command = [sys.executable, "-m", "benchmarks.inference", *TINY, *map(str, arguments)]
        done = subprocess.run(command, cwd=repo, capture_output=True, text=True, check=True, timeout=120)
        return done.stdout

    return call


@pytest.mark.slow
def test_json_holds_speed_ups_bounds_and_sizes_and_a_second_run_goes_on(run, tmp_path):
    found = json.loads(run("--json", "--results", tmp_path, "--lengths", "8", "--batches", "1"))
    rows = found["rows"]
    assert [row["model"] for row in rows] == ["dense", *KEEPS]
    for row in rows:
        assert row["speed_up"] == pytest.approx(rows[0]["ms"] / row["ms"], rel=0.01)
        assert row["fraction_of_bound"] == pytest.approx(row["speed_up"] / row["mac_bound"], abs=1e-3)
    assert found["min_fraction_of_bound"] == min(row["fraction_of_bound"] for row in rows[1:])
    assert rows[3]["mac_bound"] == rows[4]["mac_bound"] > rows[2]["mac_bound"] > 1.0
    assert rows[7]["mac_bound"] > 2 > rows[6]["mac_bound"] > rows[1]["mac_bound"]
    dense, none = found["sizes"]["dense"], found["sizes"]["0 heads"]
    # Without heads each layer keeps the output projection's bias.
    assert dense["parameters"] - none["parameters"] == 2 * (4 * 48 * 48 + 3 * 48)
    assert all(0 < size["file_bytes"] - size["parameter_bytes"] < 10_000 for size in found["sizes"].values())

    longer = json.loads(run("--json", "--results", tmp_path, "--lengths", "8", "16", "--batches", "1"))
    assert longer["rows"][:8] == rows and len(longer["rows"]) == 16
    table = (tmp_path / "inference.md").read_text(encoding="utf-8")
    assert table.count("| torch | 8 | 1 |") == table.count("| torch | 16 | 1 |") == 8

    # A model that is new is measured; what is there stays, cells that are not asked for too.
    file = tmp_path / "inference.json"
    stored = json.loads(file.read_text(encoding="utf-8"))
    stored["rows"] = [row for row in stored["rows"] if row["model"] != KEEPS[-1]]
    file.write_text(json.dumps(stored), encoding="utf-8")
    again = json.loads(run("--json", "--results", tmp_path, "--lengths", "8", "--batches", "1"))["rows"]
    assert again[:7] == rows[:7] and again[7]["model"] == KEEPS[-1]
    assert again[8:] == longer["rows"][8:15]
    assert "other options" not in (tmp_path / "inference.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_table_has_a_line_per_model(run):
    lines = run("--lengths", "8", "--batches", "2").splitlines()
    assert [" ".join(line.split()[3:-4]) for line in lines[2:10]] == ["dense", *KEEPS]
