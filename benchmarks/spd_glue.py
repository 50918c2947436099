"""Score of sparse students of a fine-tuned encoder: SPD, its parts, and pruning with and without a teacher.

    python -m benchmarks.spd_glue MODEL GLUE --work DIR [--jobs 2]

MODEL is a folder with a BERT-like encoder (that of ``python -m prepare.demo_sentiment``), GLUE holds CoLA/, MRPC/,
SST-2/ and MNLI/ in GLUE's TSV layout. It is fine-tuned first, once for each task; every method then starts from the
outcome, which is also the teacher, and trains as many epochs. A cell that has been measured is never run again (its
result lies in the work folder); the tables and the plots are written anew after each.
"""

import argparse
import dataclasses
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, Mapping, Optional, Sequence

from benchmarks.cells import add_options, run_bench
from benchmarks.glue import Bench, Cell, Task, score, shown
from benchmarks.weights_glue import SCHEDULE
from benchmarks.weights_glue import TRAINING as PLATONS
from head_pruning.files import atomic_path, write_json
from head_pruning.report.plots import plot_scores
from head_pruning.report.tables import markdown_table

SPARSITIES = (0.9, 0.8)
# In float32: not every processor is faster in bfloat16.
TRAINING = PLATONS.replace(" --bf16", "").replace("batch_size 32", "batch_size 16")
TASKS = {
    "SST-2": Task("SST-2", "accuracy", 1, samples=4000),
    "CoLA": Task("CoLA", "matthews_correlation", 1),
    "MRPC": Task("MRPC", "accuracy", 2, length=128),
    "MNLI": Task("MNLI", "accuracy", 1, samples=8000, length=128),
}
#: Of the dense model.
DENSE_EPOCHS = {"SST-2": 1, "CoLA": 4, "MRPC": 3, "MNLI": 3}
DENSE_RATE = "1e-4"
# SPD's learning rate is that of its recipe; that of the other methods has not been tuned, see RATES.
RATES = {"SPD": "6.4e-4", "SPD without grafting": "6.4e-4"}
RATE = "3e-4"
# The masks of SPD grow in the first half of training.
MASKS = "--sparsity {sparsity} --num_prune_epochs {half}"
# Stands for the folder of the dense model.
TEACHER = "TEACHER"
LOGITS = "--distill logits --distill_temperature 2 --teacher_path {teacher}"
PLATON = f"--pruner_name platon --final_threshold {{density}} {SCHEDULE} --beta1 0.85 --beta2 0.95"
METHODS = {
    "SPD": f"{MASKS} --replacing_rate 0.8 --scheduler_type linear",
    "SPD without grafting": f"{MASKS} --replacing_rate 1.0 --scheduler_type linear",
    "magnitude + distillation": f"{MASKS} {LOGITS}",
    "magnitude": MASKS,
    "PLATON": PLATON,
    "PLATON + distillation": f"{PLATON} {LOGITS}",
}
# What is trained once more, so many times as long: whether SPD needs more than the others get.
LONGER = 4
LONGER_METHODS = ("SPD", "magnitude + distillation", "PLATON + distillation")
#: By task: the shortest trainings are repeated.
SEEDS = {"SST-2": (1, 2, 3), "CoLA": (1, 2, 3), "MRPC": (1,), "MNLI": (1,)}


class Student(Cell):
    """A cell that starts from the task's teacher, which is the same for all seeds."""

    @property
    def dense(self) -> Cell:
        """The teacher."""
        return dense(self.task)


def dense(task: str) -> Cell:
    """The teacher of a task."""
    return Cell(task, "dense", None, SEEDS[task][0], options=("--learning_rate", DENSE_RATE))


def in_order(
    sparsities: Sequence[float], methods: Iterable[str], cell_at: Callable[[str, str, float, int], Cell]
) -> list[Cell]:
    """All cells, most important first: every method and task once before a second seed."""
    found: list[Cell] = []
    for seed in sorted({seed for seeds in SEEDS.values() for seed in seeds}):
        for sparsity in sparsities:
            for task in [task for task, seeds in SEEDS.items() if seed in seeds]:
                found += [dense(task)] if dense(task) not in found else []
                found += [cell_at(task, method, sparsity, seed) for method in methods]
    return found


def cells(rate: "str | None" = None) -> list[Cell]:
    """All cells; ``keep`` is the density in percent."""
    found = in_order(SPARSITIES, METHODS, lambda *which: cell_at(*which, rate))
    return found + [cell_at("SST-2", method, SPARSITIES[0], 1, rate, LONGER) for method in LONGER_METHODS]


def cell_at(task: str, method: str, sparsity: float, seed: int, rate: "str | None" = None, longer: int = 1) -> Cell:
    """One student."""
    density, half = round(1 - sparsity, 6), longer * TASKS[task].epochs / 2
    options = METHODS[method].format(sparsity=sparsity, density=density, half=half, teacher=TEACHER)
    words = [*options.split(), "--learning_rate", rate or RATES.get(method, RATE)]
    name = f"{method} at {rate}" if rate else method
    if longer > 1:
        name += f", {longer} times as long"
        words += ["--num_train_epochs", f"{longer * TASKS[task].epochs:g}"]
    return Student(task, name, round(100 * (1 - sparsity)), seed, "run_glue", tuple(words), pipelined=True)


