"""Portions of all pruned tensors that fit into a cache, and work on them side by side."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Callable, Optional, Sequence

import torch

# Elements per portion. On a CPU the temporaries of a portion stay in the cache; on a GPU few launches count more.
CPU_PORTION = 1 << 20
GPU_PORTION = 1 << 25
# A sample of about so many scores tells where a threshold lies to a few thousandths.
SAMPLE = 1 << 19


class Portion:
    """Row ranges of some of the tensors, all on one device, with temporaries of their shapes.

    Attributes:
        slots: (index of the tensor, first row, rows) of each range.
        values: the ranges of the weights.
        state: kind to the ranges of that state.
        gone: what of them belongs to heads that are gone: (number of the range, dimension, places along it).
    """

    def __init__(self, slots: list[tuple[int, int, int]], shapes: list[torch.Size], scratch: dict) -> None:
        self.slots = slots
        self.values: list[torch.Tensor] = []
        self.state: dict[str, list[torch.Tensor]] = {}
        self.gone: list[tuple[int, int, torch.Tensor]] = []
        self._shapes, self._scratch = shapes, scratch
        self._views: dict[int, tuple[torch.Tensor, list[torch.Tensor]]] = {}

    @property
    def device(self) -> torch.device:
        """Where all of it lies."""
        return self.values[0].device

    def cut(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """This portion's ranges of tensors of the same shapes."""
        return [
            tensors[index] if length == tensors[index].shape[0] else tensors[index].narrow(0, start, length)
            for index, start, length in self.slots
        ]

    def fill_gone(self, tensors: Sequence[torch.Tensor], value: float) -> None:
        """Give tensors of the ranges' shapes a value wherever their weights belong to heads that are gone."""
        for number, dim, places in self.gone:
            tensors[number].index_fill_(dim, places, value)

    def scratch(self, number: int = 0) -> list[torch.Tensor]:
        """float32 temporaries; the thread's next call with the same ``number``, by any portion, reuses the memory."""
        key = self.device, number, threading.get_ident()
        if number not in self._views or self._views[number][0] is not self._scratch.get(key):
            need = sum(shape.numel() for shape in self._shapes)
            if key not in self._scratch or self._scratch[key].numel() < need:
                self._scratch[key] = torch.empty(need, dtype=torch.float32, device=self.device)
            parts = self._scratch[key][:need].split([shape.numel() for shape in self._shapes])
            self._views[number] = self._scratch[key], [part.view(s) for part, s in zip(parts, self._shapes)]
        return list(self._views[number][1])


def cut_into_portions(tensors: Sequence[torch.Tensor], *, whole: bool = False) -> list[Portion]:
    """Portions that cover the tensors; with ``whole`` one per tensor, uncut. ``values`` and ``state`` are empty."""
    groups: list[tuple[list, list]] = []
    scratch: dict = {}
    room, device = 0, None
    for index, tensor in enumerate(tensors):
        limit = CPU_PORTION if tensor.device.type == "cpu" else GPU_PORTION
        rows, width = tensor.shape[0], tensor.shape[1:].numel()
        step = max(1, rows) if whole else max(1, min(rows, limit // max(1, width)))
        for start in range(0, max(1, rows), step):  # a rank may hold no rows
            length = min(step, rows - start)
            if whole or length * width > room or device != tensor.device:
                groups.append(([], []))
                room, device = limit, tensor.device
            groups[-1][0].append((index, start, length))
            groups[-1][1].append(torch.Size((length, *tensor.shape[1:])))
            room -= length * width
    return [Portion(slots, shapes, scratch) for slots, shapes in groups]


def sample_portion(values: Sequence[torch.Tensor], state: dict[str, list[torch.Tensor]]) -> Optional[Portion]:
    """A portion of evenly spread weights of all tensors; None where memory is not laid out for it."""
    every = [*values, *(tensor for tensors in state.values() for tensor in tensors)]
    if not all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in every):
        return None
    stride = sample_stride(values)
    views = [tensor.view(-1)[::stride] for tensor in values]
    portion = Portion([], [view.shape for view in views], {})
    portion.values = views
    portion.state = {kind: [tensor.view(-1)[::stride] for tensor in tensors] for kind, tensors in state.items()}
    return portion


def sample_stride(values: Sequence[torch.Tensor]) -> int:
    """How far apart the weights of a sample are."""
    # An odd stride meets all columns of matrices whose width is a power of two times a small number.
    return (sum(tensor.numel() for tensor in values) // SAMPLE) | 1


def product(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor], out: Sequence[torch.Tensor]) -> None:
    """``out = left * right`` in float32, whatever the precision of the factors."""
    if out[0].device.type == "cpu":
        for a, b, x in zip(left, right, out):
            if a.dtype == b.dtype == torch.float32:
                torch.mul(a, b, out=x)
            else:
                x.copy_(a).mul_(b)
    else:
        torch._foreach_copy_(list(out), list(left))
        torch._foreach_mul_(list(out), list(right))


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
