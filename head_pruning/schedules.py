"""Every schedule, as a pure function of the step."""

import math
from typing import Optional

from .errors import HeadPruningError

# A few units in the last place of a ratio.
_ROUNDING = 8 * math.ulp(1.0)

#: What a step count must be.
STEPS = "a number of updates (1 or more) or a fraction of training (below 1)"


def log_linear(step: int, *, initial: float, final: float, steps: int) -> float:
    """Temperature of DSP (Li et al. 2021, section 3.3): log-linear from ``initial`` to ``final`` in ``steps`` steps.

    Args:
        step: updates already made, counted from 0.
        initial: temperature at step 0.
        final: temperature from ``steps`` on.
        steps: length of the annealing in updates.
    """
    if step >= steps:
        return final
    return math.exp(math.log(initial) - (step / steps) * (math.log(initial) - math.log(final)))


def resolve_steps(value: float, total_steps: Optional[int], flag: str) -> int:
    """A step count given in updates (1 or more) or as a fraction of training (between 0 and 1).

    Raises:
        HeadPruningError: a negative count, or a fraction where the length of training is not known.
    """
    if not 0 <= value < math.inf:
        raise HeadPruningError(f"{flag} is {value}; give updates (1 or more) or a fraction of training (below 1).")
    if value >= 1 or value == 0:
        return int(value)
    if not total_steps:
        raise HeadPruningError(
            f"{flag} {value} is a fraction of training, whose length is not known here; give updates instead, limit "
            "training by updates or epochs, or set session.total_steps before the first update of a loop of your own."
        )
    return max(1, round(value * total_steps))


def count_of(ratio: float, number: int) -> int:
    """``ratio`` of ``number`` things, rounded down, as a count: 29 % of 100 are 29.

    The float product may be a little below a whole number (``0.29 * 100``), also where the ratio has gone through its
    complement (``1 - (1 - 0.2)``): so little is made up for.

    Args:
        ratio: from 0 to 1, or above.
        number: how many things there are.
    """
    return math.floor((ratio + _ROUNDING * max(1.0, ratio)) * number)


def cubic_density(step: int, *, initial: float, final: float, start: int, stop: int) -> float:
    """Remaining ratio of PLATON (Zhang et al. 2022, equation 8): cubic from ``initial`` to ``final``.

    Args:
        step: updates already made, the present one included.
        initial: remaining ratio up to step ``start``.
        final: remaining ratio after step ``stop``.
        start: last step of the initial phase.
        stop: last step of the cubic phase.
    """
    if step <= start:
        return initial
    if step > stop:
        return final
    return final + (initial - final) * (1 - (step - start) / (stop - start)) ** 3


def gradual_sparsity(step: int, *, initial: float, final: float, begin: int, end: int) -> float:
    """Removed ratio of gradual pruning (Zhu and Gupta 2017): cubic from ``initial`` at ``begin`` to ``final`` at
    ``end``.
    """
    if step >= end:
        return final
    if step <= begin:
        return initial
    progress = (step - begin) / (end - begin)
    return initial + (final - initial) * (1.0 - min(max((1.0 - progress) ** 3, 0.0), 1.0))


def rewound_rate(step: int, *, total: int, warmup: int, begin: int, end: int, interval: int) -> float:
    """Learning rate under rewinding (Prune Once for All, Zafrir et al. 2021, section 4), as a share of its peak.

    It rises linearly, then falls linearly to 0, but from ``begin`` to ``end`` it returns every ``interval`` steps to
    where it was at ``begin``. Where the rise ends after ``begin``, it returns to above the peak, as published.

    Args:
        step: updates already made.
        total: updates in training.
        warmup: updates in which it rises.
        begin: first update of the sparsity's rise.
        end: first update after it.
        interval: updates between two masks.
    """
    short = total - (end - begin)
    fall = max(1, short - warmup)
    if step < warmup:
        return step / warmup
    if begin <= step < end:
        return max(0.0, (short - step + (step - begin) // interval * interval) / fall)
    return max(0.0, ((short if step < begin else total) - step) / fall)
