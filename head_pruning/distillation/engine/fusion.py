"""Fused hidden states, and how far a student's are from its teacher's (DFD, Neural Networks 2024).

A fused state is a sum of the states of layers, weighted by the shares that the sums of their elements have. So fusion
needs a number per layer and no copy of a state: the loss and its gradient go over the layers from the top, and hold
one fused state of each model at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional, Sequence

import torch

from ...errors import HeadPruningError
from ..losses import layer_pairs

#: A denominator is not taken as smaller than this share of what its parts are in absolute value.
_SMALLEST = 0.1


def shares(sums: torch.Tensor, *, published: bool = False) -> torch.Tensor:
    """What the layers of one fusion count: ``sums`` over their total.

    Args:
        sums: ``[layers]``, or ``[layers, B]`` for a fusion of each example.
        published: divide by the total as it is; else by no less than a tenth of the sum of the absolute values, so
            that no share is above ten.
    """
    total = sums.sum(0)
    if not published:
        least = _SMALLEST * sums.abs().sum(0).detach()
        low = total.abs() < least
        total = torch.where(low, torch.where(total < 0, -least, least), total)
        total = torch.where(total == 0, torch.ones_like(total), total)
    return sums / total


class _FusedSquares(torch.autograd.Function):
    """Sum over layers of the mean squared difference of fused states, see :func:`fused_loss`.

    The gradient is computed from the states, which the models' own graphs hold anyway: nothing else is kept.
    """

    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, theirs: "_Stack", mask: Any, pairs: Any, *mine: torch.Tensor) -> Any:
        """``weights``: ``[layers, window]`` or ``[layers, window, B]``."""
        ctx.save_for_backward(weights, *mine)
        ctx.rest = theirs, mask, pairs
        terms = [far.square().sum() / size for _, far, size in _differences(weights, theirs, mask, pairs, mine)]
        return torch.stack(terms).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Of the weights and of the student's states."""
        (gradient,) = gradients
        weights, *mine = ctx.saved_tensors
        of_weights, of_states = torch.zeros_like(weights), [torch.zeros_like(state) for state in mine]
        theirs, mask, pairs = ctx.rest
        for i, far, size in _differences(weights, theirs, mask, pairs, mine):
            far = far * (2 * gradient / size)
            for place, state in enumerate(mine[i : i + weights.shape[1]]):
                j = i + place
                of_states[j] += (far * _spread(weights[i, place], far)).to(state.dtype)
                product = (far * state).flatten(1).sum(1)
                of_weights[i, place] = product if weights.dim() == 3 else product.sum()
        return of_weights, None, None, None, *of_states


@dataclass(frozen=True)
class _Stack:
    """A teacher's states, ``[B, T, width]`` each, and the shares of each layer and of the fused one above it."""

    states: Sequence[torch.Tensor]
    own: torch.Tensor
    above: torch.Tensor


def _spread(share: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A share, ``[]`` or ``[B]``, in a shape that multiplies states."""
    return share.view(-1, *[1] * (like.dim() - 1)) if share.dim() else share


def _differences(weights: torch.Tensor, theirs: _Stack, mask: Any, pairs: Any, mine: Sequence[torch.Tensor]) -> Any:
    """For each of the student's layers, from the top: its number, its fused state minus the teacher's, elements."""
    wanted: dict[int, list[int]] = {}
    for i, j in pairs:
        wanted.setdefault(j, []).append(i)
    wide = None if mask is None else torch.promote_types(mask.dtype, torch.float32)  # float16 ends at 65504
    number = None if mask is None else (mask.sum(dtype=wide) * mine[0].shape[-1]).clamp(min=1)
    fused: Optional[torch.Tensor] = None
    for j in reversed(range(len(theirs.states))):
        state = theirs.states[j]
        state = state.to(torch.promote_types(state.dtype, torch.float32))
        if fused is None:
            fused = state
        else:
            fused = state * _spread(theirs.own[j], state) + fused * _spread(theirs.above[j], state)
        for i in wanted.get(j, ()):
            far = -fused
            for place, own in enumerate(mine[i : i + weights.shape[1]]):
                far = far.addcmul(own.to(far.dtype), _spread(weights[i, place], far).to(far.dtype))
            yield i, *((far, far.numel()) if mask is None else (far * mask, number))


def fused_loss(
    mine: Sequence[torch.Tensor],
    theirs: Sequence[torch.Tensor],
    window: int,
    *,
    mask: Optional[torch.Tensor] = None,
    layers: Optional[str] = None,
    per_example: bool = False,
    published: bool = False,
) -> torch.Tensor:
    """The loss of DFD: sum over layers of the mean squared difference of the student's and the teacher's fused states.

    The teacher's are fused globally, from the top: ``F[i] = (s(T[i]) * T[i] + s(F[i+1]) * F[i+1]) / (s(T[i]) +
    s(F[i+1]))``, with s the sum of all elements; the student's locally, each with the ``window - 1`` states above it,
    the last of which counts again where there are none. Gradients flow through the student's sums, too.

    Args:
        mine: the student's hidden states, ``[B, T, width]`` each, without what goes into the first layer.
        theirs: the teacher's.
        window: layers fused locally, 1 or more.
        mask: ``bool[B, T]`` of the tokens that count; None: all.
        layers: which are compared, see :func:`~head_pruning.distillation.losses.layer_pairs`; None: all.
        per_example: sums over each example apart.
        published: see :func:`shares`.

    Raises:
        HeadPruningError: the widths differ.
    """
    if mine[0].shape != theirs[0].shape:
        raise HeadPruningError(
            f"The student's hidden states are {mine[0].shape[-1]} wide and its teacher's {theirs[0].shape[-1]}, so "
            "they cannot be compared; take a teacher of the same width."
        )
    counted = None if mask is None else mask[..., None].to(mine[0].dtype)

    def sums(states: Sequence[torch.Tensor]) -> torch.Tensor:
        dims = (1, 2) if per_example else (0, 1, 2)
        wide = torch.promote_types(states[0].dtype, torch.float32)
        return torch.stack([(s if counted is None else s * counted).sum(dims, dtype=wide) for s in states])

    last = len(mine) - 1
    own = sums(mine)
    above = torch.stack([own[[min(i + place, last) for place in range(window)]] for i in range(len(mine))])
    parts = shares(above.transpose(0, 1), published=published).transpose(0, 1)
    # The last state stands for those that are not there.
    weights = torch.stack([
        torch.stack([parts[i, place] if i + place < last else _rest(parts, i, place, last) for place in range(window)])
        for i in range(len(mine))
    ])  # fmt: skip
    with torch.no_grad():
        totals = sums(theirs)
        kept, passed, fused = [], [], totals[-1]
        for total in reversed(totals[:-1].unbind()):
            share = shares(torch.stack([total, fused]), published=published)
            kept.append(share[0])
            passed.append(share[1])
            fused = share[0] * total + share[1] * fused
        ends = [torch.ones_like(fused)], [torch.zeros_like(fused)]
        stack = _Stack(theirs, torch.stack([*reversed(kept), *ends[0]]), torch.stack([*reversed(passed), *ends[1]]))
    pairs = layer_pairs(layers, len(mine), len(theirs))
    loss: torch.Tensor = _FusedSquares.apply(weights, stack, counted, pairs, *mine)
    return loss


def _rest(parts: torch.Tensor, i: int, place: int, last: int) -> torch.Tensor:
    """The share of the last state in a fusion that counts it several times, or 0 behind it."""
    return parts[i, place:].sum(0) if i + place == last else torch.zeros_like(parts[i, place])
