"""Score over heads kept on GLUE: every method on one pretrained encoder, resumable cell by cell.

    python -m benchmarks.glue MODEL DATA --work DIR [--jobs 2]

MODEL is a folder with a BERT-like encoder of 72 heads (6 x 12; the one of ``python -m prepare.demo_sentiment``), DATA
holds CoLA/, MRPC/, SST-2/ and MNLI/ in GLUE's TSV layout. A cell that has been measured is never run again (its result
lies in the work folder); the tables and the plots are written anew after each.
"""

import argparse
import dataclasses
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Mapping, Optional, Sequence

import torch

from benchmarks.cells import add_options, run_bench
from head_pruning.files import atomic_path, write_json
from head_pruning.inference.environment import CPU_ENVIRONMENT
from head_pruning.report.plots import plot_scores
from head_pruning.report.tables import markdown_table

ROOT = Path(__file__).resolve().parent.parent
HEADS = 72
KEPT = (36, 18, 9, 6)
SEEDS = {36: (1,), 18: (1, 2, 3), 9: (1,), 6: (1, 2, 3)}
MICHEL_ROUND = 3  # divides all of KEPT
# The published schedule (1000 to 1e-8 over 25 000 of 36 816 updates) in the same proportion, and one for short runs.
PUBLISHED = "--annealing --initial_temperature 1000 --final_temperature 1e-8 --cooldown_steps 0.68 --pruning_lr 0.5"
SHORT = "--annealing --initial_temperature 10 --final_temperature 1e-4 --cooldown_steps 0.6 --pruning_lr 0.2"
# Gates learn at temperatures around 1 (see gate_norm in the log): here in the middle of training.
LATE = "--annealing --initial_temperature 1e8 --final_temperature 1e-4 --cooldown_steps 0.9 --pruning_lr 0.2"
# Of every training, beside the number of epochs.
RECIPE = (
    "--per_device_train_batch_size 32 --learning_rate 5e-5 --warmup_steps 0.06 --save_strategy no --logging_steps 50 "
    "--train_sampling_strategy group_by_length --disable_tqdm True --bf16"
)
# With 0.003, heads_expected of CoLA's log is below 1 in the second epoch.
PENALTY = {36: 0.0001, 18: 0.0002, 9: 0.0004, 6: 0.0008}


@dataclass(frozen=True)
class Task:
    """A GLUE task and how it is trained on."""

    name: str
    metric: str
    epochs: float
    samples: Optional[int] = None  # the first so many of the training set
    length: int = 64

    @property
    def scored(self) -> str:
        """What the score is, for tables and plots."""
        return f"{self.metric} x 100"


TASKS = {
    "CoLA": Task("CoLA", "matthews_correlation", 4),
    "MRPC": Task("MRPC", "accuracy", 3, length=128),
    "SST-2": Task("SST-2", "accuracy", 1, samples=16000),
    "MNLI": Task("MNLI", "accuracy", 1, samples=40000, length=128),
}


@dataclass(frozen=True)
class Cell:
    """One training (or one Michel run, with a score at each of KEPT)."""

    task: str
    method: str
    keep: Optional[int]
    seed: int
    script: str = "run_glue"
    options: tuple[str, ...] = ()
    pipelined: bool = False
    heads_of: Optional["Cell"] = None  # it is trained with the heads that this one ended with

    @property
    def name(self) -> str:
        """Unique, and a file name."""
        keep = "" if self.keep is None else f"-{self.keep}"
        return re.sub(r"[^\w.-]+", "-", f"{self.task}-{self.method}{keep}-s{self.seed}")

    @property
    def dense(self) -> "Cell":
        """The dense model of the same task and seed."""
        return Cell(self.task, "dense", None, self.seed)

    @property
    def michel(self) -> bool:
        """Whether it only cuts."""
        return self.script == "run_michel"

    @property
    def after_dense(self) -> bool:
        """Whether it starts from the dense model."""
        return self.pipelined or self.michel

    @property
    def after(self) -> Optional["Cell"]:
        """The cell whose outcome it needs."""
        return self.dense if self.after_dense else self.heads_of


def cells_at(task: str, keep: int, seed: int) -> list[Cell]:
    """Every training at one number of heads."""
    k = ("--num_of_heads", str(keep))
    return [
        Cell(task, "joint DSP", keep, seed, "run_dsp", (*k, "--joint_pruning", *SHORT.split())),
        Cell(task, "K random heads", keep, seed, "run_glue", (*k, "--pruner", "random")),
        Cell(task, "STE", keep, seed, "run_dsp", (*k, "--joint_pruning", "--use_ste")),
        Cell(task, "pipelined DSP", keep, seed, "run_dsp", (*k, *SHORT.split()), pipelined=True),
        Cell(
            task,
            "Voita, top K",
            keep,
            seed,
            "run_voita",
            (*k, "--joint_pruning", "--l0_penalty", str(PENALTY[keep]), "--pruning_lr", "0.1"),
        ),
    ]


