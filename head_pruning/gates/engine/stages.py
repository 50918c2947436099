"""Training cut into stages, one for each number of heads on the way from all to K."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Callable, Optional, Sequence

from ...errors import HeadPruningError
from ...schedules import cubic_density

_SAVE, _TRAIN = "--save-at", "--finetune-updates"


@dataclass(frozen=True)
class Stage:
    """Updates in which the number of open heads falls from ``before`` to ``count``, and stays there.

    The stage begins with update ``begin``, the fall with update ``falls``; from update ``full`` on it is over.
    """

    before: int
    count: int
    begin: int
    falls: int
    full: int

    def open_in(self, step: int) -> int:
        """The number of open heads in update ``step``."""
        if step >= self.full:
            return self.count
        return round(cubic_density(step, initial=self.before, final=self.count, start=self.falls, stop=self.full))


def read_counts(text: Optional[str], keep: Optional[int]) -> list[int]:
    """What ``--save-at`` lists, from the most to the least; empty for None.

    Raises:
        HeadPruningError: it is no list of counts, or one is below ``keep``, which is where the number ends.
    """
    if text is None:
        return []
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise HeadPruningError(f"{_SAVE} is {text!r}; give numbers of heads, such as 72,36,18.")
    counts = sorted({int(count) for count in text.split(",")}, reverse=True)
    if keep is not None and counts[-1] < keep:
        raise HeadPruningError(
            f"{_SAVE} lists {counts[-1]} heads, fewer than the {keep} at which the number of heads stops falling; "
            "lower --num-of-heads, or leave it out."
        )
    return counts


def plan_stages(
    counts: Sequence[int],
    size: int,
    total: Optional[int],
    *,
    fall: Callable[[int], tuple[int, int]],
    train: Optional[int],
) -> list[Stage]:
    """A stage for each of ``counts``, one after the other, to the end of training.

    Args:
        counts: numbers of heads, falling, the last one K.
        size: N.
        total: updates in training.
        fall: first and last update of the fall in a stage of so many updates.
        train: updates that each count is trained on for, after its fall; the others are shared evenly by the falls.
            None: all stages are of one length, and ``fall`` tells what of it the fall takes.

    Raises:
        HeadPruningError: the length of training is not known, or too short.
    """
    if not total:
        raise HeadPruningError(
            f"{_SAVE} needs the length of training, which is not known here; limit training by updates or epochs, or "
            "set session.total_steps before the first update of a loop of your own."
        )
    befores = [size, *counts[:-1]]
    falling = [before > count for before, count in zip(befores, counts)]
    least = len(counts) * (train or 1) + sum(falling)
    if total < least:
        raise HeadPruningError(
            f"{_SAVE} leads through {len(counts)} numbers of heads, which take at least {least} updates"
            + ("" if train is None else f" with {_TRAIN} {train}")
            + f", and training has {total}; train longer, or list fewer."
        )
    if train is None:
        ends = [round(total * (place + 1) / len(counts)) for place in range(len(counts))]
    else:
        left, falls = total - train * len(counts), sum(falling)
        shares = [left * sum(falling[: place + 1]) // max(1, falls) for place in range(len(counts))]
        ends = [share + train * (place + 1) for place, share in enumerate(shares)]
        ends[-1] = total
    found = []
    for before, count, falls_here, (begin, end) in zip(befores, counts, falling, itertools.pairwise([0, *ends])):
        if not falls_here:
            first = last = 0
        elif train is not None:
            first, last = 0, end - begin - train
        else:
            first, last = fall(end - begin)
        if last >= end - begin or first >= last > 0:
            raise HeadPruningError(
                f"The fall to {count} heads would go from update {first} to update {last} of a stage of "
                f"{end - begin}; let it end after its beginning, within the stage, or train longer."
            )
        found.append(Stage(before, count, begin, begin + first, begin + last))
    return found
