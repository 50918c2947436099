"""Sweeps: which cells a plan has, that they are run once and none is lost, what they leave together."""

import contextlib
import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from head_pruning import HeadPruningError
from head_pruning.cli import main
from head_pruning.files import read_json
from head_pruning.report.runs import find_runs
from head_pruning.sweep import cell as cell_module
from head_pruning.sweep.cell import Job, run_job
from head_pruning.sweep.launchers import open_launcher
from head_pruning.sweep.plan import Cell, read_plan
from head_pruning.sweep.results import rows
from head_pruning.sweep.runner import run_cells
from head_pruning.yaml_text import parse_yaml

# Leaves what a run leaves; counts how often it ran; waits for a file, or fails, where it is told to.
PROGRAM = """
import json, os, pathlib, sys, time
out, heads, seed, *more = sys.argv[1:]
with open("ran.txt", "a") as log:
    log.write(f"{pathlib.Path(out).name} {os.environ['OMP_NUM_THREADS']} {os.environ.get('WORD')} {os.getpid()}\\n")
if "fail" in more:
    print("the last line before the end")
    sys.exit("it broke")
if "wait" in more:
    deadline = time.monotonic() + 30
    while not os.path.exists("go") and time.monotonic() < deadline:
        time.sleep(0.02)
    if not os.path.exists("go"):
        sys.exit("nobody said go")
result = {"eval_accuracy": 0.5 + int(heads) / 100, "heads_kept": int(heads), "heads_total": 72}
pathlib.Path(out, "all_results.json").write_text(json.dumps(result))
print("BLEU = ", int(heads) / 2)
"""
PLAN = {
    "command": "python program.py {out} {method}",
    "grid": {
        "seed": {"from": 1, "to": 2},
        "heads": [36, 18],
        "method": {"dense": "72 {seed}", "dsp": "{heads} {seed}"},
    },
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("program.py").write_text(PROGRAM)
    return tmp_path


def write_plan(**changes) -> None:
    Path("plan.yaml").write_text(yaml.safe_dump({**PLAN, **changes}, sort_keys=False))


def names(**changes) -> list[str]:
    write_plan(**changes)
    return [cell.name for cell in read_plan("plan.yaml").cells(Path("w"))]


def ran() -> list[str]:
    return [line.split()[0] for line in Path("ran.txt").read_text().splitlines()] if Path("ran.txt").exists() else []


# -- plans -----------------------------------------------------------------------------------------------------------


def test_values_that_a_command_does_not_use_tell_no_cells_apart(here):
    every = ["seed1-dense", "seed1-heads36-dsp", "seed1-heads18-dsp"]
    assert names() == [*every, *(name.replace("seed1", "seed2") for name in every)]
    assert names(exclude=[{"method": "dense"}, {"seed": 2, "heads": [18, 9]}]) == [
        "seed1-heads36-dsp", "seed1-heads18-dsp", "seed2-heads36-dsp",
    ]  # fmt: skip
    assert names(exclude=[{"seed": 2}], include=[{"seed": [7, 8], "method": "dense"}])[-2:] == [
        "seed7-dense", "seed8-dense",
    ]  # fmt: skip
    # What is included is there also where the grid has lost it.
    assert names(exclude=[{"seed": [1, 2]}], include=[{"seed": 2, "method": "dense"}]) == ["seed2-dense"]
    assert names(grid={}, command="python program.py {out} 1 1") == ["cell"]
    assert names(grid={"rate": [1e-4, "low er"]}, command="a {out} {rate}") == ["rate0.0001", "low-er"]
    steps = {"x": {"from": 0, "to": 1, "step": 0.5}}
    assert names(grid=steps, command="a {out} {x}") == ["x0.0", "x0.5", "x1.0"]


def test_values_have_words_for_several_places(here):
    write_plan(
        command=["{method.first}", "run.{task.script} {task} {out} --rate {method.rate} {method.more} {model}"],
        set={"model": None, "rate": 1.5},
        grid={
            "task": {"a b": {"script": "one", "last": 3}, "c": {"script": "two", "last": "{seed}"}},
            "method": {
                "dense": {"rate": "{rate}"},
                "cut it": {"rate": 1, "first": "find {out[method=dense]}/x", "more": "--last {task.last} --y 'z z'"},
            },
            "seed": [1, 2],
        },
    )
    given = {"model": "my {seed} folder"}
    cells = {cell.name: cell for cell in read_plan("plan.yaml", given).cells(Path("w"))}
    assert {name: cell.lines for name, cell in cells.items()} == {
        "a-b-dense": ["run.one 'a b' w/runs/a-b-dense --rate 1.5 'my {seed} folder'"],
        "a-b-cut-it": [
            "find w/runs/a-b-dense/x",
            "run.one 'a b' w/runs/a-b-cut-it --rate 1 --last 3 --y 'z z' 'my {seed} folder'",
        ],
        "c-dense": ["run.two c w/runs/c-dense --rate 1.5 'my {seed} folder'"],
        **{
            f"c-cut-it-seed{n}": [
                "find w/runs/c-dense/x",
                f"run.two c w/runs/c-cut-it-seed{n} --rate 1 --last {n} --y 'z z' 'my {{seed}} folder'",
            ]
            for n in (1, 2)
        },
    }
    assert cells["a-b-cut-it"].after == ("a-b-dense",)
    # Nothing leaves no word where it stands alone.
    cells = read_plan("plan.yaml", {"model": "", "rate": "0.5"}).cells(Path("w"))
    assert cells[0].lines == ["run.one 'a b' w/runs/a-b-dense --rate 0.5"]


def test_what_is_to_be_given(here, capsys):
    write_plan(command="python program.py {out} {heads} {seed} {model} {data}", set={"model": None, "data": None},
               grid={"heads": [1], "seed": [1]})  # fmt: skip
    with pytest.raises(SystemExit, match="does not say what data is; add --set data=..."):
        main(["sweep", "plan.yaml", "--dry-run", "--set", "model=m"])
    with pytest.raises(SystemExit, match="--set mode is for nothing: plan.yaml asks for only model, data; correct it"):
        main(["sweep", "plan.yaml", "--dry-run", "--set", "mode=m"])
    with pytest.raises(SystemExit, match="--set model has no value; write it as NAME=VALUE"):
        main(["sweep", "plan.yaml", "--dry-run", "--set", "model"])
    main(["sweep", "plan.yaml", "--dry-run", "--set", "model=m=1", "--set", "data=a b"])
    assert capsys.readouterr().out.endswith("heads1-seed1 1 1 m=1 'a b'\n")


def test_a_cell_starts_from_the_folder_of_another(here):
    write_plan(grid={**PLAN["grid"], "method": {"dense": "72 {seed}", "cut": "{heads} {seed} {out[method=dense]}"}})
    cells = {cell.name: cell for cell in read_plan("plan.yaml").cells(Path("w"))}
    cell = cells["seed2-heads18-cut"]
    assert cell.after == ("seed2-dense",)
    assert cell.lines == ["python program.py w/runs/seed2-heads18-cut 18 2 w/runs/seed2-dense"]
    # What it starts from depends on the seed, so it does too.
    found = names(grid={"seed": [1, 2], "method": {"dense": "72 {seed}", "cut": "9 0 {out[method=dense]}"}})
    assert found == ["seed1-dense", "seed1-cut", "seed2-dense", "seed2-cut"]


@pytest.mark.parametrize("changes, words", [
    ({"grid": {"seed": []}}, "seed of its grid has no values"),
    ({"command": "python program.py"}, "has no {out}"),
    ({"command": "x {out} {size} {method}"}, "has a place for size"),
    ({"command": "x {out} {seed[a=1]} {method}"}, "only out takes"),
    ({"command": "x {out} {out[method=sparse]} {method}"}, "no cell with method=sparse"),
    ({"command": "x {out} {out[seed=1]} {method}"}, "starts from itself"),
    ({"command": "x {out} {out[method=dense]} {method}"}, "starts from itself"),
    ({"exclude": [{"method": "dense"}], "command": "x {out} {method} {heads}", "grid": {
        "heads": [1], "method": {"dense": "", "cut": "{out[method=dense]}"}}}, "which the plan leaves out"),
    ({"grid": {"a": {"from": 3, "to": 1}}}, "from 3 to 1"),
    ({"grid": {"a": ["x y", "x-y"]}, "command": "x {out} {a}"}, "Two cells of the plan are called x-y"),
    ({"measure": ["weight"]}, "weight cannot be measured"),
    ({"unfinished": "drop"}, "not restart or continue"),
    ({"score_pattern": "BLEU"}, "not one pattern"),
    ({"score_pattern": "("}, "not one pattern"),
    ({"threads": 0}, "threads"),
    ({"treads": 1}, "it has treads, but there is only command, grid"),
    ({"grid": {**PLAN["grid"], "sede": [1, 2]}}, "its grid has sede, but its command has no {sede}"),
    ({"include": [{"method": "dense", "size": 3}]}, "its include has size, but"),
    ({"include": [{"method": "dens", "seed": 3}]}, "its include has the method dens, of which its grid has no words"),
    ({"exclude": [{"method": "dense"}, {"method": "dps", "seed": [1, 3]}]}, "excludes method=dps, seed=1 or 3, which"),
    ({"search": {"heads": {"low": 1, "high": 2}, "x": {"low": 1, "high": 2}}}, "its search has x, but its command"),
    ({"search": {"heads": {"low": 2, "high": 1}}}, "heads of its search goes from 2 to 1; the first must be lower"),
    ({"search": {"heads": {"low": 0, "high": 1, "log": True}}}, "above 0 for log"),
    ({"search": {"heads": {"low": 0.5, "high": 1, "whole": True}}}, "is whole, but goes from 0.5 to 1"),
    ({"search": {"heads": {"low": 1, "high": 2}}, "aim": {"heads": 3}}, "its search looks for heads, which it"),
    ({"search": {"heads": {"low": 1, "high": 2}}, "measure": ["heads"]}, "its search looks for score"),
    ({"grid": {"a": ["x" * 201]}, "command": "x {out} {a}"}, "names that are too long"),
    ({"grid": {"a": {"x": {"b": 1}}}, "command": "x {out} {a.c}"}, "has {a.c}, but no value of its a has c"),
    ({"grid": {"a": {"x": {"b": 1, "c": 2}}}, "command": "x {out} {a.c}"}, "its a has b, but its command has no"),
    ({"grid": {"a": {"x": {"b": 1}, "y": ""}}, "command": "x {out} {a.b}"}, "a of its grid has words for some values"),
    ({"grid": {"a": {"x": {"b": "{out}"}, "y": {}}}, "command": "{a.b}"}, "The cell y has no command"),
    ({"set": {"a": 1}}, "its set has a, but its command has no {a}"),
    ({"set": {"seed": 1}}, "its set has seed, which something else is called too"),
])  # fmt: skip
def test_plans_that_cannot_be_run(here, changes, words):
    write_plan(**changes)
    with pytest.raises(HeadPruningError) as error:
        read_plan("plan.yaml").cells(Path("w"))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_name_that_comes_twice_is_refused(here):
    """YAML's libraries keep the last one; a merge may be overruled, also where it is merged on before it is read."""
    Path("plan.yaml").write_text("command: x {out} {a}\ngrid:\n  a: [1, 2]\n  'a': [3]\n")
    with pytest.raises(
        HeadPruningError, match=r"plan.yaml is no plan of a sweep \(line 4 has a for the second time\)"
    ):
        read_plan("plan.yaml")
    Path("plan.yaml").write_text(
        "x-deep: {first: &first {a: [1, 2], b: [5]}, second: &second {<<: *first, a: [3]}}\n"
        "command: x {out} {a} {b}\ngrid: {<<: *second, b: [6]}\n"
    )
    assert [cell.name for cell in read_plan("plan.yaml").cells(Path("w"))] == ["a3-b6"]
    plans = sorted((Path(__file__).parents[3] / "benchmarks" / "plans").glob("*.yaml"))
    assert plans and all(parse_yaml(plan.read_text(encoding="utf-8"))["command"] for plan in plans)


@pytest.mark.parametrize("text", ["[" * 2000, "a: [", "a: 2024-99-99", "a: !!python/object:os.x {}", "\0", "{[1]: 2}"])
def test_a_text_that_is_no_yaml(here, text):
    Path("plan.yaml").write_text(text)
    with pytest.raises(HeadPruningError, match="is no plan of a sweep"):
        read_plan("plan.yaml")


def test_a_cell_lies_inside_of_its_sweep(here):
    assert names(grid={"a": [".."]}, command="x {out} {a}") == ["cell"]


def test_numbers_are_read_as_python_reads_them(here):
    Path("plan.yaml").write_text("command: x {out} {a}\ngrid: {a: [1e-4, 2e3, 12, -1e5]}\n")
    assert list(read_plan("plan.yaml").axes["a"]) == [1e-4, 2000.0, 12, -1e5]


# -- running ---------------------------------------------------------------------------------------------------------


def test_a_dry_run_runs_nothing(here, capsys):
    write_plan()
    main(["sweep", "plan.yaml", "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12 and lines[2:4] == [
        "seed1-heads36-dsp", "    python program.py plan-sweep/runs/seed1-heads36-dsp 36 1",
    ]  # fmt: skip
    assert sorted(path.name for path in here.iterdir()) == ["plan.yaml", "program.py"]


def test_a_sweep_with_a_cell_that_fails(here, capsys):
    method = {"dense": "72 {seed}", "bad": "{heads} {seed} fail", "after": "5 {seed} {out[method=bad]}"}
    write_plan(grid={"seed": [1], "heads": [9], "method": method}, env={"WORD": "yes"}, threads=3)
    with pytest.raises(SystemExit) as error:
        main(["sweep", "plan.yaml", "--jobs", "2", "--parquet"])
    assert str(error.value) == (
        "error: 1 of the cells failed (seed1-heads9-bad); seed1-heads9-after start from cells that were not measured; "
        "see above for the cause."
    )
    printed = capsys.readouterr()
    assert "0 of 3 cells are finished" in printed.out
    assert "status 1; its log" in printed.out and "    the last line before the end\n    it broke" in printed.out
    assert sorted(line.rpartition(" ")[0] for line in Path("ran.txt").read_text().splitlines()) == [
        "seed1-dense 3 yes", "seed1-heads9-bad 3 yes",
    ]  # fmt: skip
    main(["sweep", "show", "plan.yaml"])
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in shown[:-1]] == [
        ["seed1-dense", "finished"], ["seed1-heads9-bad", "failed"], ["seed1-heads9-after", "waiting"],
    ]  # fmt: skip
    assert shown[-1] == "1 finished, 1 failed, 1 waiting"
    # Mended, it is run again, and what starts from it; what is finished is not.
    Path("program.py").write_text(PROGRAM.replace('if "fail"', 'if "never"'))
    main(["sweep", "plan.yaml"])
    assert sorted(ran()) == ["seed1-dense", *["seed1-heads9-after"], *["seed1-heads9-bad"] * 2]
    with open("plan-sweep/results.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["cell"], row["heads"], row["heads_kept"]) for row in rows] == [
        ("seed1-dense", "", "72"), ("seed1-heads9-bad", "9", "9"), ("seed1-heads9-after", "9", "5"),
    ]  # fmt: skip
    assert float(rows[0]["score"]) == 0.5 + 72 / 100 and rows[0]["score_name"] == "eval_accuracy"
    assert not list(Path("plan-sweep/failed").iterdir())


def test_parquet_holds_what_csv_holds(here):
    parquet = pytest.importorskip("pyarrow.parquet")
    write_plan(grid={"seed": [1, "two"]}, command="python program.py {out} 3 {seed}")
    main(["sweep", "plan.yaml", "--parquet", "--out", "w"])
    assert parquet.read_table("w/results.parquet").to_pydict()["seed"] == ["1", "two"]


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_sweep_that_is_killed_goes_on(here, kill):
    """Two cells run when it is killed, one is finished: this one is not repeated, and none of the others is lost."""
    method = {"first": "9 {seed}", "long": "18 {seed} wait"}
    write_plan(grid={"method": method, "seed": [1, 2]}, exclude=[{"method": "first", "seed": 2}])
    words = ["sweep", "plan.yaml", "--jobs", "2"]
    sweep = os.fork()
    if not sweep:  # the sweep, which nothing of this process's tests may outlive
        try:
            with open("log.txt", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                main(words)
        finally:
            os._exit(9)
    deadline = time.monotonic() + 60
    while len(ran()) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(sweep, kill)
    os.waitpid(sweep, 0)
    assert sorted(ran()) == ["first-seed1", "long-seed1", "long-seed2"], Path("log.txt").read_text()
    assert [path.name for path in Path("plan-sweep/cells").iterdir()] == ["first-seed1.json"]
    assert not list(Path("plan-sweep").glob("failed/*"))
    # A sweep that had no time to end its cells leaves them running; they are ended before they run again.
    cells = [int(line.split()[-1]) for line in Path("ran.txt").read_text().splitlines() if "long" in line]
    assert all(Path(f"/proc/{pid}/cwd").exists() == (kill == signal.SIGKILL) for pid in cells)
    Path("program.py").write_text(PROGRAM.replace('if "wait"', 'if "never"'))
    main(words)
    assert not any(Path(f"/proc/{pid}/cwd").exists() for pid in cells)
    assert sorted(ran()) == ["first-seed1", *["long-seed1"] * 2, *["long-seed2"] * 2]
    assert len(list(Path("plan-sweep/cells").iterdir())) == 3
    main(words)
    assert len(ran()) == 5


def test_cells_that_were_measured_otherwise_are_not_mixed_in(here):
    write_plan(grid={"seed": [1]}, command="python program.py {out} 3 {seed}")
    main(["sweep", "plan.yaml"])
    write_plan(grid={"seed": [1]}, command="python program.py {out} 4 {seed}")
    with pytest.raises(SystemExit, match="seed1.json was measured with other commands than the plan's; delete it"):
        main(["sweep", "plan.yaml"])
    assert ran() == ["seed1"]


def test_cells_lack_nothing_that_is_measured_later(here):
    write_plan(grid={"seed": [1]}, command="python program.py {out} 3 {seed}", measure=["score"])
    main(["sweep", "plan.yaml"])
    write_plan(grid={"seed": [1]}, command="python program.py {out} 3 {seed}", measure=["heads"])
    with pytest.raises(SystemExit, match="seed1.json was measured without heads; delete it to run the cell again"):
        main(["sweep", "plan.yaml"])


def test_a_part_of_a_sweep_heeds_the_rest(here):
    """A cell that others start from keeps its model, and they wait for it, although they are left out."""
    method = {"dense": "9 {seed}", "cut": "5 {seed} {out[method=dense]}"}
    write_plan(grid={"seed": [1], "method": method}, keep_models=False)
    with pytest.raises(SystemExit, match="seed1-cut start from cells that were not measured; run those too"):
        main(["sweep", "plan.yaml", "--only", "cut"])
    assert ran() == []
    Path("program.py").write_text(PROGRAM + "pathlib.Path(out, 'pytorch_model.bin').write_text('x')\n")
    main(["sweep", "plan.yaml", "--only", "dense"])
    main(["sweep", "plan.yaml", "--only", "cut"])
    assert [path.parent.name for path in Path("plan-sweep").rglob("pytorch_model.bin")] == ["seed1-dense"]
    with open("plan-sweep/results.csv", encoding="utf-8", newline="") as stream:
        assert [row["cell"] for row in csv.DictReader(stream)] == ["seed1-dense", "seed1-cut"]


def test_models_outside_the_sweep_stay(here):
    Path("elsewhere").mkdir()
    Path("elsewhere/pytorch_model.bin").write_text("x")
    linked = "import os\nos.symlink(pathlib.Path('elsewhere').resolve(), pathlib.Path(out, 'start'))\n"
    Path("program.py").write_text(PROGRAM + linked + "pathlib.Path(out, 'pytorch_model.bin').write_text('x')\n")
    write_plan(grid={"seed": [1]}, command="python program.py {out} 3 {seed}", keep_models=False)
    main(["sweep", "plan.yaml"])
    assert [str(path) for path in Path().rglob("pytorch_model.bin")] == ["elsewhere/pytorch_model.bin"]


def test_checkpoints_go_with_the_models_and_masks_stay(here):
    """Other cells train what a mask leaves."""
    saved = ["checkpoint-3/optimizer.pt", "checkpoint_1_3.pt", "checkpoint_last.pt", "keep/pytorch_model.bin"]
    saved += ["masks.safetensors"]
    lines = [f"path = pathlib.Path(out, {n!r}); path.parent.mkdir(exist_ok=True); path.write_text('x')" for n in saved]
    Path("program.py").write_text(PROGRAM + "\n".join([*lines, ""]))
    write_plan(grid={"seed": [1]}, command="python program.py {out} 3 {seed}", keep_models=False)
    main(["sweep", "plan.yaml"])
    left = [path.name for path in Path("plan-sweep/runs").rglob("*") if path.is_file()]
    assert sorted(left) == ["all_results.json", "masks.safetensors"]


@pytest.mark.parametrize(
    "change, name",
    [({"score": "heads_kept"}, "score"), ({"env": {"WORD": "b"}}, "env"), ({"score_pattern": "(1)"}, "score_pattern")],
)
def test_cells_of_other_settings_are_not_mixed_in(here, change, name):
    plan = {"grid": {"seed": [1]}, "command": "python program.py {out} 3 {seed}", "env": {"WORD": "a"}}
    write_plan(**plan)
    main(["sweep", "plan.yaml"])
    main(["sweep", "plan.yaml", "--threads", "2"])  # what is not timed does not depend on them
    write_plan(**{**plan, **change})
    with pytest.raises(SystemExit, match=f"seed1.json was measured with another {name} than the plan's; delete it"):
        main(["sweep", "plan.yaml"])
    assert ran() == ["seed1"]


def test_a_benchmark_that_measures_nothing_is_refused(here):
    write_plan(grid={"seed": [1]}, command="python program.py {out} 3 {seed}", benchmark="--batch 8")
    with pytest.raises(SystemExit, match="benchmark is for none of what it measures; measure one of latency"):
        main(["sweep", "plan.yaml", "--dry-run"])


def test_a_search_does_not_go_on_from_cells_of_a_grid(here):
    write_plan(grid={"seed": [1]}, command="python program.py {out} 3 {seed}")
    main(["sweep", "plan.yaml"])
    write_plan(grid={"seed": [1]}, command="python program.py {out} {n} {seed}", search={"n": {"low": 1, "high": 2}})
    with pytest.raises(SystemExit, match="holds the cell seed1, which is none of this search; choose another --out"):
        main(["sweep", "plan.yaml", "--optuna", "1"])
    with pytest.raises(SystemExit, match="The plan is a search for n; say with --optuna N how many cells to measure"):
        main(["sweep", "plan.yaml"])


@pytest.mark.parametrize("flags, words", [
    (["--jobs", "-1"], "--jobs is -1; give 0 or more"),
    (["--threads", "0"], "--threads is 0; give 1 or more"),
    (["--optuna", "0"], "--optuna is 0; give 1 or more"),
    (["--only", "("], "--only is no regular expression"),
    (["--launcher-option", "a=["], "--launcher-option a=[ has no value of YAML (while parsing a flow"),
    (["--launcher-option", "a"], "--launcher-option a has no value; write it as NAME=VALUE"),
    (["--optuna", "3", "--dry-run"], "--dry-run is about the cells of a grid, which --optuna has not"),
    (["--optuna", "3", "--only", "a"], "--only is about"),
    (["--optuna", "3", "--parquet"], "--parquet is about"),
    (["show", "--optuna", "3"], "show is about"),
])  # fmt: skip
def test_flags_that_cannot_be(here, flags, words):
    write_plan()
    with pytest.raises(SystemExit, match=re.escape(words)):
        main(["sweep", *[flag for flag in flags if flag == "show"], "plan.yaml", *[f for f in flags if f != "show"]])
    assert ran() == [] and not Path("plan-sweep").exists()


def test_columns_of_the_plan_and_of_what_was_measured_stay_apart():
    found = {"name": "a", "values": {"density": 0.1, "seed": 1}, "numbers": {"density": 0.105}, "score_name": "",
             "seconds": 1, "commands": ["x"]}  # fmt: skip
    (row,) = rows([found])
    assert (row["plan_density"], row["density"], row["seed"]) == (0.1, 0.105, 1)


def job(here, command: str, **options) -> Job:
    words = command.replace("OUT", "w/runs/c").split()
    return Job(Cell("c", {}, (tuple(words),)), here / "w", here, **options)


def test_what_is_measured(here):
    pattern = r"BLEU =\s+([\d.]+)"
    found = run_job(job(here, "python program.py OUT 18 1", score_pattern=pattern, measure=("score",)))
    assert found["numbers"] == {"score": 9.0}
    assert run_job(job(here, "true", score_pattern=pattern))["error"].endswith("delete it to run the cell again, or "
        "choose another --out.")  # fmt: skip
    Path("w/cells/c.json").unlink()
    assert "has no number" in run_job(job(here, "true", score_pattern=pattern))["error"]
    broken = run_job(job(here, "echo loss nan", score_pattern="loss (.*)"))["error"]
    assert "is nan: its training came to nothing" in broken and read_json("w/failed/c.json")["error"] == broken
    assert "left neither all_results.json" in run_job(job(here, "true"))["error"]
    assert "no_such_program cannot be started" in run_job(job(here, "no_such_program"))["error"]
    mixed = {"scores": ("eval_f1+heads_kept", "eval_accuracy+heads_kept"), "score_pattern": "no (x)"}
    both = run_job(job(here, "python program.py OUT 18 1", **mixed))
    assert (both["score_name"], both["numbers"]["score"]) == ("eval_accuracy+heads_kept", (0.5 + 0.18 + 18) / 2)
    Path("w/cells/c.json").unlink()
    error = run_job(job(here, "python program.py OUT 18 1", scores=("eval_f1",)))["error"]
    assert "has no eval_f1; name one of its entries" in error
    assert read_json("w/failed/c.json")["error"] == error


@pytest.mark.parametrize("given", [{"eval_accuracy": float("nan"), "eval_loss": float("nan")},
                                   {"eval_accuracy": float("inf"), "eval_loss": 0.7}])  # fmt: skip
def test_a_score_that_is_not_finite_is_a_failure(here, given):
    """Nor does the loss stand in for it; what does not measure the score does not mind."""
    Path("nan.py").write_text(
        f"import json, pathlib, sys\ntext = {json.dumps(json.dumps({**given, 'heads_kept': 3}))}\n"
        "pathlib.Path(sys.argv[1], 'all_results.json').write_text(text)\nprint('BLEU = 9.0')\n"
    )
    for options in ({}, {"scores": ("eval_f1", "eval_accuracy+heads_kept", "eval_loss")}):
        error = run_job(job(here, "python nan.py OUT", **options))["error"]
        assert "is not finite: its training came to nothing" in error and "its eval_accuracy" in error.lower()
    assert not Path("w/cells/c.json").exists() and Path("w/failed/c.json").exists()
    (run,) = find_runs(["w/runs/c"])
    assert (run.score_name, run.score) == ("eval_accuracy", None)
    with pytest.raises(HeadPruningError, match="No run has a finite eval_accuracy"):
        find_runs(["w/runs/c"], "eval_accuracy")
    assert run_job(job(here, "python nan.py OUT", score_pattern="BLEU = (.*)"))["numbers"]["score"] == 9.0
    Path("w/cells/c.json").unlink()
    assert run_job(job(here, "python nan.py OUT", measure=("heads",)))["numbers"] == {"heads_kept": 3}


def test_what_ran_well_is_not_run_again_to_be_measured(here):
    """Nor after its plan's pattern was corrected; with other commands, or once its folder is gone, it is."""
    command = "python program.py OUT 18 1"
    for _ in range(2):
        assert "has no number" in run_job(job(here, command, score_pattern="(x)"))["error"]
    found = run_job(job(here, command, score_pattern=r"BLEU =\s+([\d.]+)"))
    assert found["numbers"]["score"] == 9.0 and ran() == ["c"]
    assert [path.name for path in Path("w/runs/c").iterdir()] == ["all_results.json"]
    Path("w/cells/c.json").unlink()
    for again in (command, command, "python program.py OUT 20 1"):
        assert "has no number" in run_job(job(here, again, score_pattern="(x)"))["error"]
    shutil.rmtree("w/runs/c")
    assert "has no number" in run_job(job(here, again, score_pattern="(x)"))["error"]
    assert ran() == ["c"] * 4


def test_a_benchmark_is_told_the_folder_of_its_cell(here):
    write_plan(measure=["latency"], benchmark="--mask {out}/masks.safetensors")
    assert [cell.benchmark for cell in read_plan("plan.yaml").cells(Path("w"))][0] == (
        "--mask",
        f"w/runs/{names(measure=['latency'])[0]}/masks.safetensors",
    )


def test_a_report_shows_the_benchmark_that_ran(here, monkeypatch):
    """A cell is known by the plan's words all the same, which do not name its model."""
    ran = []

    def call(job, words, lock, stdout, stderr=None):
        ran.append(shlex.join(words))
        Path("w/runs/c/all_results.json").write_text('{"eval_accuracy": 0.5}')
        return json.dumps({"models": [{"latency_ms": 2.0}]})

    monkeypatch.setattr(cell_module, "_call", call)
    cell = Cell("c", {}, (("train",),), benchmark=("--rounds", "1"))
    job = Job(cell, here / "w", here, measure=("score", "latency"), threads=2)
    assert run_job(job)["commands"] == job.cell.lines == ["train", "head-pruning benchmark --rounds 1"]
    (run,) = find_runs(["w"])
    timed = f"python -m head_pruning.cli benchmark {here}/w/runs/c --json --threads 2 --rounds 1"
    assert list(run.commands) == ran == ["train", timed] and job.finished()


def test_models_without_a_score_have_rows_where_none_is_measured(here):
    Path("w/runs/c/sizes/heads3").mkdir(parents=True)
    Path("w/runs/c/sizes/heads3/all_results.json").write_text('{"heads_kept": 3}')
    found = run_job(job(here, "python program.py OUT 18 1", go_on=True, measure=("heads",)))
    assert [(each["folder"], each["numbers"]) for each in found["more"]] == [("sizes/heads3", {"heads_kept": 3})]


def test_a_model_is_removed_once_it_is_measured(here):
    import torch
    from safetensors.torch import save_file

    Path("w/runs/c").mkdir(parents=True)
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5)}, "w/runs/c/model.safetensors")
    size = Path("w/runs/c/model.safetensors").stat().st_size
    options = {"go_on": True, "keep_model": False, "measure": ("parameters", "file_size")}
    found = run_job(job(here, "python program.py OUT 18 1", **options))
    assert found["numbers"] == {"parameters": 17, "file_bytes": size}
    assert [path.name for path in Path("w/runs/c").iterdir()] == ["all_results.json"]


