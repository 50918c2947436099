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
def test_a_dense_model_and_a_pruned_one(data, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    given = {"binary": data, "updates": 4, "warmup": 2, "short": 2, "cooldown": 1}
    plan, out = str(tables.PLANS / "translation.yaml"), tmp_path / "out"
    flags = [word for name, value in given.items() for word in ("--set", f"{name}={value}")]
    main(["sweep", plan, *flags, "--out", str(out), "--jobs", "1", "--only", "^(dense|joint-DSP-4)$"])
    rows = tables.collected(out)
    assert [(row["cell"], row["heads"], row["heads_kept"]) for row in rows] == [
        ("dense", "", ""),
        ("joint-DSP-4", "4", "4"),
    ]
    assert all(row["sentences"] == "10" and float(row["score"]) >= 0 for row in rows)
    assert [run.name for run in find_runs([out])] == ["dense", "joint-DSP-4"]
    assert not (out / "runs/joint-DSP-4/checkpoint_last.pt").exists()
    assert (out / "runs/dense/checkpoint_last.pt").is_file()
    monkeypatch.setattr("sys.argv", ["tables", "translation", str(out), "--results", str(tmp_path / "results")])
    with pytest.raises(SystemExit, match="dense was measured by other commands than those of the plan translation"):
        tables.main()  # this is no table of a training of 4 updates
    tables.write_tables("translation", rows, tmp_path / "results")
    text = (tmp_path / "results" / "translation.md").read_text()
    assert "| dense | 36 | " in text and "| joint DSP | 4 | " in text
