"""Which method keeps the better heads: all methods, several seeds, equal updates, resumable cell by cell.

    python -m benchmarks.heads --work DIR [--data GLUE --model MODEL --wide-model WIDE] [--corpus CORPUS] [--jobs 2]

Without more, the task is the one of ``make demo``: its small translation model is trained once, and every cell trains
on from it, with 4 of its 36 heads. GLUE and MODEL (those of ``benchmarks.glue``) add SST-2, CoLA and MNLI with 6 or 18
of 72 heads, each from one fine-tuned model; WIDE, an encoder of 144 heads, adds SST-2 with 12 of them; CORPUS (that of
``benchmarks.translation``) adds Multi30k from scratch, 2000 updates, the recorded setting. Dense rows were trained on
for as many updates. A measured cell is never run again.
"""

import argparse
import functools
import re
import statistics
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional

from benchmarks import glue, translation
from benchmarks.cells import add_options, run_bench
from benchmarks.spd_glue import DENSE_EPOCHS, DENSE_RATE, TRAINING
from fairseq_plugin.demo import ANNEAL, Demo
from head_pruning import HeadMask, HeadPruningError
from head_pruning.files import MASKS_FILE, atomic_path, read_json, write_json
from head_pruning.report.tables import markdown_table
from hf_plugin.demo import ANNEAL as HF_ANNEAL

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (1, 2, 3)
RANDOM_SEEDS = (1, 2, 3, 4, 5)  # of a draw and of its training
DISTILLED = ("head_sensitivity", "dsp")
RECIPE = f"{TRAINING} --learning_rate {DENSE_RATE}"


@dataclass(frozen=True)
class Task:
    """What is trained, and how many heads are kept."""

    name: str
    score: str
    total: int
    kept: tuple[int, ...]
    setting: str


@dataclass(frozen=True)
class GlueTask(Task):
    """A task of GLUE, and the examples that it trains on."""

    glue: glue.Task


SST2 = glue.Task("SST-2", "accuracy", 1, samples=4000)
COLA = glue.Task("CoLA", "matthews_correlation", 1)
MNLI = glue.Task("MNLI", "accuracy", 1, samples=8000, length=128)
PART = "from the fine-tuned model, 1 epoch of 4000 sentences"
GLUE_TASKS = (
    GlueTask("sst-2", "accuracy", 72, (6, 18), PART, SST2),
    GlueTask("cola", "Matthews correlation x 100", 72, (6, 18), "from the fine-tuned model, 1 epoch", COLA),
    GlueTask("mnli", "accuracy, mean of both sets", 72, (6, 18), PART.replace("4000 sentences", "8000 pairs"), MNLI),
)
WIDE_TASKS = (GlueTask("sst-2-wide", "accuracy", 144, (12,), PART, SST2),)
TASKS = {
    task.name: task
    for task in (
        Task("ui-strings", "BLEU", 36, (4,), "from the trained model, 300 updates"),
        *GLUE_TASKS,
        *WIDE_TASKS,
        Task("multi30k", "BLEU", 36, (4, 9, 2), "from scratch, 2000 updates"),
    )
}


@dataclass(frozen=True)
class Cell:
    """One training."""

    task: str
    method: str
    heads: int
    seed: int
    distilled: bool = False

    after = None  # what a task's cells start from is trained by the first of them

    @property
    def name(self) -> str:
        """Unique, and a file name."""
        return f"{self.task}-{self.method}-{self.heads}{'-distilled' if self.distilled else ''}-s{self.seed}"

    def options(self, anneal: tuple[str, ...], teacher: Optional[Path]) -> list[str]:
        """The method's flags, spelt as fairseq's."""
        joint = ["--num-of-heads", str(self.heads), "--joint-pruning"]
        flags = {
            "dense": [],
            "random": ["--pruner", "random", *joint[:2]],
            "dsp": [*joint, *anneal],
            "ste": [*joint, "--use-ste"],
        }.get(self.method, ["--pruner", self.method, *joint])
        if self.distilled:
            flags += ["--distill-logits", "1", "--distill-temperature", "1", "--teacher-path", str(teacher)]
        return flags


