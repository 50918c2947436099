"""Comparing running times on a machine that others use too."""

import random
import time
from typing import Any, Callable, Mapping, Optional

import torch


def stopwatch(device: "str | torch.device" = "cpu", threads: int = 1) -> Callable[[Callable[[], Any]], float]:
    """A function that runs an action and returns its milliseconds.

    On a GPU between two events on its stream; on the CPU processor time with one thread (what other processes take
    does not count), and the clock's with several.
    """
    if torch.device(device).type == "cuda":
        return _gpu_milliseconds
    clock = time.process_time if threads == 1 else time.perf_counter

    def milliseconds(action: Callable[[], Any]) -> float:
        start = clock()
        action()
        return 1000.0 * (clock() - start)

    return milliseconds


def _gpu_milliseconds(action: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    action()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def fastest(
    actions: Mapping[str, Callable[[], Any]],
    rounds: int,
    watch: Callable[[Callable[[], Any]], float],
    progress: Optional[Callable[[int], Any]] = None,
    at_least: float = 0.0,
) -> dict[str, float]:
    """The shortest of ``rounds`` or more times of each action, in ``watch``'s unit.

    The actions take turns, in another order each round, so that what slows the machine down for a while meets them
    all; one turn before the first round is not counted.

    Args:
        actions: what to compare.
        rounds: turns of each, at least; 1 or more.
        watch: a :func:`stopwatch`.
        progress: called with the number of each round, from 1, before it starts.
        at_least: rounds go on until all actions together have taken so much, in ``watch``'s unit.
    """
    best = dict.fromkeys(actions, float("inf"))
    for action in actions.values():
        action()
    order = random.Random(0)
    turn, total = 0, 0.0
    while turn < rounds or total < at_least:
        turn += 1
        if progress is not None:
            progress(turn)
        for name in order.sample(list(actions), len(actions)):
            taken = watch(actions[name])
            total += taken
            best[name] = min(best[name], taken)
    return best
