"""Score and speed of encoders without heads and feed-forward units: GPP, DFD, and what they must beat.

    python -m benchmarks.gpp_glue MODEL GLUE --work DIR [--jobs 2]

MODEL is a folder with a BERT-like encoder (that of ``python -m prepare.demo_sentiment``), GLUE holds CoLA/, MRPC/,
SST-2/ and MNLI/ in GLUE's TSV layout. It is fine-tuned first, once for each task; every method then starts from the
outcome, which is also the teacher, and trains as many epochs. Of heads and of units the same share is removed. GPP
removes them in the first half of training; all others before it. Speed is that of the compact model beside the dense
one, and beside what its multiply-accumulates allow (``head-pruning benchmark``). A cell that has been measured is
never run again (its result lies in the work folder); the tables and the plots are written anew after each.
"""

import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Optional

from benchmarks import spd_glue
from benchmarks.glue import ROOT, Cell, Task, shown
from benchmarks.spd_glue import TEACHER, Page, SpdBench, Student, in_order
from head_pruning import HeadMask, full_mask
from head_pruning.surgery.per_unit import of_each_kind
from hf_plugin.command_line.michel import parse_michel
from hf_plugin.glue.michel import MichelRun

SPARSITIES = (0.5, 0.75)
TASKS = {
    "SST-2": Task("SST-2", "accuracy", 2, samples=4000),
    "CoLA": Task("CoLA", "matthews_correlation", 1),
    "MRPC": Task("MRPC", "accuracy", 2, length=128),
    "MNLI": Task("MNLI", "accuracy", 1, samples=8000, length=128),
}
RATE = "1e-4"
GPP = "--pruner gpp --target_sparsity {sparsity}"
DFD = "--distill dfd --teacher_path {teacher}"
EACH = "--prune_units both --keep_share {kept}"
#: Stands for the mask that :meth:`GppBench.michel` finds.
MASK = "MASK"
METHODS = {
    "GPP + DFD": f"{GPP} {DFD}",
    "GPP": GPP,
    "random + DFD": f"--pruner random {EACH} {DFD}",
    "Michel": f"--pruner given --head_mask_file {MASK}",
    "magnitude": f"--pruner unit_magnitude {EACH}",
}
MICHEL_EXAMPLES = 2000


def cells(rate: Optional[str] = None) -> list[Cell]:
    """All cells; ``keep`` is the share of heads and units in percent."""
    return in_order(SPARSITIES, METHODS, lambda *which: cell_at(*which, rate))


def cell_at(task: str, method: str, sparsity: float, seed: int, rate: Optional[str] = None) -> Cell:
    """One student."""
    options = METHODS[method].format(sparsity=sparsity, kept=1 - sparsity, teacher=TEACHER)
    words = [*options.split(), "--learning_rate", rate or RATE]
    name = f"{method} at {rate}" if rate else method
    return Student(task, name, round(100 * (1 - sparsity)), seed, "run_glue", tuple(words), pipelined=True)


class GppBench(SpdBench):
    """Runs cells in a work folder."""

    tasks = TASKS

    def train(self, cell: Cell) -> dict:
        """Train and score on the validation set."""
        if MASK in cell.options:
            mask = str(self.michel(cell))
            cell = dataclasses.replace(cell, options=tuple(mask if word == MASK else word for word in cell.options))
        return super().train(cell)

    def michel(self, cell: Cell) -> Path:
        """The mask of the heads and units of the teacher that its loss feels most."""
        folder = self.work / "masks" / cell.name
        words = [*self.data_flags(cell), *("--model_name_or_path", str(self.work / "runs" / cell.dense.name))]
        words += ["--cache_dir", str(self.work / "cache")]
        words += ["--output_dir", str(folder), "--prune_units", "both", "--seed", str(cell.seed), "--no_cuda"]
        run = MichelRun(parse_michel([*words, "--max_train_samples", str(MICHEL_EXAMPLES)]))
        assert cell.keep is not None
        scores = run.importance(full_mask(run.unit_map))
        HeadMask(run.unit_map, of_each_kind(run.unit_map, scores, cell.keep / 100)).save(folder / "masks.safetensors")
        return folder / "masks.safetensors"

    def kept(self, cell: Cell, out: Path) -> dict:
        """Heads, units, and the speed of the compact model beside its bound."""
        results = json.loads((out / "all_results.json").read_text())
        found = {name: results[name] for name in ("heads_kept", "units_kept") if name in results}
        if cell.method == "dense":
            return found
        command = [sys.executable, "-m", "head_pruning.cli", "benchmark", str(out), "--json"]
        sizes = ("--length", str(self.tasks[cell.task].length), "--batch", "8", "--rounds", "3", "--threads", "1")
        done = subprocess.run([*command, *sizes], cwd=ROOT, env=self.env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{cell.name} cannot be timed: {done.stderr[-500:]}")
        shutil.rmtree(out / "compact", ignore_errors=True)
        speed = json.loads(done.stdout)
        return {**found, "speed_up": speed["speed_up"]["throughput"], "mac_bound": speed["mac_bound"]}


def _shown(rows: list[dict]) -> str:
    speed, bound = (statistics.mean(row[name] for row in rows) for name in ("speed_up", "mac_bound"))
    return f"{shown([row['score'] for row in rows])}; {speed:.2f} of {bound:.2f} times as fast"


def _about(tasks: "set[str]") -> str:
    sizes = "; ".join(
        f"{name}: {task.epochs:g} epochs (its teacher: {spd_glue.DENSE_EPOCHS[name]}) of {task.samples or 'all'} "
        "examples"
        for name, task in TASKS.items()
        if name in tasks
    )
    return (
        f"{sizes}. Batches of 16; learning rates: {RATE}, that of teachers {spd_glue.DENSE_RATE}. Every model starts "
        "from the teacher of its task. Speed on one thread, in processor time, batches of 8 full examples. Of several "
        "seeds the mean and the range."
    )


PAGE = Page(
    name="gpp_glue",
    title="Encoders without heads and feed-forward units",
    tasks=TASKS,
    percents=[round(100 * (1 - sparsity)) for sparsity in SPARSITIES],
    unit="% of heads and units",
    shown=_shown,
    about=_about,
    cells=len(cells()),
)


def main() -> None:
    """Command line."""
    spd_glue.run(__doc__, GppBench, cells, PAGE)


if __name__ == "__main__":
    main()
