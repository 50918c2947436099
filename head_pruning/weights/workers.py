"""Working on portions side by side: the operations on one are too short to share among a processor's cores."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Callable, Optional, Sequence

import torch

from .pieces import Portion

_pool: Optional[tuple[int, ThreadPoolExecutor]] = None


def _forget() -> None:
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget)  # a forked process has none of its parent's threads


def each(portions: Sequence[Portion], work: Callable[[Portion], None]) -> None:
    """Call ``work`` with each portion: on a CPU in as many threads as torch uses, elsewhere one after the other."""
    threads = min(torch.get_num_threads(), len(portions))
    if threads < 2 or any(portion.device.type != "cpu" for portion in portions):
        for portion in portions:
            work(portion)
        return

    waiting = iter(portions)  # all threads take from it: one call each costs less than one per portion

    def share() -> None:
        with torch.no_grad():  # a setting of the thread
            for portion in waiting:
                work(portion)

    pool = _workers(torch.get_num_threads())
    shares = [pool.submit(share) for _ in range(threads)]
    wait(shares)  # also where one fails: nobody may still write when the caller goes on
    for done in shares:
        done.result()


def _workers(threads: int) -> ThreadPoolExecutor:
    """Threads in which torch uses one thread each."""
    global _pool
    if _pool is None or _pool[0] != threads:
        pool = ThreadPoolExecutor(threads, "weights", initializer=torch.set_num_threads, initargs=(1,))
        started = threading.Barrier(threads + 1)
        for _ in range(threads):
            pool.submit(started.wait)
        started.wait()
        torch.set_num_threads(threads)  # the initializers set it for threads to come, too
        _pool = threads, pool
    return _pool[1]
