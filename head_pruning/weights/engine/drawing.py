"""Drawing the masks of a pruner's present scores: one threshold over all weights, or tensor by tensor."""

from __future__ import annotations

import math
from typing import Any, Optional, Protocol

import numpy as np
import torch

from .portions import Portion
from .selection import Selection, Threshold, bracketed, expand_blocks, kth_smallest, n_of_m, pool_blocks
from .storage import Storage
from .targets import Target


class Scorer(Protocol):
    """What drawing asks of a weight pruner: its scores, and how it selects by them."""

    storage: Storage
    selection: Selection
    signed: bool
    inclusive: bool
    config: Any

    @property
    def nested(self) -> bool: ...

    def scores(self, portion: Portion) -> list[torch.Tensor]: ...

    def masked_scores(self, portion: Portion) -> list[torch.Tensor]: ...

    def floor(self, portion: Portion) -> list[torch.Tensor]: ...

    def threshold(self, name: str, score: torch.Tensor, k: int) -> torch.Tensor: ...

    def count_removed(self, density: float, number: int) -> int: ...

    def density_of(self, name: str, density: float) -> float: ...


def draw_masks(pruner: Scorer, density: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Store masks that keep the ``density`` of the active weights with the highest scores.

    Weights of heads that are gone do not count, and the masks keep them: heads may come back while gates are trained.
    Under nested masks what is pruned stays so.

    Returns:
        The number of weights that stay of those that count, and the threshold, 0-dimensional: minus infinity where
        nothing is pruned, NaN where tensors have thresholds of their own. Nothing waits for the device.
    """
    return (_draw_over_all if pruner.selection.scope == "global" else _draw_each)(pruner, density)


def _draw_over_all(pruner: Scorer, density: float) -> tuple[torch.Tensor, torch.Tensor]:
    storage, nested, left = pruner.storage, pruner.nested, pruner.storage.left
    k = pruner.count_removed(density, left)
    if k == 0:
        value = torch.full((), -math.inf, device=storage.portions[0].device)
        for portion in storage.portions:
            every = [torch.ones_like(value, dtype=torch.bool) for value in portion.values]
            storage.masks.store(portion, pruner.floor(portion) if nested else every)
        return storage.count_kept() if nested else torch.full_like(value, left), value
    found = _draw_by_sample(pruner, k, storage.number) if storage.sample is not None and not nested else None
    if found is None:
        signed, total = pruner.signed or nested, storage.ranks.sum
        found = kth_smallest(lambda: map(pruner.masked_scores, storage.portions), k, signed=signed, total=total)
        for portion in storage.portions:
            here, scores = found.value.to(portion.device, non_blocking=True), pruner.masked_scores(portion)
            if nested:
                kept = zip(pruner.floor(portion), scores)
                storage.masks.store(portion, [may & _above(pruner, score, here) for may, score in kept])
            else:
                storage.masks.store_above(portion, scores, here, pruner.inclusive)
    if nested:  # what is gone stays so, also above the rank that the density asks for
        return storage.count_kept(), found.value
    return left - (found.below + found.equal if pruner.inclusive else found.below), found.value


def _draw_by_sample(pruner: Scorer, k: int, number: int) -> Optional[Threshold]:
    """Select and store in one pass over the portions; None if the sample was misleading."""
    storage = pruner.storage
    between: list[tuple[Portion, int, np.ndarray, np.ndarray]] = []

    def visit(portion: Portion, taken: list[torch.Tensor], low: float, found: list) -> None:
        between.extend([(portion, i, *pair) for i, pair in enumerate(found) if pair[0].size])
        storage.masks.store_above(portion, taken, torch.tensor(low), False)

    assert storage.sample is not None
    sample = torch.cat([score.reshape(-1) for score in pruner.masked_scores(storage.sample)]).numpy()
    found = bracketed(sample, storage.portions, pruner.masked_scores, k, number, visit)
    if found is not None:
        value = found.value.numpy()
        for portion, i, places, taken in between:
            storage.masks.prune(portion, i, places[taken <= value if pruner.inclusive else taken < value])
    return found


def _draw_each(pruner: Scorer, density: float) -> tuple[torch.Tensor, torch.Tensor]:
    storage = pruner.storage
    draw = {"tensor": _draw_tensor, "pattern": _draw_pattern, "block": _draw_blocks}[pruner.selection.scope]
    for target, portion in zip(storage.active, storage.portions):
        (score,) = pruner.masked_scores(portion)
        keep = draw(pruner, pruner.density_of(target.name, density), target, score, portion)
        if pruner.nested:
            keep &= pruner.floor(portion)[0]
        storage.masks.store(portion, [keep])
    kept = storage.count_kept()
    return kept, torch.full((), math.nan, device=kept.device)


def _draw_tensor(
    pruner: Scorer, density: float, target: Target, score: torch.Tensor, portion: Portion
) -> torch.Tensor:
    left = pruner.storage.left_of(target)
    if not left:
        return torch.ones_like(score, dtype=torch.bool)
    return _above(pruner, score, pruner.threshold(target.name, score, pruner.count_removed(density, left)))


def _draw_pattern(
    pruner: Scorer, density: float, target: Target, score: torch.Tensor, portion: Portion
) -> torch.Tensor:
    """The final density is N/M; on the way there the number of zeros per group is rounded down."""
    size = pruner.selection.size[0]
    portion.fill_gone([score], -math.inf)  # of each group they are the first to go
    keep = target.back(n_of_m(target.by_outputs(score), pruner.count_removed(density, size), size))
    portion.fill_gone([keep], True)
    return keep


def _draw_blocks(
    pruner: Scorer, density: float, target: Target, score: torch.Tensor, portion: Portion
) -> torch.Tensor:
    """A block's score is that of its weights that count; blocks without any do not count."""
    size, pooling = pruner.selection.size, pruner.config.block_pooling
    may = pruner.floor(portion)[0] if pruner.nested else None
    if may is not None and pooling == "avg":
        score.masked_fill_(~may, 0.0)
    share = None
    if portion.gone:
        (there,) = portion.scratch(1)
        portion.fill_gone([there.fill_(1.0)], 0.0)
        share = pool_blocks(target.by_outputs(there), size, "avg")
        portion.fill_gone([score], 0.0 if pooling == "avg" else -math.inf)
    pooled = pool_blocks(target.by_outputs(score), size, pooling)
    if share is not None and pooling == "avg":
        pooled = pooled / share
    if may is not None:
        whole = pool_blocks(target.by_outputs(may.to(torch.float32)), size, "max")
        pooled = pooled.masked_fill(whole == 0, -math.inf)
    if share is not None:  # last: what does not count must not, pruned or not
        pooled = pooled.masked_fill(share == 0, math.inf)
    left = pruner.storage.left_of(target, size)
    if not left:
        return torch.ones_like(score, dtype=torch.bool)
    threshold = pruner.threshold(target.name, pooled, pruner.count_removed(density, left))
    return target.back(expand_blocks(_above(pruner, pooled, threshold), size))


def _above(pruner: Scorer, score: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    return score > threshold if pruner.inclusive else score >= threshold


class LateNumbers:
    """The threshold and the number of kept weights, as of the last mask whose numbers have arrived.

    Args:
        device: where :meth:`write` gets them from.
        last: what :meth:`read` gives before anything has arrived.
    """

    def __init__(self, device: torch.device, last: tuple[float, ...] = (math.nan, math.nan)) -> None:
        self.last, self.device = last, device
        self._cuda = device.type == "cuda"
        self._host = torch.empty(len(last), dtype=torch.float64, pin_memory=self._cuda)
        self._event: Optional[torch.cuda.Event] = None

    def write(self, *numbers: torch.Tensor) -> None:
        """Send as many 0-dimensional tensors as ``last`` has numbers on their way."""
        self.read()
        self._host.copy_(torch.stack([number.double() for number in numbers]), non_blocking=True)
        if self._cuda:
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self.last = self._arrived()

    def read(self) -> tuple[float, ...]:
        """The numbers, such as the threshold and the number of kept weights."""
        if self._event is not None and self._event.query():
            self.last, self._event = self._arrived(), None
        return self.last

    def _arrived(self) -> tuple[float, ...]:
        return tuple(self._host.tolist())
