"""Which weights stay: the exact k-th smallest score without sorting or copying scores, N:M patterns, blocks."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Optional, Sequence

import numpy as np
import torch

from ...errors import HeadPruningError
from .portions import Portion, each
from .targets import Target

_LOW = 16  # bits that the second pass tells apart; the first pass tells the others
_SIGN = 0x7FFFFFFF
_RANKS = 256  # as many as a byte tells apart; sorting is slower for few

Scores = Callable[[], Iterable["list[torch.Tensor]"]]


@dataclass(frozen=True)
class Threshold:
    """The k-th smallest score, how many scores lie below it, and how many equal it (0-dimensional tensors)."""

    value: torch.Tensor
    below: torch.Tensor
    equal: torch.Tensor


def kth_smallest(
    scores: Scores, k: int, *, signed: bool = False, total: Optional[Callable[[torch.Tensor], Any]] = None
) -> Threshold:
    """The k-th smallest of all scores (k from 1), exactly what ``torch.cat(scores).kthvalue(k)`` gives.

    Radix selection: the bit patterns of floats are ordered as the floats are. The first pass counts the upper 16
    bits, the second the lower 16 of those in the bucket found. Nothing waits for the device.

    Args:
        scores: called once per pass; yields lists of float32 tensors, which may share memory with earlier ones.
        k: rank, from 1 to the number of scores.
        signed: whether scores may be negative.
        total: sums counts over the ranks, in place, where each holds some of the scores.
    """
    offset = 1 << (31 - _LOW) if signed else 0
    add = total or (lambda counts: None)
    counts = _count(scores, lambda key: (key >> _LOW) + offset if offset else key >> _LOW, offset + (1 << 15), signed)
    add(counts)
    bucket, before, _ = _find(counts, k)
    base = ((bucket - offset) << _LOW).int()

    def low_bits(key: torch.Tensor) -> torch.Tensor:
        # Scores outside of the bucket go to the two bins at the ends; differences that overflow land there too.
        return key.sub(base.to(key.device, non_blocking=True)).clamp_(-1, 1 << _LOW).add_(1)

    counts = _count(scores, low_bits, (1 << _LOW) + 2, signed)
    add(counts)
    place, between, equal = _find(counts[1:-1], k - before)
    key = (base + place).int()
    if signed:
        key = key ^ ((key >> 31) & _SIGN)
    return Threshold(key.view(torch.float32), before + between, equal)


def bracketed(
    sample: np.ndarray,
    portions: Sequence[Portion],
    scores: Callable[[Portion], list[torch.Tensor]],
    k: int,
    number: int,
    visit: Callable[[Portion, list[torch.Tensor], float, list], None],
) -> Optional[Threshold]:
    """:func:`kth_smallest` in one pass on the CPU, or None if the sample was misleading.

    A sample of the scores gives two bounds that have the k-th smallest between them, but for one case in a million.
    One pass counts what lies below and collects the few between.

    Args:
        sample: some of the scores.
        portions: where the scores are; taken side by side, see :func:`each`.
        scores: a portion's scores, as contiguous float32 tensors on the CPU.
        k: rank, from 1 to ``number``.
        number: how many scores there are.
        visit: called once for each portion with its scores, which are no longer needed then, the lower bound and, per
            tensor, the places and the scores between the bounds.
    """
    middle, spread = k / number * sample.size, 5.0 * math.sqrt(sample.size * k / number * (1 - k / number)) + 2.0
    ranks = [int(middle - spread) - 1, int(middle + spread)]
    inside = sorted({rank for rank in ranks if 0 <= rank < sample.size})
    ordered = np.partition(sample, inside) if inside else sample
    low = float(ordered[ranks[0]]) if ranks[0] >= 0 else -math.inf
    high = float(ordered[ranks[1]]) if ranks[1] < sample.size else math.inf
    counts: list[int] = []
    found: list[np.ndarray] = []

    def count(portion: Portion) -> None:
        taken, between = scores(portion), []
        for score in taken:
            flat = score.numpy().reshape(-1)
            less = np.less(flat, np.float32(low))
            counts.append(int(np.count_nonzero(less)))
            places = np.flatnonzero(np.logical_xor(np.less_equal(flat, np.float32(high)), less))
            between.append((places, flat[places]))
        found.extend([values for _, values in between])
        visit(portion, taken, low, between)

    each(portions, count)
    below = sum(counts)
    candidates, rank = np.concatenate(found), k - below
    if not 1 <= rank <= candidates.size:
        return None
    value = np.partition(candidates, rank - 1)[rank - 1]
    below += int(np.count_nonzero(candidates < value))
    equal = int(np.count_nonzero(candidates == value))
    return Threshold(torch.tensor(value), torch.tensor(below), torch.tensor(equal))


def _count(scores: Scores, bins: Callable, number: int, signed: bool) -> torch.Tensor:
    total: Optional[torch.Tensor] = None
    for portion in scores():
        for score in portion:
            key = score.reshape(-1).view(torch.int32)
            if signed:
                key = key ^ ((key >> 31) & _SIGN)
            place = bins(key)
            if key.device.type == "cpu":
                counts = torch.bincount(place, minlength=number)
            else:  # bincount would wait for the device
                counts = torch.zeros(number, dtype=torch.int64, device=key.device)
                counts.scatter_add_(0, place.long(), torch.ones_like(place, dtype=torch.int64))
            total = counts if total is None else total.add_(counts.to(total.device, non_blocking=True))
    assert total is not None  # there are scores
    return total


def _find(counts: torch.Tensor, k: "int | torch.Tensor") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The bin of the k-th element, the number of elements in lower bins, and in this one."""
    summed = counts.cumsum(0)
    rank = torch.as_tensor(k, device=counts.device, dtype=summed.dtype).reshape(1)
    place = torch.searchsorted(summed, rank)
    return place[0], (summed[place] - counts[place])[0], counts[place][0]


