"""The benchmarks as plans: their cells, and that the committed tables come out of the committed rows."""

import csv
import importlib
import json
import runpy
import sys
from pathlib import Path

import pytest

from benchmarks import tables
from head_pruning import HeadPruningError
from head_pruning.cli import main
from head_pruning.files import MASKS_FILE
from head_pruning.sweep.plan import read_plan

#: Trainings of each plan.
CELLS = {"glue": 102, "gpp_glue": 104, "heads": 350, "prune_once": 75, "sizes": 16, "spd_glue": 117}
CELLS |= {"translation": 28, "weights_glue": 47}


def test_every_plan_is_known():
    assert sorted(path.stem for path in tables.PLANS.glob("*.yaml")) == sorted(CELLS)


@pytest.mark.parametrize("name", CELLS)
def test_a_plan_has_all_of_its_cells(name, capsys):
    given = [word for each in tables.asked(name)[2].items() for word in ("--set", "=".join(each))]
    main(["sweep", str(tables.PLANS / f"{name}.yaml"), "--out", "DIR", "--dry-run", *given])
    lines = capsys.readouterr().out.splitlines()
    cells = [line for line in lines if not line.startswith(" ")]
    assert len(cells) == len(set(cells)) == CELLS[name]
    commands = [line for line in lines if line.startswith(" ")]
    assert all(line.split()[0] in ("python", "head-pruning") and "{" not in line for line in commands)


@pytest.mark.parametrize(
    "line, count",
    [
        ("glue M D", CELLS["glue"]),
        ("weights_glue M D S", CELLS["weights_glue"]),
        ("spd_glue M D --only ^seed1-10-SST-2", 10),
        ("gpp_glue M D", CELLS["gpp_glue"]),
        ("prune_once M D S", CELLS["prune_once"]),
        ("translation C", CELLS["translation"]),
        ("translation C --updates 2000", CELLS["translation"]),
        ("heads --data D --model M --wide-model W --corpus C", CELLS["heads"]),
        ("heads", 30),
        ("heads --data D --wide-model W --only dsp", 12),
    ],
)
def test_the_commands_that_are_named_after_plans(line, count, monkeypatch, capsys):
    name, *words = line.split()
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name, *words, "--work", "DIR", "--dry-run"])
    runpy.run_path(module.__file__, run_name="__main__")
    cells = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert len(cells) == count


@pytest.mark.parametrize("name", [*CELLS, "translation-recorded"])
def test_a_committed_table_comes_out_of_its_rows(name, tmp_path, monkeypatch):
    stored = (tables.STORED / f"{name}.csv").read_bytes()
    (tmp_path / f"{name}.csv").write_bytes(stored)
    for plot in ("plot_scores", "plot_runs"):
        monkeypatch.setattr(tables, plot, lambda *args, **options: None)  # the next tests draw
    monkeypatch.setattr(sys, "argv", ["tables", name, "--results", str(tmp_path)])
    tables.main()
    assert (tmp_path / f"{name}.csv").read_bytes() == stored
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (tables.STORED / path.name).read_bytes()
    assert (tmp_path / f"{name}.md").exists() and (name != "heads" or (tmp_path / "heads.json").exists())


