"""Running the cells of a benchmark: several at a time, each after the one it starts from, failures at the end."""

import concurrent.futures
import sys
from typing import Any, Callable, Sequence

from tqdm import tqdm

from head_pruning.progress import bar_options


def run_cells(
    cells: Sequence[Any],
    run: Callable[[Any], list[dict]],
    *,
    jobs: int,
    ready: Callable[[Any], bool],
    score: str,
    kept: str = "heads",
    write: Callable[[list[dict]], None],
) -> None:
    """Run ``cells`` in their order and end the process, with status 1 if one failed.

    Args:
        cells: what to run; each has a ``name``.
        run: measures a cell, or reads what was measured; a RuntimeError is a failure.
        jobs: cells at a time.
        ready: whether the cell that one starts from has been measured.
        score: key of a row's score, to be shown.
        kept: key of what a row's model keeps, to be shown.
        write: is given the rows of all finished cells, in the order of ``cells``, after each.
    """
    measured: dict[str, list[dict]] = {}
    failed = 0
    waiting = list(cells)
    with (
        concurrent.futures.ThreadPoolExecutor(jobs) as pool,
        tqdm(total=len(waiting), unit="cell", **bar_options()) as bar,
    ):
        running: dict[concurrent.futures.Future, Any] = {}
        while waiting or running:
            for cell in [cell for cell in waiting if ready(cell)][: jobs - len(running)]:
                waiting.remove(cell)
                running[pool.submit(run, cell)] = cell
            if not running:
                names = ", ".join(cell.name for cell in waiting)
                sys.exit(f"error: {names} start from cells that were not measured; drop --only.")
            done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                cell = running.pop(future)
                bar.update()
                try:
                    rows = measured[cell.name] = future.result()
                except RuntimeError as error:
                    failed += 1
                    tqdm.write(f"error: {error}")
                    continue
                tqdm.write(f"{cell.name}: " + ", ".join(f"{row[kept]} {kept} {row[score]:.2f}" for row in rows))
            rows = [row for cell in cells for row in measured.get(cell.name, [])]
            if rows:
                write(rows)
    sys.exit(f"error: {failed} cells failed" if failed else 0)