def from_the_start(chosen: Cell) -> Cell:
    """Trained with the heads that another cell chose: tells its choice from what its way there costs."""
    name = f"{chosen.method}'s heads from the start"
    return Cell(chosen.task, name, chosen.keep, chosen.seed, "run_glue", ("--pruner", "given"), heads_of=chosen)


def scheduled(name: str, schedule: str, task: str, keep: int) -> Cell:
    """Joint DSP with another schedule."""
    options = ("--num_of_heads", str(keep), "--joint_pruning", *schedule.split())
    return Cell(task, f"joint DSP, {name}", keep, 1, "run_dsp", options)


def cells() -> list[Cell]:
    """All cells, most important first."""
    found = [Cell("CoLA", "dense", None, seed) for seed in (1, 2, 3)]
    found += [Cell("CoLA", "Michel, one-shot", None, seed, "run_michel") for seed in (1, 2, 3)]
    for seed in (1, 2, 3):
        for keep in (6, 18, 36, 9):
            if seed in SEEDS[keep]:
                found += cells_at("CoLA", keep, seed)
    found += [scheduled("published schedule", PUBLISHED, "CoLA", keep) for keep in (6, 18)]
    for task in ("MRPC", "SST-2"):
        found += [Cell(task, "dense", None, 1), Cell(task, "Michel, one-shot", None, 1, "run_michel")]
        found += [cell for keep in (6, 18) for cell in cells_at(task, keep, 1)]
    found += [cell for seed in (2, 3) for cell in cells_at("SST-2", 6, seed)[:2]]
    found += [Cell("CoLA", "Michel, exact", None, seed, "run_michel", ("--exact_pruning",)) for seed in (1, 2, 3)]
    found += [from_the_start(c) for c in found if c.method == "joint DSP" and c.keep in (6, 18) and c.task != "MRPC"]
    mnli = cells_at("MNLI", 6, 1)
    found += [Cell("MNLI", "dense", None, 1), *mnli, *(from_the_start(cell) for cell in mnli[2:4])]
    after = dataclasses.replace(mnli[0], method="joint DSP from the dense model", pipelined=True)
    found += [after, scheduled("late", LATE, "MNLI", 6)]
    found += cells_at("MNLI", 18, 1)[:3]
    return found


class Bench:
    """Runs cells in a work folder."""

    tasks = TASKS

    def __init__(self, model: Path, data: Path, work: Path, threads: int) -> None:
        self.model, self.data, self.work = model, data, work
        self.env = {**os.environ, **CPU_ENVIRONMENT, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}

    def result(self, cell: Cell) -> Path:
        """Where a measured cell lies."""
        return self.work / "results" / f"{cell.name}.json"

    def run(self, cell: Cell) -> list[dict]:
        """Measure a cell (or read what was measured): one row per number of heads."""
        key = {"options": list(cell.options), "task": vars(self.tasks[cell.task]), "model": self.model.name}
        if self.result(cell).exists():
            measured = json.loads(self.result(cell).read_text())
            if measured["key"] != key:
                raise RuntimeError(f"{self.result(cell)} has other options; choose another --work folder")
            return measured["rows"]
        rows = self.cut(cell) if cell.michel else [self.train(cell)]
        write_json(self.result(cell), {"key": key, "rows": rows})
        return rows

    def data_flags(self, cell: Cell) -> list[str]:
        """The flags that name a cell's data, and how much of an example is read."""
        length = ["--max_seq_length", str(self.tasks[cell.task].length)]
        return ["--task_name", cell.task, "--data_dir", str(self.data / cell.task), *length]

    def call(self, cell: Cell, arguments: list[str]) -> Path:
        """Run one of the scripts; its output goes to a log."""
        out, log = self.work / "runs" / cell.name, self.work / "logs" / f"{cell.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        common = [
            *("-m", f"hf_plugin.{cell.script}", *self.data_flags(cell), "--output_dir", str(out)),
            *("--seed", str(cell.seed), "--cache_dir", str(self.work / "cache")),
        ]
        with log.open("w") as stream:
            done = subprocess.run(
                [sys.executable, *common, *arguments], cwd=ROOT, env=self.env, stdout=stream, stderr=subprocess.STDOUT
            )
        if done.returncode:
            raise RuntimeError(f"{cell.name} failed with status {done.returncode}; see {log}")
        return out

    def row(self, cell: Cell, heads: int, score: float) -> dict:
        """One measured number, in percent."""
        return {"task": cell.task, "method": cell.method, "heads": heads, "seed": cell.seed, "score": score}

    def fine_tune(
        self, cell: Cell, start: Path, epochs: float, recipe: str = RECIPE, more: Sequence[str] = ()
    ) -> Path:
        """Train and evaluate with the cell's script; the folder of the results."""
        samples = self.tasks[cell.task].samples
        return self.call(
            cell,
            [
                *("--model_name_or_path", str(start), "--do_train", "--do_eval", "--overwrite_output_dir"),
                *recipe.split(),
                *("--per_device_eval_batch_size", "64", "--num_train_epochs", str(epochs)),
                *([] if torch.cuda.is_available() else ["--use_cpu"]),
                *(["--max_train_samples", str(samples)] if samples else []),
                *cell.options,
                *more,
            ],
        )

    def train(self, cell: Cell) -> dict:
        """Train and score on the validation set."""
        task = TASKS[cell.task]
        start = self.work / "runs" / cell.dense.name if cell.pipelined else self.model
        heads = []
        if cell.heads_of:
            heads = ["--head_mask_file", str(self.work / "runs" / cell.heads_of.name / "masks.safetensors")]
        out = self.fine_tune(cell, start, 1 if cell.pipelined else task.epochs, more=heads)
        results = json.loads((out / "all_results.json").read_text())
        if cell.method != "dense":
            (out / "model.safetensors").unlink()  # only the dense models are started from
        return self.row(cell, results.get("heads_kept", HEADS), score(task, results))

    def cut(self, cell: Cell) -> list[dict]:
        """Michel: scores at each of KEPT, without training."""
        dense = self.work / "runs" / cell.dense.name
        metric = ["--metric_name", TASKS[cell.task].metric]
        samples = self.tasks[cell.task].samples
        metric += ["--max_train_samples", str(samples)] if samples else []
        options = ["--num_of_heads", str(MICHEL_ROUND), "--batch_size", "64", *metric, *cell.options]
        out = self.call(cell, ["--model_name_or_path", str(dense), *options])
        rounds = json.loads((out / "michel_rounds.json").read_text())["rounds"]
        # Nothing starts from them; what is gone was removed by a call that was cut off before its rows were written.
        shutil.rmtree(out / "michel_masks", ignore_errors=True)
        (out / "model.safetensors").unlink(missing_ok=True)
        return [self.row(cell, r["heads"], r["score"]) for r in rounds if r["heads"] in KEPT]


