"""The grid of glue.sh: four tasks, every method at four numbers of heads, three seeds."""

from pathlib import Path

from benchmarks.glue import PUBLISHED, Cell, Task, cells_at

NAME = "glue-gpu"
TASKS = {
    "CoLA": Task("CoLA", "matthews_correlation", 4),
    "MRPC": Task("MRPC", "accuracy", 4, length=128),
    "RTE": Task("RTE", "accuracy", 4, length=128),
    "SST-2": Task("SST-2", "accuracy", 1),
}
SEEDS = (1, 2, 3)
BATCH = 32
MICHEL_BATCH = 64
MICHEL_EXAMPLES = 16000  # of the training set, for the importance
FIRST, LATER = (18, 6), (36, 9)  # numbers of heads kept


def methods_at(task: str, keep: int, seed: int) -> list[Cell]:
    """Every training at one number of heads."""
    published = ("--num_of_heads", str(keep), "--joint_pruning", *PUBLISHED.split())
    return [
        *cells_at(task, keep, seed),
        Cell(task, "joint DSP, published schedule", keep, seed, "run_dsp", published),
    ]


def cells() -> list[Cell]:
    """All cells, most important first: seed by seed all methods at 18 and 6 heads, then the other numbers."""
    found: list[Cell] = []
    for seed in SEEDS:
        found += [Cell(task, "dense", None, seed) for task in TASKS]
        found += [cell for keep in FIRST for task in TASKS for cell in methods_at(task, keep, seed)]
        for method, options in (("Michel, one-shot", ()), ("Michel, exact", ("--exact_pruning",))):
            found += [Cell(task, method, None, seed, "run_michel", options) for task in TASKS]
    return found + [
        cell for seed in SEEDS for keep in LATER for task in TASKS for cell in methods_at(task, keep, seed)
    ]


def dense_folder(work: Path, cell: Cell) -> Path:
    """Where the model of a dense cell lies."""
    return work / "dense" / cell.name