def test_each_model_that_a_cell_leaves_is_measured(here):
    import torch
    from safetensors.torch import save_file

    for name in ("small", "medium"):
        Path("w/runs/c", name).mkdir(parents=True)
        save_file({"a": torch.zeros(3)}, f"w/runs/c/{name}/model.safetensors")
        result = {"eval_accuracy": len(name), "heads_kept": 3, "other": 1}
        Path("w/runs/c", name, "all_results.json").write_text(json.dumps(result))
    Path("w/runs/c/none").mkdir()
    found = run_job(job(here, "python program.py OUT 18 1", go_on=True, keep_model=False, measure=("score", "heads")))
    assert found["more"] == [
        {"folder": name, "score_name": "eval_accuracy", "numbers": {"heads_kept": 3, "score": len(name)}}
        for name in ("medium", "small")
    ]
    flat = rows([found])
    assert [(row["cell"], row["score"]) for row in flat] == [("c", 0.5 + 0.18), ("c/medium", 6), ("c/small", 5)]
    assert not list(Path("w").rglob("*.safetensors"))
    shown = {run.name: run.numbers for run in find_runs(["w"])}
    assert list(shown) == ["c", "c/medium", "c/small"]
    shutil.rmtree("w/runs")  # the cells alone tell as much
    assert {run.name: run.numbers for run in find_runs(["w"])} == shown