def cells_of(task: Task) -> list[Cell]:
    """Every cell of a task, most important first."""
    found = []
    for heads in task.kept:
        for seed in SEEDS:
            found += [Cell(task.name, m, heads, seed) for m in ("subset", "head_sensitivity", "dsp", "ste", "random")]
        found += [Cell(task.name, "random", heads, seed) for seed in RANDOM_SEEDS if seed not in SEEDS]
        found += [Cell(task.name, m, heads, seed, distilled=True) for m in DISTILLED for seed in SEEDS]
    return found + [Cell(task.name, "dense", task.total, seed) for seed in SEEDS]


class Translation:
    """``make demo``'s model, trained on."""

    anneal = ANNEAL

    def __init__(self, work: Path) -> None:
        data = work / "data"
        if not (data / "data-bin").exists():
            subprocess.run([sys.executable, "-m", "prepare.demo_data", "--dest", str(data)], check=True, cwd=ROOT)
        self.demo = Demo(work / "ui-strings", data / "data-bin", 4, 1500, 300)
        self.lock = threading.Lock()  # one cell trains what all start from

    def score(self, cell: Cell) -> tuple[float, Optional[Path]]:
        """Train and decode: BLEU, and where the heads are written."""
        with self.lock:
            dense = self.demo.train("dense", self.demo.updates, "4e-3", [], 1)
        options = [*cell.options(self.anneal, dense), "--finetune-from-model", str(dense), "--seed", str(cell.seed)]
        checkpoint = self.demo.train(cell.name, self.demo.more_updates, "2e-3", options, 1)
        return self.demo.bleu(cell.name, checkpoint, 1)["bleu"], checkpoint.parent


class Classification:
    """A task of GLUE from one fine-tuned model, with the scripts of ``benchmarks.glue``."""

    def __init__(self, task: GlueTask, work: Path, model: Path, data: Path) -> None:
        self.task = task
        self.bench = glue.Bench(model, data, work / task.name, 1)
        self.bench.tasks = {**glue.TASKS, task.glue.name: task.glue}
        self.lock = threading.Lock()

    def score(self, cell: Cell) -> tuple[float, Optional[Path]]:
        """Train and evaluate: the score in percent, and where the heads are written."""
        name = self.task.glue.name
        start = self.bench.work / "runs" / f"{name}-start-s1"
        with self.lock:
            if not (start / "all_results.json").exists():
                whole = glue.Cell(name, "start", None, 1)
                self.bench.fine_tune(whole, self.bench.model, DENSE_EPOCHS[name], RECIPE)
        options = [re.sub(r"(?<=\w)-(?=[a-z])", "_", o) if o.startswith("--") else o for o in cell.options((), start)]
        options += HF_ANNEAL if cell.method == "dsp" else ()
        method = cell.name.removeprefix(f"{cell.task}-").removesuffix(f"-s{cell.seed}")
        run = glue.Cell(name, method, None, cell.seed, options=tuple(options))
        out = self.bench.fine_tune(run, start, self.task.glue.epochs, RECIPE)
        (out / "model.safetensors").unlink()
        return glue.score(self.task.glue, read_json(out / "all_results.json")), out


class Recorded:
    """Multi30k from scratch, in the setting in which the published code was recorded."""

    # The manual's temperatures, with the cooldown in the proportion of the published training.
    anneal = ("--annealing", "--initial-temperature", "0.1", "--final-temperature", "1e-8", "--cooldown-steps", "0.5")

    def __init__(self, work: Path, corpus: Path) -> None:
        self.bench = translation.Bench(corpus, work / "multi30k", 2000, 1)
        self.bench.prepare()

    def score(self, cell: Cell) -> tuple[float, Optional[Path]]:
        """Train and decode."""
        dense = self.bench.work / "checkpoints" / "multi30k-dense-36-s1" / "checkpoint_last.pt"
        if cell.distilled and not dense.exists():
            raise RuntimeError(f"{cell.name} learns from multi30k-dense-36-s1, which was not trained; do that first")
        options = (*cell.options(self.anneal, dense), "--seed", str(cell.seed))
        row = self.bench.train(translation.Cell(cell.name, cell.method, options))
        return row["bleu"], self.bench.work / "checkpoints" / cell.name