@dataclass(frozen=True)
class Selection:
    """How the weights that stay are chosen.

    Args:
        scope: ``global`` (one threshold over all tensors), ``tensor`` (one each), ``pattern`` (N of each M) or
            ``block`` (whole blocks, one threshold per tensor).
        keep: N of N:M.
        size: M of N:M; (rows, columns) of a block, outputs by inputs.
    """

    scope: str
    keep: int = 0
    size: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Selection":
        """``global``, ``tensor``, ``2:4`` or ``4x4``. Raises HeadPruningError for anything else."""
        if text in ("global", "tensor"):
            return cls(text)
        pattern = re.fullmatch(r"(\d+):(\d+)", text)
        if pattern and 0 < int(pattern[1]) < int(pattern[2]):
            return cls("pattern", int(pattern[1]), (int(pattern[2]),))
        block = re.fullmatch(r"(\d+)x(\d+)", text)
        if block and int(block[1]) and int(block[2]):
            return cls("block", size=(int(block[1]), int(block[2])))
        raise HeadPruningError(
            f"--weight-selection is {text!r}; give global, tensor, N:M such as 2:4 (N of M neighbours stay), or "
            "ROWSxCOLUMNS such as 4x4 (whole blocks)."
        )

    def __str__(self) -> str:
        separator = ":" if self.scope == "pattern" else "x"
        return separator.join(map(str, (self.keep, *self.size) if self.keep else self.size)) or self.scope

    @property
    def density(self) -> Optional[float]:
        """The remaining ratio that the selection itself fixes: N / M of a pattern; None for others."""
        return self.keep / self.size[0] if self.scope == "pattern" else None

    @property
    def structured(self) -> bool:
        """Whether only matrices can be pruned so."""
        return self.scope in ("pattern", "block")

    def check(self, target: Target) -> None:
        """Raise HeadPruningError when a tensor does not divide into patterns or blocks of its outputs and inputs."""
        if target.layout is None:
            raise HeadPruningError(
                f"It is not known which dimension of {target.name}, of shape {list(target.parameter.shape)}, holds "
                f"the inputs that --weight-selection {self} runs along; leave it out with --weights-exclude or choose "
                "another --weight-selection."
            )
        sizes = self.size if self.scope == "block" else (1, *self.size)
        if any(length % size for length, size in zip(target.by_outputs(target.parameter).shape[-2:], sizes)):
            raise HeadPruningError(
                f"{target.name} of shape {list(target.parameter.shape)} does not divide into "
                f"{'x'.join(map(str, sizes))} (outputs by inputs); leave it out with --weights-exclude or choose "
                "another --weight-selection."
            )


def n_of_m(score: torch.Tensor, prune: int, size: int) -> torch.Tensor:
    """``bool`` like ``score``: all but the ``prune`` lowest of each ``size`` neighbours in the last dimension stay.

    That is the dimension of the inputs, see :meth:`Target.by_outputs`.

    Of equal scores the earlier goes first.
    """
    group = score.reshape(-1, size)
    if size > _RANKS:
        keep = torch.ones_like(group, dtype=torch.bool)
        return keep.scatter_(1, group.argsort(dim=1, stable=True)[:, :prune], False).view(score.shape)
    columns = group.unbind(1)
    rank = torch.zeros(group.shape, dtype=torch.uint8, device=score.device)
    for later in range(size):
        for earlier in range(later):
            higher = columns[later] >= columns[earlier]
            rank[:, later] += higher
            rank[:, earlier] += ~higher
    return (rank >= prune).view(score.shape)


def pool_blocks(score: torch.Tensor, size: tuple[int, ...], pooling: str) -> torch.Tensor:
    """Mean (``avg``) or largest (``max``) score of each block, shape [..., rows / size[0], columns / size[1]]."""
    blocks = score.unflatten(-1, (-1, size[1])).unflatten(-3, (-1, size[0]))
    return blocks.mean((-3, -1)) if pooling == "avg" else blocks.amax((-3, -1))


def expand_blocks(keep: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """One value per block as one value per weight."""
    return keep.repeat_interleave(size[0], -2).repeat_interleave(size[1], -1)
