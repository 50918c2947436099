"""The grid of glue.sh: four tasks, every method at four numbers of heads, three seeds."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from benchmarks.tables import asked
from head_pruning.sweep.plan import Cells

NAME = "glue-gpu"
HEADS = 72
KEPT = (36, 18, 9, 6)
MICHEL_ROUND = 3  # divides all of KEPT
SEEDS = (1, 2, 3)
BATCH = 32
MICHEL_BATCH = 64
MICHEL_EXAMPLES = 16000  # of the training set, for the importance
FIRST, LATER = (18, 6), (36, 9)  # numbers of heads kept
METHODS = ("joint DSP", "K random heads", "STE", "pipelined DSP", "Voita, top K", "joint DSP, published schedule")
# What methods say is that of plans/glue.yaml. The recipe of training is the same, for a Trainer in this process.
PLAN, TABLE, _ = asked("glue")
RECIPE = (
    f"--per_device_train_batch_size {BATCH} --learning_rate 5e-5 --warmup_steps 0.06 --save_strategy no "
    "--logging_steps 50 --train_sampling_strategy group_by_length --disable_tqdm True --bf16"
)


@dataclass(frozen=True)
class Task:
    """A GLUE task and how it is trained on."""

    name: str
    metric: str
    epochs: float
    length: int = 64


TASKS = {
    "CoLA": Task("CoLA", "matthews_correlation", 4),
    "MRPC": Task("MRPC", "accuracy", 4, length=128),
    "RTE": Task("RTE", "accuracy", 4, length=128),
    "SST-2": Task("SST-2", "accuracy", 1),
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
    after_dense: bool = False

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


def training(task: str, method: str, keep: int, seed: int) -> Cell:
    """A training with a number of heads."""
    said = Cells(dataclasses.replace(PLAN, commands=(("{method.pruner}", "{method.more}"),)), Path())
    words = said.cell({"method": method, "heads": str(keep)}).commands[0]
    known = PLAN.words["method"][method]
    return Cell(task, method, keep, seed, known["script"][0], words, known["start"] != ("{model}",))


def cells() -> list[Cell]:
    """All cells, most important first: seed by seed all methods at 18 and 6 heads, then the other numbers."""
    found: list[Cell] = []
    for seed in SEEDS:
        found += [Cell(task, "dense", None, seed) for task in TASKS]
        found += [training(task, method, keep, seed) for keep in FIRST for task in TASKS for method in METHODS]
        for method, options in (("Michel, one-shot", ()), ("Michel, exact", ("--exact_pruning",))):
            found += [Cell(task, method, None, seed, "run_michel", options, after_dense=True) for task in TASKS]
    return found + [
        training(task, method, keep, seed) for seed in SEEDS for keep in LATER for task in TASKS for method in METHODS
    ]


def dense_folder(work: Path, cell: Cell) -> Path:
    """Where the model of a dense cell lies."""
    return work / "dense" / cell.name
