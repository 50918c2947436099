"""Drawing the masks of a pruner's present scores: one threshold over all weights, or tensor by tensor."""

from __future__ import annotations

import math
from typing import Any, Optional, Protocol

import numpy as np
import torch

from .portions import Portion
from .selection import Selection, Threshold, bracketed, expand_blocks, kth_smallest, n_of_m, pool_blocks
from .storage import Storage


class Scorer(Protocol):
    """What drawing asks of a weight pruner: its scores, and how it selects by them."""

    storage: Storage
    selection: Selection
    policy: str
    has_mask: bool
    signed: bool
    inclusive: bool
    config: Any

    def scores(self, portion: Portion) -> list[torch.Tensor]: ...

    def masked_scores(self, portion: Portion) -> list[torch.Tensor]: ...

    def threshold(self, name: str, score: torch.Tensor, k: int) -> torch.Tensor: ...


def draw_masks(pruner: Scorer, sparsity: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Store masks that prune the ``sparsity`` of the active weights with the lowest scores.

    Returns:
        The number of weights that stay and the threshold, 0-dimensional: minus infinity where nothing is pruned, NaN
        where tensors have thresholds of their own. Nothing waits for the device.
    """
    return (_draw_over_all if pruner.selection.scope == "global" else _draw_each)(pruner, sparsity)


def _draw_over_all(pruner: Scorer, sparsity: float) -> tuple[torch.Tensor, torch.Tensor]:
    storage, number, nested = pruner.storage, pruner.storage.number, pruner.policy == "nested"
    k = int(number * sparsity)
    if k == 0:
        for portion in storage.portions:
            storage.masks.store(portion, [torch.ones_like(value, dtype=torch.bool) for value in portion.values])
        device = storage.portions[0].device
        return torch.full((), number, device=device), torch.full((), -math.inf, device=device)
    found = _draw_by_sample(pruner, k, number) if storage.sample is not None else None
    if found is None:
        found = kth_smallest(lambda: map(pruner.masked_scores, storage.portions), k, signed=pruner.signed or nested)
        for portion in storage.portions:
            here, scores = found.value.to(portion.device, non_blocking=True), pruner.masked_scores(portion)
            if nested:
                storage.masks.store(portion, [_above(pruner, score, here) for score in scores])
            else:
                storage.masks.store_above(portion, scores, here, pruner.inclusive)
    if nested:  # what is gone stays so, also above the rank that the density asks for
        counts = [torch.count_nonzero(keep) for portion in storage.portions for keep in storage.masks.keep(portion)]
        return torch.stack([count.to(found.value.device) for count in counts]).sum(), found.value
    return number - (found.below + found.equal if pruner.inclusive else found.below), found.value


def _draw_by_sample(pruner: Scorer, k: int, number: int) -> Optional[Threshold]:
    """Select and store in one pass over the portions; None if the sample was misleading."""
    storage = pruner.storage
    between: list[tuple[Portion, int, np.ndarray, np.ndarray]] = []

    def visit(portion: Portion, taken: list[torch.Tensor], low: float, found: list) -> None:
        between.extend([(portion, i, *pair) for i, pair in enumerate(found) if pair[0].size])
        storage.masks.store_above(portion, taken, torch.tensor(low), False)

    assert storage.sample is not None
    sample = torch.cat([score.reshape(-1) for score in pruner.scores(storage.sample)]).numpy()
    found = bracketed(sample, storage.portions, pruner.scores, k, number, visit)
    if found is not None:
        value = found.value.numpy()
        for portion, i, places, taken in between:
            storage.masks.prune(portion, i, places[taken <= value if pruner.inclusive else taken < value])
    return found


def _draw_each(pruner: Scorer, sparsity: float) -> tuple[torch.Tensor, torch.Tensor]:
    storage, selection = pruner.storage, pruner.selection
    kept = torch.zeros((), dtype=torch.int64, device=storage.portions[0].device)
    for target, portion in zip(storage.active, storage.portions):
        (score,) = pruner.masked_scores(portion)
        if selection.scope == "pattern":
            # The final density is N/M; on the way there the number of zeros per group is rounded down.
            keep = n_of_m(score, int(sparsity * selection.size[0] + 1e-9), selection.size[0])
            if pruner.policy == "nested" and pruner.has_mask:
                keep &= storage.masks.keep(portion)[0]
        else:
            if selection.scope == "block":
                score = pool_blocks(score, selection.size, pruner.config.block_pooling)
            keep = _above(pruner, score, pruner.threshold(target.name, score, int(sparsity * score.numel())))
            if selection.scope == "block":
                keep = expand_blocks(keep, selection.size)
        storage.masks.store(portion, [keep])
        kept = kept + torch.count_nonzero(keep).to(kept.device, non_blocking=True)
    return kept, torch.full((), math.nan, device=kept.device)


def _above(pruner: Scorer, score: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    keep = score > threshold if pruner.inclusive else score >= threshold
    if pruner.policy == "nested":
        keep &= score > -math.inf
    return keep


class LateNumbers:
    """The threshold and the number of kept weights, as of the last mask whose numbers have arrived.

    Args:
        device: where :meth:`write` gets them from.
        last: what :meth:`read` gives before anything has arrived.
    """

    def __init__(self, device: torch.device, last: tuple[float, float] = (math.nan, math.nan)) -> None:
        self.last, self.device = last, device
        self._cuda = device.type == "cuda"
        self._host = torch.empty(2, dtype=torch.float64, pin_memory=self._cuda)
        self._event: Optional[torch.cuda.Event] = None

    def write(self, threshold: torch.Tensor, kept: torch.Tensor) -> None:
        """Send two 0-dimensional tensors on their way."""
        self.read()
        self._host.copy_(torch.stack([threshold.double(), kept.double()]), non_blocking=True)
        if self._cuda:
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self.last = self._arrived()

    def read(self) -> tuple[float, float]:
        """The threshold and the number of kept weights."""
        if self._event is not None and self._event.query():
            self.last, self._event = self._arrived(), None
        return self.last

    def _arrived(self) -> tuple[float, float]:
        threshold, kept = self._host.tolist()
        return threshold, kept
