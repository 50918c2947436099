"""The benchmark of the gates' cost runs and prints what it promises."""

import json
import sys

import pytest

from benchmarks import gate_overhead

TINY = ("--layers", "2", "--hidden", "32", "--heads", "4", "--batch", "2", "--length", "8", "--rounds", "3")
METHODS = ("dsp", "ste", "voita", "random")


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["gate_overhead", *TINY, *arguments])
        gate_overhead.main()
        return capsys.readouterr().out.splitlines()

    return call


def test_json_is_one_object_with_the_promised_keys(run):
    (line,) = run("--json")
    results = json.loads(line)
    assert results["max_ratio"] == max(results[name] for name in METHODS)
    assert results["importance_ratio"] == max(results["importance"], results["importance_per_example"])
    # Gates on so small a model take time, and cannot take many times its own.
    assert 1.0 < results["max_ratio"] < 10.0
    assert results["layers"] == 2 and results["rounds"] == 3 and 0 < results["pass_ms"] < results["step_ms"]
    low, high = results["quartiles"]["dsp"]
    assert low <= results["dsp"] <= high


@pytest.mark.slow
def test_table_has_a_line_per_contestant(run):
    lines = run()
    names = ["no gates", *METHODS, "no gates, pass", "importance", "importance per example"]
    assert [line.split("  ")[0] for line in lines[2:]] == names
    assert len(lines[2].split()) == 3 and len(lines[3].split()) == 5