class SpdBench(Bench):
    """Runs cells in a work folder."""

    tasks = TASKS

    def train(self, cell: Cell) -> dict:
        """Train and score on the validation set."""
        task, dense = self.tasks[cell.task], cell.method == "dense"
        teacher = self.work / "runs" / cell.dense.name
        options = tuple(str(teacher) if word == TEACHER else word for word in cell.options)
        epochs = DENSE_EPOCHS[cell.task] if dense else task.epochs
        start = self.model if dense else teacher
        out = self.fine_tune(dataclasses.replace(cell, options=options), start, epochs, TRAINING)
        results = json.loads((out / "all_results.json").read_text())
        kept = self.kept(cell, out)
        if not dense:
            (out / "model.safetensors").unlink()
        return {
            "task": cell.task,
            "method": cell.method,
            "percent": cell.keep or 100,
            **kept,
            "seed": cell.seed,
            "score": score(task, results),
        }

    def kept(self, cell: Cell, out: Path) -> dict:
        """What is left of a cell's model, which lies in ``out``."""
        if cell.method == "dense":
            return {"density": 1.0}
        return {"density": json.loads((out / "pruning.json").read_text())["weights"]["density"]}


@dataclass(frozen=True)
class Page:
    """What the files of results are called, and what they say beside the numbers.

    Args:
        name: the files' name.
        title: the headline.
        tasks: in the order of the tables.
        percents: what is kept, in the order of the columns.
        unit: of what.
        shown: rows of one method, task and percentage, of several seeds, as text.
        about: tasks that have rows to a paragraph.
        cells: how many trainings there are in all.
        data: the command's arguments after the model.
    """

    name: str
    title: str
    tasks: Mapping[str, Task]
    percents: Sequence[int]
    unit: str
    shown: Callable[[list[dict]], str]
    about: Callable[[set[str]], str]
    cells: int
    data: str = "GLUE"


def write_results(page: Page, rows: list[dict], folder: Path) -> None:
    """Write the JSON, the tables and the plots."""
    command = f"python -m benchmarks.{page.name} MODEL {page.data} --work DIR"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{page.name}.json", {"command": command, "rows": rows})
    about = f"{page.about({row['task'] for row in rows})} {len(rows)} of {page.cells} trainings have been measured."
    parts = [f"# {page.title}", "", f"`{command}`", "", about, ""]
    for task in page.tasks.values():
        table: dict[str, dict[int, list[dict]]] = {}
        for row in rows:
            if row["task"] == task.name:
                table.setdefault(row["method"], {}).setdefault(row["percent"], []).append(row)
        dense = _scores(table.pop("dense", {}).get(100, []))
        if not table:
            continue
        body = [
            (method, *(page.shown(line[p]) if p in line else "" for p in page.percents))
            for method, line in table.items()
        ]
        title = f"{task.name}, {task.scored}" + (f"; teacher {shown(dense)}" if dense else "")
        heads = ("method", *(f"{p} {page.unit}" for p in page.percents))
        parts += [f"## {title}", "", markdown_table(heads, body), ""]
        if dense:
            lines = {m: [(p, _scores(found)) for p, found in line.items()] for m, line in table.items()}
            plot_scores(
                {m: [(p, statistics.mean(v)) for p, v in line] for m, line in lines.items()},
                folder / f"{page.name}-{task.name}.png",
                dense=("teacher", statistics.mean(dense)),
                score=f"{task.name} {task.scored}",
                total=100,
                spread={m: [(p, min(v), max(v)) for p, v in line if len(v) > 1] for m, line in lines.items()},
                unit=page.unit,
            )
    with atomic_path(folder / f"{page.name}.md") as temporary:
        temporary.write_text("\n".join(parts).rstrip() + "\n")


def _scores(rows: list[dict]) -> list[float]:
    return [row["score"] for row in rows]


def _about(tasks: "set[str]") -> str:
    sizes = "; ".join(
        f"{name}: {task.epochs:g} epochs (its teacher: {DENSE_EPOCHS[name]}) of {task.samples or 'all'} examples"
        for name, task in TASKS.items()
        if name in tasks
    )
    rates = ", ".join(f"{rate} for {method}" for method, rate in RATES.items())
    return (
        f"{sizes}. Batches of 16; learning rates: {rates}, {RATE} for the others, {DENSE_RATE} for teachers. Every "
        "student starts from the teacher of its task. Of several seeds the mean and the range."
    )


PAGE = Page(
    name="spd_glue",
    title="Sparse students of a fine-tuned teacher",
    tasks=TASKS,
    percents=[round(100 * (1 - sparsity)) for sparsity in SPARSITIES],
    unit="% of the weights",
    shown=lambda rows: shown(_scores(rows)),
    about=_about,
    cells=len(cells()),
)


def run(doc: str, bench: type[SpdBench], cells: Callable[[Optional[str]], list[Cell]], page: Page) -> None:
    """The command line of a benchmark of students."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder with the pretrained encoder")
    parser.add_argument("glue", type=Path, help="folder with the tasks' folders")
    add_options(parser)
    parser.add_argument("--rate", help="another learning rate of all students, to find out what serves them best")
    options = parser.parse_args()

    made = bench(options.model.resolve(), options.glue.resolve(), options.work.resolve(), options.threads)
    run_bench(
        cells(options.rate), made, options, lambda rows: write_results(page, rows, options.results), kept="percent"
    )


def main() -> None:
    """Command line."""
    run(__doc__, SpdBench, cells, PAGE)


if __name__ == "__main__":
    main()