def test_gpus_are_shared_out(here, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    left = "{'gpu': int(os.environ['CUDA_VISIBLE_DEVICES'])}"
    program = f"import json, os, sys; json.dump({left}, open(sys.argv[1] + '/all_results.json', 'w'))"
    Path("gpu.py").write_text(program)
    with open_launcher("local", jobs=9, threads=1, gpus=1) as (launch, jobs, _):
        assert jobs == 3
        launch(job(here, "python gpu.py OUT"))
    assert json.loads(Path("w/runs/c/all_results.json").read_text()) == {"gpu": 4}
    with pytest.raises(HeadPruningError, match="needs 4 GPUs, and 3 are here"):
        with open_launcher("local", jobs=0, threads=1, gpus=4):
            pass


@pytest.mark.slow
def test_a_node_of_a_ray_cluster_that_is_lost(here, monkeypatch):
    """Each of two nodes runs a cell when one of them is killed; its cell is run again on the other."""
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "240")
    ray = pytest.importorskip("ray", reason="ray is not installed")
    from ray.cluster_utils import Cluster

    patient = {"health_check_timeout_ms": 60_000, "agent_register_timeout_ms": 240_000}  # a busy machine is slow
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": patient})
    lost = cluster.add_node(num_cpus=1)
    write_plan(grid={"seed": [1, 2]}, command="python program.py {out} {seed}3 {seed} wait")

    def kill() -> None:
        deadline = time.monotonic() + 240
        while len(ran()) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        cluster.remove_node(lost, allow_graceful=False)
        while sum(node["Alive"] for node in ray.nodes()) > 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        Path("go").touch()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        main(["sweep", "plan.yaml", "--launcher", "ray", "--launcher-option", f"address={cluster.address}"])
    finally:
        killer.join()
        cluster.shutdown()
    assert sorted(set(ran())) == ["seed1", "seed2"] and len(ran()) == 3
    assert sorted(path.stem for path in Path("plan-sweep/cells").iterdir()) == ["seed1", "seed2"]


