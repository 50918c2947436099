"""Running the cells of a sweep: several at a time, each after those it starts from."""

from __future__ import annotations

import concurrent.futures
from typing import Any, Callable, Optional, Protocol, Sequence, TypeVar

from tqdm import tqdm

from ..errors import HeadPruningError, one_line
from ..progress import bar_options


class Named(Protocol):
    """What is run."""

    @property
    def name(self) -> str: ...


Kind = TypeVar("Kind", bound=Named)


def run_cells(
    cells: Sequence[Kind],
    run: Callable[[Kind], Any],
    *,
    jobs: int,
    ready: Callable[[Kind], bool],
    tell: Callable[[Any], str],
    write: Callable[[list[Any]], None] = lambda found: None,
    stop: Callable[[], None] = lambda: None,
) -> None:
    """Run ``cells`` in their order; one that fails is told of, and stops no other.

    Args:
        cells: what to run.
        run: measures a cell, or reads what was measured; an exception is a failure.
        jobs: cells at a time.
        ready: whether the cells that one starts from have been measured.
        tell: the words for what ``run`` returned.
        write: is given what ``run`` returned of all finished cells, in the order of ``cells``, after each.
        stop: ends what is running, so that this process can end.

    Raises:
        HeadPruningError: at the end, if a cell failed or could not start.
    """
    measured: dict[str, Any] = {}
    failed: list[str] = []
    waiting = list(cells)
    with (
        concurrent.futures.ThreadPoolExecutor(max(1, jobs)) as pool,
        tqdm(total=len(waiting), unit="cell", **bar_options()) as bar,
    ):
        running: dict[concurrent.futures.Future, Kind] = {}
        try:
            while True:
                for cell in [cell for cell in waiting if ready(cell)][: jobs - len(running)]:
                    waiting.remove(cell)
                    running[pool.submit(run, cell)] = cell
                if not running:
                    break
                done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    cell = running.pop(future)
                    bar.update()
                    found = _outcome(future)
                    if isinstance(found, Exception):
                        failed.append(cell.name)
                        tqdm.write(f"error: {cell.name}: {_said(found)}")
                    else:
                        measured[cell.name] = found
                        tqdm.write(f"{cell.name}: {tell(found)}")
                if measured:
                    write([measured[cell.name] for cell in cells if cell.name in measured])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            stop()
            raise
    _settle(failed, [cell.name for cell in waiting])


def _outcome(future: concurrent.futures.Future) -> Any:
    error: Optional[BaseException] = future.exception()
    if error is not None and not isinstance(error, Exception):
        raise error
    return future.result() if error is None else error


def _said(error: Exception) -> str:
    """What a failure says: sentences of ours as they are, of others also their kind."""
    if isinstance(error, (HeadPruningError, RuntimeError)):
        return str(error)
    return f"{type(error).__name__}: {one_line(error)}"


def _settle(failed: Sequence[str], waiting: Sequence[str]) -> None:
    """Raise HeadPruningError for cells that failed, or could not start."""
    left = f"{', '.join(waiting)} start from cells that were not measured" if waiting else ""
    if failed:
        more = f"; {left}" if left else ""
        raise HeadPruningError(
            f"{len(failed)} of the cells failed ({', '.join(failed)}){more}; see above for the cause."
        )
    if waiting:
        raise HeadPruningError(f"{left}; run those too.")
