"""Line-by-line work spread over processes, in order, with a progress bar."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain

from tqdm import tqdm

from head_pruning.progress import bar_options
from prepare.files import PrepareError

CHUNK_LINES = 1000


def default_workers() -> int:
    """The number of CPU cores this process may use (at least 1)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def leave_with_parent() -> None:
    """End this worker once its parent is gone: after a kill it would wait for work for ever.

    It would also keep the run's lock, which it has inherited.
    """

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def map_lines(
    work: Callable[[list[str]], list[str]],
    lines: list[str],
    workers: int = 1,
    label: str = "",
    quiet: bool = False,
) -> list[str]:
    """``work`` applied to ``lines`` in chunks of 1000, the results joined in the order of the input.

    ``work`` maps a list of n lines to n lines, one for one, and must be picklable when
    ``workers`` > 1 (a module-level function or a ``functools.partial`` of one). The result does
    not depend on ``workers``. ``label`` names the progress bar on stderr, ``quiet`` hides it.
    PrepareError if a worker process dies (for want of memory, say).
    """
    chunks = [lines[start : start + CHUNK_LINES] for start in range(0, len(lines), CHUNK_LINES)]
    with tqdm(
        total=len(lines), desc=label, unit="line", disable=quiet, **{"mininterval": 0.5, **bar_options()}
    ) as bar:

        def collect(results) -> list[str]:
            done = []
            for result in results:
                bar.update(len(result))
                done.append(result)
            return list(chain.from_iterable(done))

        # A pool costs more than it saves on a handful of chunks.
        if workers <= 1 or len(chunks) < 2:
            return collect(map(work, chunks))
        try:
            with ProcessPoolExecutor(min(workers, len(chunks)), initializer=leave_with_parent) as pool:
                return collect(pool.map(work, chunks))
        except BrokenProcessPool:
            raise PrepareError(f"A worker process died during {label!r}; try fewer --workers.") from None
