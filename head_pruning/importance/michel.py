"""Head importance of Michel, Levy and Neubig 2019, "Are Sixteen Heads Really Better than One?" (section 4.1)."""

import contextlib
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Callable, Iterator, Mapping, Optional

import numpy as np
import torch

from ..errors import HeadPruningError
from ..gates.engine.bank import GateBank
from ..masks import HeadMask, full_mask
from ..options import MACS_PER_ROUND, require
from ..surgery.per_unit import affordable
from ..unit_map import UnitMap


class ImportanceAccumulator:
    """Sums the derivatives of batch losses with respect to the head gates.

    Args:
        gates: the attached gates of the model.
        signed: add the derivatives with their signs, as the published fairseq code does; default: absolute values.

    Use inside ``with accumulator.probing(mask)``: after each batch's ``backward()`` call :meth:`add`, for sums over
    batches; or do each batch's passes inside ``with accumulator.examples(count)``, for sums over examples.
    """

    def __init__(self, gates: GateBank, *, signed: bool = False) -> None:
        self.gates = gates
        self.signed = signed
        self.total = torch.zeros(0)

    @contextlib.contextmanager
    def probing(self, mask: HeadMask) -> Iterator["ImportanceAccumulator"]:
        """Set the gates to ``mask`` (0 or 1) and let their derivatives flow, in training and evaluation mode alike."""
        self.gates.set_training(mask.keep)
        self.mask = mask
        self.total = torch.zeros_like(self.gates.gradients, dtype=torch.float64)
        with self.gates.forced("training"):
            yield self

    def add(self) -> None:
        """Take the derivatives of the batch just backpropagated and clear them; nothing is copied to the host."""
        self._add(self.gates.gradients.double())
        self.gates.gradients.zero_()

    @contextlib.contextmanager
    def examples(self, count: int) -> Iterator[None]:
        """Forward and backward of one batch inside the block add the derivatives of each of its examples on their own.

        Each example has gates of its own, so no loop over the batch is needed (the paper's expectation is over
        examples). Backpropagate the sum of the examples' losses; a block without a backward pass adds nothing.

        Args:
            count: B, the number of examples; the inputs of the gated modules must start with that dimension.
        """
        gates = torch.as_tensor(self.mask.keep, dtype=torch.float32, device=self.gates.device)
        gates = gates.repeat(count, 1).requires_grad_(True)
        with self.gates.reading(gates):
            yield
        if gates.grad is not None:
            self._add(gates.grad.double())

    def _add(self, gradient: torch.Tensor) -> None:
        """Add ``[N]`` or, summed over its first dimension, ``[B, N]``."""
        gradient = gradient if self.signed else gradient.abs()
        self.total += gradient.reshape(-1, self.total.numel()).sum(0)

    def scores(self) -> np.ndarray:
        """``float64[N]``: the raw sums."""
        scores = self.total.cpu().numpy()
        if not np.isfinite(scores).all():
            raise HeadPruningError(
                "The head importance is not finite: the model's loss is NaN or infinite on this data."
            )
        return scores


def normalize_importance(
    scores: np.ndarray, unit_map: UnitMap, *, by_layer: bool = True, globally: bool = True
) -> np.ndarray:
    """Divide each attention layer's scores by their L2 norm, then scale all to [0, 1], as the published code does.

    Where heads and feed-forward units are numbered together, it is the root of the mean square in the place of the
    norm: a norm makes scores small where a site has many, so that units would go before any head.
    """
    scores = np.array(scores, dtype=np.float64)
    if by_layer:
        both = len(full_mask(unit_map).counts()) > 1
        for row in unit_map.rows():
            scores[row] /= np.sqrt((scores[row] ** 2).sum() / (row.size if both else 1)) + 1e-20
    if globally:
        spread = scores.max() - scores.min()
        scores = (scores - scores.min()) / spread if spread else np.zeros_like(scores)
    return scores


@dataclass(frozen=True)
class PruningRound:
    """One round: the mask after it, its score (None when not scored), and the importance it was chosen by."""

    mask: HeadMask
    score: Optional[float]
    importance: Optional[np.ndarray]

    def cost_told(self, macs: Optional[np.ndarray]) -> dict[str, float]:
        """``macs_percent``: what is left of ``macs`` (``[N]``, of each head or unit); nothing where they are None."""
        return {} if macs is None else {"macs_percent": float(100.0 * macs[self.mask.keep].sum() / macs.sum())}


def macs_words(told: Mapping[str, float]) -> str:
    """What :meth:`PruningRound.cost_told` tells, behind a number of heads in a line of the log."""
    return f", {told['macs_percent']:.2f}% of their MACs" if told else ""


def round_sizes(unit_map: UnitMap, heads_per_round: int) -> list[int]:
    """How many heads the full model and each round leave.

    Raises:
        HeadPruningError: ``heads_per_round`` is below 1, or more than the model has.
    """
    if not 1 <= heads_per_round <= unit_map.num_heads:
        raise HeadPruningError(
            f"{heads_per_round} heads per round is not possible with {unit_map.num_heads} heads; "
            f"give --num-of-heads from 1 to {unit_map.num_heads}."
        )
    return [*range(unit_map.num_heads, 0, -heads_per_round), 0]


def pruning_rounds(
    unit_map: UnitMap,
    importance: Callable[[HeadMask], np.ndarray],
    score: Callable[[HeadMask], float],
    *,
    heads_per_round: int,
    exact: bool = False,
    start: Optional[PruningRound] = None,
    costs: Optional[np.ndarray] = None,
    cost_per_round: Optional[float] = None,
) -> Iterator[PruningRound]:
    """Remove the ``heads_per_round`` least important heads per round until none is left, scoring after each round.

    With ``cost_per_round`` each round removes this share of all ``costs`` instead.

    Args:
        unit_map: the model's sites.
        importance: mask to ``[N]`` scores, called once, or once per round when ``exact``.
        score: mask to the score that is reported.
        heads_per_round: heads removed per round.
        exact: measure the importance anew after every round (``--exact-pruning``).
        start: the last round of an interrupted run, to go on after it.
        costs: ``[N]``, what each head or unit costs, such as its multiply-accumulates.
        cost_per_round: above 0, up to 1; what stays never costs more than it leaves, and at most one unit less.

    Yields:
        The full model first (unless ``start`` is given), then each round; the round that removes the last heads is
        scored too.

    Raises:
        HeadPruningError: ``heads_per_round`` is below 1, or more than the model has; ``cost_per_round`` is no share.
    """
    if cost_per_round is None:
        round_sizes(unit_map, heads_per_round)
    else:
        require(SimpleNamespace(macs_per_round=cost_per_round), *MACS_PER_ROUND)
    if start is None:
        mask = full_mask(unit_map)
        start = PruningRound(mask, score(mask), None)
        yield start
    mask, scores = start.mask, start.importance
    while mask.kept:
        if scores is None or exact:
            scores = importance(mask)
        left = np.flatnonzero(mask.keep)
        keep = mask.keep.copy()
        if costs is None or cost_per_round is None:
            keep[left[np.argsort(scores[left], kind="stable")[:heads_per_round]]] = False
        else:
            done = math.floor((1 - costs[left].sum() / costs.sum()) / cost_per_round + 1e-9)
            keep[left] = affordable(scores[left], costs[left], costs.sum() * (1 - cost_per_round * (done + 1)))
        mask = HeadMask(unit_map, keep)
        yield PruningRound(mask, score(mask), scores)