def score(task: Task, results: Mapping[str, float]) -> float:
    """The score in ``all_results.json``, in percent; the mean of both sets for MNLI."""
    sets = [f"eval_{task.metric}", f"eval_mm_{task.metric}"]
    return 100.0 * statistics.mean(results[name] for name in sets if name in results)


def shown(scores: list[float]) -> str:
    """A score, or of several seeds the mean and the range."""
    if len(scores) == 1:
        return f"{scores[0]:.1f}"
    return f"{statistics.mean(scores):.1f} ({min(scores):.1f} to {max(scores):.1f})"


def by_method(rows: list[dict], task: Task) -> dict[str, dict[int, list[float]]]:
    """The scores of a task by method and number of heads, one per seed."""
    table: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row["task"] == task.name:
            table.setdefault(row["method"], {}).setdefault(row["heads"], []).append(row["score"])
    return table


def table_lines(rows: list[dict], tasks: Iterable[Task]) -> list[str]:
    """A Markdown table for each task that has rows: methods by number of heads."""
    parts = []
    for task in tasks:
        table = by_method(rows, task)
        if not table:
            continue
        dense = table.pop("dense", {}).get(HEADS)
        counts = [k for k in KEPT if any(k in line for line in table.values())]
        body = [
            (method, *(shown(line[k]) if k in line else "" for k in counts)) for method, line in sorted(table.items())
        ]
        title = f"{task.name}, {task.metric} x 100" + (f"; dense {shown(dense)}" if dense else "")
        parts += [f"## {title}", "", markdown_table(("method", *(f"{k} of {HEADS}" for k in counts)), body), ""]
    return parts


def draw(rows: list[dict], tasks: Iterable[Task], folder: Path, name: str) -> None:
    """A picture ``name-TASK.png`` for each task whose dense model and another have been measured."""
    for task in tasks:
        table = by_method(rows, task)
        dense = table.pop("dense", {}).get(HEADS)
        if dense and table:
            plot_scores(
                {m: [(k, statistics.mean(v)) for k, v in line.items()] for m, line in table.items()},
                folder / f"{name}-{task.name}.png",
                dense=("dense", statistics.mean(dense)),
                score=f"{task.name} {task.metric} x 100",
                total=HEADS,
                spread={m: [(k, min(v), max(v)) for k, v in line.items() if len(v) > 1] for m, line in table.items()},
            )


def write_results(rows: list[dict], folder: Path, command: str) -> None:
    """Write the JSON, the tables and the plots."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "glue.json", {"command": command, "rows": rows})
    parts = ["# Score over heads kept on GLUE", "", f"`{command}`", "", *table_lines(rows, TASKS.values())]
    draw(rows, TASKS.values(), folder, "glue")
    with atomic_path(folder / "glue.md") as temporary:
        temporary.write_text("\n".join(parts).rstrip() + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder with the pretrained encoder")
    parser.add_argument("data", type=Path, help="folder with the tasks' folders")
    add_options(parser)
    options = parser.parse_args()

    bench = Bench(options.model.resolve(), options.data.resolve(), options.work.resolve(), options.threads)
    command = "python -m benchmarks.glue MODEL DATA --work DIR"
    run_bench(cells(), bench, options, lambda rows: write_results(rows, options.results, command))


if __name__ == "__main__":
    main()
