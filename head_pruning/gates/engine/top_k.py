"""The relaxed top-K subset (Gumbel soft top-K) and its hard counterpart, in float64 on the host.

Li, Cotterell and Sachan, "Differentiable Subset Pruning of Transformer Heads" (TACL 2021), section 3.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from typing import Iterator, Optional, Sequence

import numpy as np
import torch

from ...errors import HeadPruningError

TINY = sys.float_info.min  # the smallest normal float64
# exp(-x) is exactly 0 in float64 beyond this x, so a softmax is exactly one-hot.
_ONE_HOT_GAP = 746.0


def gumbel(uniforms: np.ndarray) -> np.ndarray:
    """Standard Gumbel noise from uniforms in [0, 1), any shape."""
    return -np.log(-np.log(uniforms * (1.0 - TINY) + TINY))


@dataclass(frozen=True)
class Rounds:
    """Which heads each of the K rounds of a subset draw may pick.

    ``supports[j]`` is None (all heads) or the indices that round j chooses among. Rounds that are
    confined to a group of heads are how a minimum per group is kept, in the relaxation as in the hard mask.
    """

    supports: tuple[Optional[np.ndarray], ...]

    @property
    def free(self) -> bool:
        """Whether every round may pick any head."""
        return all(support is None for support in self.supports)

    def stages(self) -> Iterator[tuple[Optional[np.ndarray], int]]:
        """Each support with the number of rounds that choose from it."""
        for _, same in itertools.groupby(self.supports, key=id):
            supports = list(same)
            yield supports[0], len(supports)


def plan_rounds(
    num_heads: int,
    keep_heads: int,
    *,
    rows: Sequence[np.ndarray] = (),
    kinds: Sequence[np.ndarray] = (),
    min_per_row: int = 0,
    min_per_kind: int = 0,
) -> Rounds:
    """Plan K rounds that keep at least ``min_per_row`` heads of each row and ``min_per_kind`` of each kind.

    Args:
        num_heads: N.
        keep_heads: K.
        rows: flat head indices of each attention layer (disjoint).
        kinds: flat head indices of each site kind (disjoint, unions of rows).

    Raises:
        HeadPruningError: K < 1, K > N, or minima that need more than K heads.
    """
    if keep_heads < 1:
        raise HeadPruningError(
            f"{keep_heads} heads to keep leave nothing to train; give --num-of-heads from 1 to {num_heads}."
        )
    if keep_heads > num_heads:
        raise HeadPruningError(
            f"{keep_heads} heads to keep are more than the {num_heads} heads of the model; "
            f"give --num-of-heads from 1 to {num_heads}."
        )
    forced: list[np.ndarray] = []
    taken_by_row = [min(min_per_row, len(row)) for row in rows]
    for row, count in zip(rows, taken_by_row):
        forced += [row] * count
    for kind in kinds:
        already = sum(count for row, count in zip(rows, taken_by_row) if np.isin(row, kind).all())
        forced += [kind] * max(0, min(min_per_kind, len(kind)) - already)
    if len(forced) > keep_heads:
        minima = {"layer": min_per_row, "kind": min_per_kind}
        given = [f"--min-heads-per-{group} {least}" for group, least in minima.items() if least]
        raise HeadPruningError(
            f"{' and '.join(given)} {'need' if len(given) > 1 else 'needs'} {len(forced)} heads but only {keep_heads} "
            "are kept; keep more heads or lower the minimum."
        )
    return Rounds((*forced, *[None] * (keep_heads - len(forced))))


def hard_top_k(scores: np.ndarray, rounds: Rounds) -> np.ndarray:
    """The K heads with the highest scores (ties: the lower index), as ``bool[N]``, by the rounds.

    Raises:
        HeadPruningError: a score is NaN.
    """
    if np.isnan(scores).any():
        raise HeadPruningError(
            "The gate logits are NaN, so no heads can be chosen; lower --pruning-lr or --gate-clip-norm "
            "and train from the last good checkpoint."
        )
    keep = np.zeros(scores.size, dtype=bool)
    order = np.argsort(-scores, kind="stable")
    for support, count in rounds.stages():
        if support is None:
            continue
        inside = np.zeros(scores.size, dtype=bool)
        inside[support] = True
        keep[order[inside[order] & ~keep[order]][:count]] = True
    free = order[~keep[order]][: len(rounds.supports) - int(keep.sum())]
    keep[free] = True
    return keep


def _one_hot_everywhere(perturbed: np.ndarray, temperature: float, keep_heads: int) -> Optional[np.ndarray]:
    """The exact 0/1 mask when every softmax of the recursion is exactly one-hot in float64, else None."""
    order = np.argsort(-perturbed, kind="stable")
    top = perturbed[order[: keep_heads + 1]]
    if np.any(np.diff(top) > -_ONE_HOT_GAP * temperature):
        return None
    # A head that was picked goes down by -log(TINY); it must stay below every later pick.
    if top[0] + np.log(TINY) > top[keep_heads - 1] - _ONE_HOT_GAP * temperature:
        return None
    mask = np.zeros(perturbed.size)
    mask[order[:keep_heads]] = 1.0
    return mask


class SoftTopK:
    """One draw of the relaxed subset: the mask, and the closed-form gradient of its recursion.

    With r_1 = logits + noise, round j adds p_j = softmax(r_j / T) to the mask and sets
    r_(j+1) = r_j + log(max(1 - p_j, tiny)) (the paper's equations 8 to 10). The mask sums to K; single entries may
    exceed 1. No gradient of NaN or 1/0 arises: where 1 - p_j underflows the maximum's constant branch is taken.

    Args:
        perturbed: ``float64[N]`` logits plus Gumbel noise.
        rounds: which heads each round may pick.
        temperature: T > 0.
    """

    def __init__(self, perturbed: np.ndarray, rounds: Rounds, temperature: float) -> None:
        if not (perturbed < np.inf).all():
            raise HeadPruningError(
                "The gate logits are NaN or infinite; lower --pruning-lr or --gate-clip-norm "
                "and train from the last good checkpoint."
            )
        self.temperature = temperature
        exact = _one_hot_everywhere(perturbed, temperature, len(rounds.supports)) if rounds.free else None
        self.saturated = exact is not None
        if exact is not None:
            self.mask = exact
            return
        # The same operations in the same order as the published code: near saturation at T about 0.01 the recursion
        # amplifies rounding differences by many orders of magnitude (torch's log_softmax, therefore).
        self._softmaxes = np.zeros((len(rounds.supports), perturbed.size))
        current = np.array(perturbed, dtype=np.float64)
        scratch = np.empty_like(current)
        with torch.inference_mode():
            scaled = torch.from_numpy(scratch)
            shared = torch.from_numpy(self._softmaxes).unbind(0)
            for row, target, support in zip(self._softmaxes, shared, rounds.supports):
                if support is None:
                    np.divide(current, temperature, out=scratch)
                    torch.exp(torch.log_softmax(scaled, -1), out=target)
                else:
                    confined = torch.from_numpy(current[support] / temperature)
                    row[support] = torch.log_softmax(confined, -1).exp_().numpy()
                np.subtract(1.0, row, out=scratch)
                np.maximum(scratch, TINY, out=scratch)
                np.log(scratch, out=scratch)
                current += scratch
        self.mask = self._softmaxes.sum(axis=0)  # row after row, as the published code sums

    def backward(self, gradient: np.ndarray) -> np.ndarray:
        """dL/dlogits (``float64[N]``) from dL/dmask (``[N]``)."""
        if self.saturated:
            return np.zeros_like(self.mask)
        gradient = np.asarray(gradient, dtype=np.float64)
        total = np.zeros_like(gradient)
        with np.errstate(over="ignore", invalid="ignore"):
            remaining = 1.0 - self._softmaxes
            # d log(max(1 - p, tiny)) / dp is -1 / (1 - p), and 0 on the maximum's constant branch.
            through = np.divide(self._softmaxes, remaining, out=np.zeros_like(remaining), where=remaining > TINY)
            outer = self._softmaxes * gradient
            for p, direct, chained in zip(self._softmaxes[::-1], outer[::-1], through[::-1]):
                inner = direct - chained * total
                inner -= p * inner.sum()
                inner /= self.temperature
                total += inner
        return total