@pytest.mark.slow
def test_a_cell_whose_process_is_lost_every_time_fails(here, capsys):
    pytest.importorskip("ray", reason="ray is not installed")
    Path("kill.py").write_text(
        "import os, signal\nopen('ran.txt', 'a').write('x\\n')\nos.kill(os.getppid(), signal.SIGKILL)\n"
    )
    write_plan(grid={"seed": [1]}, command="python kill.py {out} {seed}")
    words = ["--launcher-option", "address=local", "--launcher-option", "num_cpus=1"]
    with pytest.raises(SystemExit, match="1 of the cells failed"):
        main(["sweep", "plan.yaml", "--launcher", "ray", *words])
    assert len(ran()) == 4 and "its process was lost, and so in 3 further tries" in capsys.readouterr().out


def test_slurm_through_submitit(here, monkeypatch):
    pytest.importorskip("submitit", reason="submitit is not installed")
    write_plan(grid={"seed": [1, 2]}, command="python program.py {out} {seed}3 {seed}")
    import submitit

    arrays = []
    submit = submitit.AutoExecutor.map_array
    monkeypatch.setattr(
        submitit.AutoExecutor, "map_array", lambda self, *args: arrays.append(args[1]) or submit(self, *args)
    )
    main(["sweep", "plan.yaml", "--launcher", "slurm", "--launcher-option", "cluster=local"])
    assert sorted(ran()) == ["seed1", "seed2"]
    assert [len(each) for each in arrays] == [2]


