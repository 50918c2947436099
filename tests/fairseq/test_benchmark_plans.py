"""The plans of benchmarks that train translation models: fairseq takes their command lines, and two cells run."""

from pathlib import Path

import pytest
from fairseq import options

from benchmarks import tables
from fairseq_plugin.run_michel import get_parser
from head_pruning.cli import main
from head_pruning.report.runs import find_runs
from head_pruning.sweep.plan import Cell
from tests.fairseq.runner import PLUGIN

ROOT = Path(PLUGIN).parent


def cells(name: str) -> list[Cell]:
    return tables.asked(name)[0].cells(Path("DIR"))


@pytest.mark.parametrize("name", ["heads", "translation"])
def test_fairseq_takes_the_command_lines(name, monkeypatch):
    """Of each method of each task one."""
    monkeypatch.chdir(ROOT)
    read = dict.fromkeys(("train", "generate", "run_michel", "cli"), 0)
    every = {(cell.values.get("task"), cell.values["method"]): cell for cell in reversed(cells(name))}
    for cell in every.values():
        for _, _, module, *words in cell.commands:
            script = module.rpartition(".")[2]
            if script == "train":
                told = options.parse_args_and_arch(options.get_training_parser(), words)
                assert told.save_dir == f"DIR/runs/{cell.name}" and told.encoder_layers == 3
            elif script == "generate":
                options.parse_args_and_arch(options.get_generation_parser(), words)
            elif script == "run_michel":
                assert options.parse_args_and_arch(get_parser(), words).exact_pruning
            read[script] = read.get(script, 0) + 1
    assert read["train"] == read["generate"] - read["cli"] > 9 and read["run_michel"] == read["cli"]


@pytest.mark.slow
def test_a_model_and_what_michel_leaves_of_it(data, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    given = {"binary": data, "updates": 120, "warmup": 20, "short": 2, "cooldown": 1}  # enough to end sentences
    plan, out = str(tables.PLANS / "translation.yaml"), tmp_path / "out"
    flags = [word for name, value in given.items() for word in ("--set", f"{name}={value}")]
    main(["sweep", plan, *flags, "--out", str(out), "--jobs", "1", "--only", "^(dense|Michel-exact--(18|2))$"])
    rows = tables.collected(out)
    michel = [("Michel-exact--18", "18"), ("Michel-exact--2", "2")]
    assert [(row["cell"], row["heads"]) for row in rows] == [("dense", ""), *michel]
    assert all(row["sentences"] == "10" and float(row["score"]) >= 0 for row in rows)
    left = {run.name for run in find_runs([out])}
    assert left == {row["cell"] for row in rows}
    assert not (out / "runs/Michel-exact--2/checkpoint_last.pt").exists()
    assert (out / "runs/dense/checkpoint_last.pt").is_file()
    monkeypatch.setattr("sys.argv", ["tables", "translation", str(out), "--results", str(tmp_path / "results")])
    tables.main()
    text = (tmp_path / "results" / "translation.md").read_text()
    assert "| dense | 36 | " in text and "| Michel (exact) | 2 | " in text
