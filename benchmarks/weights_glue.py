"""Score over weights kept: every weight pruner on one pretrained encoder, resumable cell by cell.

    python -m benchmarks.weights_glue MODEL GLUE SQUAD --work DIR [--jobs 2]

MODEL is a folder with a BERT-like encoder (that of ``python -m prepare.demo_sentiment``), GLUE holds CoLA/ and MRPC/
in GLUE's TSV layout, SQUAD a training file and dev-v1.1.json. A cell that has been measured is never run again (its
result lies in the work folder); the tables and the plots are written anew after each.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Callable, Sequence

from benchmarks.cells import add_options, run_bench
from benchmarks.glue import RECIPE, Bench, Cell, Task, shown
from head_pruning.files import atomic_path, write_json
from head_pruning.report.plots import plot_scores
from head_pruning.report.tables import markdown_table

DENSITIES = (0.2, 0.1)
METHODS = {
    "PLATON": ("platon", "--beta1 0.85 --beta2 0.95"),
    "magnitude": ("magnitude", ""),
    "movement": ("movement", ""),
    "sensitivity": ("sensitivity", "--beta1 0.85"),
    "random masks": ("random_weights", ""),
}
# The published recipe of CoLA warms up for 500 and ends with 3 x 500 of 4020 updates: the same proportions.
SCHEDULE = "--initial_threshold 1 --warmup_steps 0.12 --initial_warmup 1 --final_warmup 3 --deltaT 10"
TRAINING = RECIPE.replace("--warmup_steps", "--optimizer_warmup_steps")
TASKS = {
    "CoLA": Task("CoLA", "matthews_correlation", 4),
    "MRPC": Task("MRPC", "accuracy", 4, length=128),
    "SQuAD": Task("SQuAD", "f1", 2, samples=8000, length=256),
}
SQUAD_EXAMPLES = 2000  # of the development set
PERCENT = {"CoLA": 100.0, "MRPC": 100.0, "SQuAD": 1.0}  # SQuAD's F1 is in percent already


def cells() -> list[Cell]:
    """All cells, most important first; ``keep`` is the density in percent."""
    found = [Cell("CoLA", "dense", None, seed) for seed in (1, 2, 3)]
    found += [cell_at("CoLA", method, d, seed) for seed in (1, 2, 3) for d in DENSITIES for method in METHODS]
    found += [Cell("MRPC", "dense", None, 1)]
    found += [cell_at("MRPC", method, d, 1) for d in DENSITIES for method in METHODS]
    found += [Cell("SQuAD", "dense", None, 1, "run_squad")]
    found += [cell_at("SQuAD", method, DENSITIES[0], 1) for method in ("PLATON", "magnitude")]
    return found


def cell_at(task: str, method: str, density: float, seed: int) -> Cell:
    """One training with a weight pruner."""
    name, more = METHODS[method]
    options = f"--pruner_name {name} --final_threshold {density} {SCHEDULE} {more}"
    script = "run_squad" if task == "SQuAD" else "run_glue"
    return Cell(task, method, round(100 * density), seed, script, tuple(options.split()))


class WeightBench(Bench):
    """Runs cells in a work folder."""

    tasks = TASKS

    def __init__(self, model: Path, glue: Path, squad: Path, work: Path, threads: int) -> None:
        super().__init__(model, glue, work, threads)
        self.squad = squad

    @property
    def squad_train(self) -> Path:
        """The training file."""
        return next(iter(sorted(self.squad.glob("train*-v1.1.json"))), self.squad / "train-v1.1.json")

    def data_flags(self, cell: Cell) -> list[str]:
        """The flags that name a cell's data, and how much of an example is read."""
        if cell.task != "SQuAD":
            return super().data_flags(cell)
        files = ["--data_dir", str(self.squad), "--train_file", self.squad_train.name]
        length = ["--max_seq_length", str(self.tasks[cell.task].length), "--doc_stride", "96"]
        return [*files, *length, "--max_eval_samples", str(SQUAD_EXAMPLES)]

    def train(self, cell: Cell) -> dict:
        """Train and score on the validation set."""
        task = TASKS[cell.task]
        out = self.fine_tune(cell, self.model, task.epochs, TRAINING)
        results = json.loads((out / "all_results.json").read_text())
        density = 1.0
        if cell.method != "dense":
            density = json.loads((out / "pruning.json").read_text())["weights"]["density"]
        (out / "model.safetensors").unlink()
        return {
            "task": cell.task,
            "method": cell.method,
            "percent": cell.keep or 100,
            "density": density,
            "seed": cell.seed,
            "score": PERCENT[cell.task] * results[f"eval_{task.metric}"],
        }


def write_results(rows: list[dict], folder: Path, command: str) -> None:
    """Write the JSON, the tables and the plots."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "weights_glue.json", {"command": command, "rows": rows})
    parts = ["# Score over weights kept", "", f"`{command}`", ""]
    for task in TASKS.values():
        table: dict[str, dict[int, list[float]]] = {}
        for row in rows:
            if row["task"] == task.name:
                table.setdefault(row["method"], {}).setdefault(row["percent"], []).append(row["score"])
        dense = table.pop("dense", {}).get(100)
        if not table:
            continue
        percents = [round(100 * density) for density in DENSITIES]
        body = [(method, *(shown(line[p]) if p in line else "" for p in percents)) for method, line in table.items()]
        metric = task.metric if task.name == "SQuAD" else f"{task.metric} x 100"
        title = f"{task.name}, {metric}" + (f"; dense {shown(dense)}" if dense else "")
        parts += [
            f"## {title}",
            "",
            markdown_table(("method", *(f"{p} % of the weights" for p in percents)), body),
            "",
        ]
        if dense:
            plot_scores(
                {m: [(p, statistics.mean(v)) for p, v in line.items()] for m, line in table.items()},
                folder / f"weights_glue-{task.name}.png",
                dense=("dense", statistics.mean(dense)),
                score=f"{task.name} {metric}",
                total=100,
                spread={m: [(p, min(v), max(v)) for p, v in line.items() if len(v) > 1] for m, line in table.items()},
                unit="% of the weights",
            )
    with atomic_path(folder / "weights_glue.md") as temporary:
        temporary.write_text("\n".join(parts).rstrip() + "\n")


def run(doc: str, bench: type[WeightBench], cells: Sequence[Cell], write: Callable[[list[dict], Path], None]) -> None:
    """The command line of a benchmark that fine-tunes on GLUE and SQuAD; ``write`` is given the rows and a folder."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder with the pretrained encoder")
    parser.add_argument("glue", type=Path, help="folder with the tasks' folders")
    parser.add_argument("squad", type=Path, help="folder with SQuAD v1.1")
    add_options(parser)
    options = parser.parse_args()

    paths = (options.model.resolve(), options.glue.resolve(), options.squad.resolve(), options.work.resolve())
    made = bench(*paths, options.threads)
    run_bench(cells, made, options, lambda rows: write(rows, options.results), kept="percent")


def main() -> None:
    """Command line."""
    command = "python -m benchmarks.weights_glue MODEL GLUE SQUAD --work DIR"
    run(__doc__, WeightBench, cells(), lambda rows, folder: write_results(rows, folder, command))


if __name__ == "__main__":
    main()
