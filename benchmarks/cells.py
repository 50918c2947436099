"""What benchmarks of many cells share: their options, and running the cells by the runner of sweeps."""

import argparse
import re
import sys
from pathlib import Path
from typing import Any, Callable, Sequence

from head_pruning import HeadPruningError
from head_pruning.sweep.runner import run_cells

RESULTS = Path(__file__).resolve().parent / "results"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of every such benchmark."""
    parser.add_argument("--work", type=Path, required=True, help="folder for models, logs and single results")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, one thread each")
    parser.add_argument("--threads", type=int, default=1, help="threads per cell")
    parser.add_argument("--only", help="regular expression on cell names")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the tables go")


def run_bench(
    cells: Sequence[Any],
    bench: Any,
    options: argparse.Namespace,
    write: Callable[[list[dict]], None],
    *,
    score: str = "score",
    kept: str = "heads",
) -> None:
    """Run those cells that are measured already or that ``--only`` matches.

    Args:
        cells: each has a ``name``, and ``after``, the cell that it starts from, or None.
        bench: its ``result`` of a cell is the file of a measured one, its ``run`` measures it and returns its rows.
        options: of :func:`add_options`.
        write: is given the rows of all finished cells after each.
        score: key of a row's score, to be shown.
        kept: key of what a row's model keeps, to be shown.
    """
    wanted = [c for c in cells if not options.only or bench.result(c).exists() or re.search(options.only, c.name)]
    try:
        run_cells(
            wanted,
            bench.run,
            jobs=options.jobs,
            ready=lambda cell: cell.after is None or bench.result(cell.after).exists(),
            tell=lambda rows: ", ".join(f"{row[kept]} {kept} {row[score]:.2f}" for row in rows),
            write=lambda found: write([row for rows in found for row in rows]),
        )
    except HeadPruningError as error:
        sys.exit(f"error: {error}")