def test_what_a_sweep_has_measured_is_taken_in(tmp_path, monkeypatch):
    out, sweep, other = tmp_path / "out", tmp_path / "sweep", "seed2-10-SST-2-SPD"
    row = {"cell": "seed1-10-SST-2-SPD", "seed": "1", "task": "SST-2", "method": "SPD", "percent": "10"}
    row |= {"score": "0.5", "density": "0.1", "score_name": "eval_accuracy", "seconds": "1"}
    plan = read_plan(tables.PLANS / "spd_glue.yaml", {"model": "m", "data": "a folder", "device": ""})
    commands = {cell.name: "\n".join(cell.lines) for cell in plan.cells(sweep)}
    row["commands"] = commands[row["cell"]]
    for folder, rows in (
        (sweep, [row, {**row, "cell": other, "seed": "2", "score": "0.25", "commands": commands[other]}]),
        (tmp_path / "foreign", [{**row, "cell": "dense"}]),
        (tmp_path / "changed", [{**row, "commands": row["commands"].replace("--sparsity 0.9", "--sparsity 0.8")}]),
    ):
        folder.mkdir()
        with (folder / "results.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(row))
            writer.writeheader()
            writer.writerows(rows)
    out.mkdir()
    head, *stored = (tables.STORED / "spd_glue.csv").read_text().splitlines(keepends=True)
    (out / "spd_glue.csv").write_text("".join([head, *(line for line in stored if line.startswith("seed1-"))]))
    before = tables.read_rows(out / "spd_glue.csv")
    monkeypatch.setattr(sys, "argv", ["tables", "spd_glue", str(sweep), "--results", str(out)])
    tables.main()
    after = {each["cell"]: each for each in tables.read_rows(out / "spd_glue.csv")}
    assert after.keys() == {each["cell"] for each in before} | {other}
    assert after[row["cell"]]["score"] == "0.5" and "commands" not in after[row["cell"]]
    assert all(after[each["cell"]]["score"] == each["score"] for each in before if each["cell"] != row["cell"])
    text = (out / "spd_glue.md").read_text()
    assert "| SPD | 37.5 (25.0 to 50.0) |" in text and f"{len(after)} of {CELLS['spd_glue']} trainings" in text
    pictures = {path.name: path.read_bytes()[:4] for path in out.glob("*.png")}
    assert pictures == {f"spd_glue-{task}.png": b"\x89PNG" for task in ("CoLA", "MNLI", "MRPC", "SST-2")}
    for folder, sentence in (
        ("foreign", "The plan has no cell dense; give the folder of its own sweep"),
        ("changed", "seed1-10-SST-2-SPD was measured by other commands than those of the plan spd_glue"),
    ):
        monkeypatch.setattr(sys, "argv", ["tables", "spd_glue", str(tmp_path / folder), "--results", str(out)])
        with pytest.raises(SystemExit, match=f"error: {sentence}"):
            tables.main()


def test_the_heads_that_stay_are_told_of_rows_that_know_them(tmp_path, monkeypatch):
    """The committed rows were written before."""
    monkeypatch.setattr(tables, "plot_runs", lambda *args: None)
    sweep, out, cell = tmp_path / "sweep", tmp_path / "out", "ui-strings-heads4-seed1-head_sensitivity-from-the-start"
    run = sweep / "runs" / cell
    run.mkdir(parents=True)
    kept = {
        "decoder.layers.1.encoder_attn": [0, 3],
        "decoder.layers.0.self_attn": [],
        "encoder.layers.0.self_attn": [2],
    }
    (run / "pruning.json").write_text(json.dumps({"method": "given", "kept_heads_by_site": kept}))
    plan = {each.name: "\n".join(each.lines) for each in tables.asked("heads")[0].cells(sweep)}
    row = {"cell": cell, "task": "ui-strings", "heads": "4", "seed": "1", "score": "31.5", "heads_kept": "3"}
    row |= {"method": "head_sensitivity, from the start", "commands": plan[cell]}
    with (sweep / "results.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(row))
        writer.writeheader()
        writer.writerow(row)
    out.mkdir()
    before = tables.read_rows(tables.STORED / "heads.csv")
    tables.write_rows(before, out / "heads.csv")
    tables.take("heads", [sweep], out)
    after = {each["cell"]: each for each in tables.read_rows(out / "heads.csv")}
    assert after.keys() == {each["cell"] for each in before} | {cell}
    assert after[cell]["heads_by_site"] == "decoder.layers.1.encoder_attn:2 encoder.layers.0.self_attn:1"
    assert after[cell]["heads_that_stay"] == "decoder.layers.1.encoder_attn:0,3 encoder.layers.0.self_attn:2"
    rows = json.loads((out / "heads.json").read_text())["rows"]
    told = [each for each in rows if each["method"] == row["method"]]
    assert [each["heads_that_stay"] for each in told] == [{site: heads for site, heads in kept.items() if heads}]
    assert [each for each in rows if each not in told] == json.loads((tables.STORED / "heads.json").read_text())[
        "rows"
    ]
    assert "| head_sensitivity, from the start |" in (out / "heads.md").read_text()


def test_the_mask_that_a_run_chose_is_trained_from_the_start():
    """In the translations, where others are above it, and in one encoder; with the seed and the heads of the run."""
    cells = {cell.name: cell for cell in tables.asked("heads")[0].cells(Path("DIR"))}
    found = {name: cell for name, cell in cells.items() if cell.values["method"].endswith("from the start")}
    assert {cell.values["task"] for cell in found.values()} == {"ui-strings", "multi30k", "sst-2"}
    for name, cell in found.items():
        chose = name.removesuffix("-from-the-start")
        assert chose in cell.after and f"DIR/runs/{chose}/{MASKS_FILE}" in cell.lines[0].split()


def test_a_sweep_in_another_setting_is_refused():
    recorded = {"updates": "2000", "warmup": "400", "short": "260", "cooldown": "200"}
    for given, own, other in (
        ({}, "translation", "translation-recorded"),
        (recorded, "translation-recorded", "translation"),
    ):
        plan = read_plan(tables.PLANS / "translation.yaml", {"binary": "b", **given})
        rows = [{"cell": cell.name, "commands": "\n".join(cell.lines)} for cell in plan.cells(Path("sweep"))]
        tables.check_commands(own, rows)
        with pytest.raises(HeadPruningError, match="was measured by other commands than those of the plan"):
            tables.check_commands(other, rows)


def test_tables_that_are_not_there(tmp_path):
    with pytest.raises(HeadPruningError, match="There is no plan glu, only glue, gpp_glue"):
        tables.asked("glu")
    with pytest.raises(HeadPruningError, match="The plan translation has no table translation-small"):
        tables.asked("translation-small")
    with pytest.raises(HeadPruningError, match="cannot be read .*; run the sweep first"):
        tables.read_rows(Path(tmp_path / "none.csv"))