@pytest.mark.slow
@pytest.mark.parametrize("launcher, package, options", [
    ("slurm", "submitit", ["cluster=local"]), ("ray", "ray", ["address=local", "num_cpus=2"]),
])  # fmt: skip
def test_an_end_ends_what_runs_elsewhere(here, launcher, package, options):
    pytest.importorskip(package, reason=f"{package} is not installed")
    write_plan(grid={"seed": [1, 2]}, command="python program.py {out} 3 {seed} wait")
    words = ["sweep", "plan.yaml", "--launcher", launcher]
    words += [word for option in options for word in ("--launcher-option", option)]
    sweep = subprocess.Popen([sys.executable, "-m", "head_pruning.cli", *words], stdout=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while len(ran()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    cells = [int(line.split()[-1]) for line in Path("ran.txt").read_text().splitlines()]
    assert len(cells) == 2
    sweep.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    assert sweep.wait(60) == 128 + signal.SIGTERM and time.monotonic() - begin < 40
    assert not any(Path(f"/proc/{pid}/cwd").exists() for pid in cells)
    assert not list(Path("plan-sweep").glob("cells/*")) and not list(Path("plan-sweep").glob("failed/*"))


def test_launchers_that_are_not_there(here, monkeypatch):
    write_plan()
    for module, name in (("ray", "ray"), ("submitit", "slurm")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(SystemExit, match=rf"cannot be imported .*; pip install 'head-pruning\[{name}\]'"):
            main(["sweep", "plan.yaml", "--launcher", name])
    with pytest.raises(SystemExit, match="The local launcher has no option a; leave it out"):
        main(["sweep", "plan.yaml", "--launcher-option", "a=1"])


def test_a_search_goes_on_from_what_it_has_measured(here, capsys):
    pytest.importorskip("optuna", reason="optuna is not installed")
    write_plan(
        grid={"seed": [1]},
        command="python program.py {out} {heads} {seed}",
        search={"heads": {"low": 1, "high": 72, "whole": True}},
        aim={"heads_kept": 18},
    )
    main(["sweep", "plan.yaml", "--optuna", "3", "--jobs", "1"])
    first = ran()
    main(["sweep", "plan.yaml", "--optuna", "12", "--jobs", "2"])
    assert len(first) == 3 and ran()[:3] == first and len(list(Path("plan-sweep/cells").iterdir())) == 12
    assert len(set(ran())) == len(ran()) == 12 and not list(Path("plan-sweep/proposed").iterdir())
    with open("plan-sweep/results.csv", newline="") as stream:
        kept = [int(row["heads_kept"]) for row in csv.DictReader(stream)]
    best = min(kept, key=lambda heads: abs(heads - 18))
    assert f"The best of {len(kept)}: heads{best}-seed1" in capsys.readouterr().out.splitlines()[-1].replace(
        f"seed1-heads{best}", f"heads{best}-seed1"
    )
    write_plan(grid={"seed": [1, 2]}, command="python program.py {out} 3 {seed}")
    with pytest.raises(SystemExit, match="A search needs a grid with one cell, not 2"):
        main(["sweep", "plan.yaml", "--optuna", "3"])


def test_a_search_that_is_killed_goes_on(here, capsys):
    """What was running is run again before anything new, what was finished is not; of six values six are tried."""
    pytest.importorskip("optuna", reason="optuna is not installed")
    search = {"heads": {"low": 1, "high": 6, "whole": True}}
    command = "python program.py {out} {heads} {seed}"
    write_plan(grid={"seed": [1]}, command=command, search=search)
    main(["sweep", "plan.yaml", "--optuna", "2", "--jobs", "1"])
    finished = ran()
    Path("program.py").write_text(PROGRAM.replace('if "wait" in more', "if True"))  # cells wait
    child = os.fork()
    if not child:
        try:
            with open("log.txt", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                main(["sweep", "plan.yaml", "--optuna", "6", "--jobs", "2"])
        finally:
            os._exit(9)
    deadline = time.monotonic() + 60
    while len(ran()) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    orphans = ran()[2:]
    assert sorted(path.stem for path in Path("plan-sweep/proposed").iterdir()) == sorted(orphans) and len(orphans) == 2
    Path("program.py").write_text(PROGRAM)
    main(["sweep", "plan.yaml", "--optuna", "9", "--jobs", "1"])
    again = ran()[4:]
    assert sorted(again[:2]) == sorted(orphans) and len(again) == 4
    assert len({*finished, *again}) == len(list(Path("plan-sweep/cells").iterdir())) == 6
    assert "only 6 of 9: nothing else is proposed" in capsys.readouterr().out


# -- the runner ------------------------------------------------------------------------------------------------------


def test_cells_wait_for_what_they_start_from_and_failures_come_last():
    cells = [Cell(name, {}, ()) for name in ("after", "broken", "first")]
    order, written = [], []

    def run(cell):
        order.append(cell.name)
        if cell.name == "broken":
            raise RuntimeError("it broke")
        return cell.name

    with pytest.raises(HeadPruningError, match=r"1 of the cells failed \(broken\)"):
        run_cells(
            cells,
            run,
            jobs=1,
            ready=lambda cell: cell.name != "after" or "first" in order,
            tell=str,
            write=written.append,
        )
    assert order == ["broken", "first", "after"] and written[-1] == ["after", "first"]


def test_cells_that_can_never_start_are_named():
    with pytest.raises(HeadPruningError, match="lonely start from cells that were not measured; run those too"):
        run_cells([Cell("lonely", {}, ())], str, jobs=1, ready=lambda _: False, tell=str)