class Bench:
    """Runs cells; what is measured lies in ``work/results``."""

    def __init__(self, work: Path, makers: dict[str, Callable[[], Any]]) -> None:
        self.work, self.makers = work, makers
        self.settings: dict[str, Any] = {}
        self.lock = threading.Lock()

    def result(self, cell: Cell) -> Path:
        """Where a measured cell lies."""
        return self.work / "results" / f"{cell.name}.json"

    def setting(self, task: str) -> Any:
        """What trains a task's cells; made when it is first used."""
        with self.lock:
            if task not in self.settings:
                self.settings[task] = self.makers[task]()
            return self.settings[task]

    def run(self, cell: Cell) -> list[dict]:
        """Measure a cell, or read what was measured."""
        result = self.result(cell)
        if result.exists():
            return [read_json(result)]
        try:
            score, folder = self.setting(cell.task).score(cell)
        except HeadPruningError as error:
            raise RuntimeError(str(error)) from error
        mask = HeadMask.load(folder / MASKS_FILE) if (folder / MASKS_FILE).exists() else None
        kept = cell.heads if mask is None else mask.kept
        sites = (
            {} if mask is None else {k: int(v.sum()) for k, v in mask.unit_map.by_site(mask.keep).items() if v.any()}
        )
        row = {"task": cell.task, "method": cell.method, "heads": kept, "seed": cell.seed, "distilled": cell.distilled,
               "score": score, "heads_by_site": {k: v for k, v in sites.items() if v}}  # fmt: skip
        result.parent.mkdir(parents=True, exist_ok=True)
        write_json(result, row)
        return [row]


def tables(rows: list[dict]) -> list[str]:
    """A Markdown table for each task: mean and range of the seeds, best mean first."""
    parts = []
    for task in TASKS.values():
        groups: dict[tuple, list[float]] = {}
        for row in rows:
            if row["task"] == task.name:
                groups.setdefault((row["heads"], row["distilled"], row["method"]), []).append(row["score"])
        lines = [
            (method + (", distilled" if distilled else ""), heads, f"{statistics.mean(found):.2f}",
             f"{min(found):.2f} to {max(found):.2f}", len(found))
            for (heads, distilled, method), found in sorted(
                groups.items(), key=lambda g: (-g[0][0], g[0][1], -statistics.mean(g[1]))
            )
        ]  # fmt: skip
        if lines:
            header = ("method", f"heads kept of {task.total}", f"mean {task.score}", "range", "runs")
            parts += [f"## {task.name}: {task.setting}", "", markdown_table(header, lines), ""]
    return parts


def write_results(rows: list[dict], folder: Path, command: str) -> None:
    """Write the JSON and the tables, beside rows of tasks that this call does not run."""
    path = folder / "heads.json"
    mine = {row["task"] for row in rows}
    others = [row for row in (read_json(path)["rows"] if path.exists() else []) if row["task"] not in mine]
    write_json(path, {"command": command, "rows": others + rows})
    parts = ["# Choosing heads", "", f"`{command}`", "", *tables(others + rows)]
    with atomic_path(folder / "heads.md") as temporary:
        temporary.write_text("\n".join(parts).rstrip() + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--data", type=Path, help="folder with the tasks' folders, for GLUE")
    parser.add_argument("--model", type=Path, help="folder with a pretrained encoder of 72 heads, for GLUE")
    parser.add_argument("--wide-model", type=Path, help="folder with a pretrained encoder of 144 heads, for GLUE")
    parser.add_argument("--corpus", type=Path, help="folder with the BPE'd Multi30k, for the recorded setting")
    options = parser.parse_args()
    if bool(options.model or options.wide_model) != bool(options.data):
        parser.error("--data belongs to --model or --wide-model")
    work = options.work.resolve()
    makers: dict[str, Callable[[], Any]] = {"ui-strings": lambda: Translation(work)}
    for tasks, model in ((GLUE_TASKS, options.model), (WIDE_TASKS, options.wide_model)):
        for task in tasks if model else ():
            makers[task.name] = functools.partial(
                Classification, task, work, model.resolve(), options.data.resolve()
            )  # fmt: skip
    if options.corpus:
        makers["multi30k"] = lambda: Recorded(work, options.corpus.resolve())
    bench = Bench(work, makers)
    cells = [cell for task in TASKS.values() for cell in cells_of(task)]
    cells = [cell for cell in cells if cell.task in makers or bench.result(cell).exists()]
    command = "python -m benchmarks.heads --work DIR --data GLUE --model MODEL --wide-model WIDE"
    run_bench(cells, bench, options, lambda rows: write_results(rows, options.results, command))


if __name__ == "__main__":
    main()
