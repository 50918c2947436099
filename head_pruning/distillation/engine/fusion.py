"""Fused hidden states, and how far a student's are from its teacher's (DFD, Neural Networks 2024).

A fused state is a sum of the states of layers, weighted by the shares that the sums of their elements have. So all
fused states are one small matrix times the states, which needs no copy of them: the loss and its gradient are computed
for some tokens at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Iterator, Optional, Sequence

import torch

from ...errors import HeadPruningError
from ..losses import layer_pairs

#: A denominator is not taken as smaller than this share of what its parts are in absolute value.
_SMALLEST = 0.1
#: Numbers that may be alive at a time in any case: a GPU waits for each small operation longer than it works on it.
_AT_ONCE = {"cpu": 2**19, "cuda": 2**24}


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


@dataclass(frozen=True)
class _Goal:
    """What the student's states are compared with; no gradient flows here.

    Attributes:
        states: the teacher's, ``[B, T, width]`` each.
        mixed: ``[B, pairs, layers]``, how much of each is in each fused state.
        mask: ``[B, T]``; None: all tokens.
        number: of elements that a mean is over.
    """

    states: Sequence[torch.Tensor]
    mixed: torch.Tensor
    mask: Optional[torch.Tensor]
    number: Any


class _FusedSquares(torch.autograd.Function):
    """Sum over pairs of the mean squared difference of fused states, see :func:`fused_loss`.

    The gradient is computed from the states, which the models' own graphs hold anyway: nothing else is kept.
    """

    @staticmethod
    def forward(ctx: Any, mixed: torch.Tensor, goal: _Goal, *mine: torch.Tensor) -> Any:
        """``mixed``: ``[B, pairs, layers]``, how much of each of the student's states is in each fused one."""
        ctx.save_for_backward(mixed, *mine)
        ctx.goal = goal
        with _as_it_is(mixed):
            squares = [_differences(mixed, goal, mine, some)[1].square_().sum() for some in _slices(mixed, goal, mine)]
            return torch.stack(squares).sum() / goal.number

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Of ``mixed`` and of the student's states."""
        mixed, *mine = ctx.saved_tensors
        of_mixed, of_states = torch.zeros_like(mixed), [torch.empty_like(state) for state in mine]
        with _as_it_is(mixed):
            for some in _slices(mixed, ctx.goal, mine):
                states, far = _differences(mixed, ctx.goal, mine, some)
                far *= 2 * gradients[0] / ctx.goal.number
                of_mixed.baddbmm_(far, states.transpose(1, 2))
                torch.bmm(mixed.transpose(1, 2), far, out=states)
                for place, of_state in enumerate(of_states):
                    of_state[:, some] = states[:, place].unflatten(1, (-1, of_state.shape[-1]))
                del states, far  # before those of the next are made
        return of_mixed, None, *of_states


def _as_it_is(tensor: torch.Tensor) -> Any:
    """Autocast would round sums and products to half precision."""
    return torch.autocast(tensor.device.type, enabled=False)


def _slices(mixed: torch.Tensor, goal: _Goal, mine: Sequence[torch.Tensor]) -> Iterator[slice]:
    """Tokens for :func:`_differences`: so many that all it needs is no larger than one state, or than ``_AT_ONCE``."""
    batch, tokens, width = mine[0].shape
    of_token = (len(mine) + len(goal.states) + mixed.shape[1]) * batch * width
    one_state = batch * tokens * width * mine[0].element_size() // mixed.element_size()
    step = max(1, max(one_state, _AT_ONCE.get(mixed.device.type, 0)) // of_token)
    return (slice(begin, begin + step) for begin in range(0, tokens, step))


def _differences(
    mixed: torch.Tensor, goal: _Goal, mine: Sequence[torch.Tensor], some: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of some tokens: the student's states, ``[B, layers, n]``; how far the fused ones are, ``[B, pairs, n]``."""
    states = torch.stack([state[:, some] for state in mine], 1).to(mixed.dtype).flatten(2)
    theirs = torch.stack([state[:, some] for state in goal.states], 1).to(mixed.dtype).flatten(2)
    far = torch.bmm(mixed, states).baddbmm_(goal.mixed, theirs, alpha=-1)
    if goal.mask is not None:
        far.unflatten(2, (-1, mine[0].shape[-1])).mul_(goal.mask[:, None, some, None])
    return states, far


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
    wide = torch.promote_types(mine[0].dtype, torch.float32)
    batch, tokens, width = mine[0].shape
    counted = None if mask is None else mask.to(wide)

    def sums(states: Sequence[torch.Tensor]) -> torch.Tensor:
        of_tokens = torch.stack([state.sum(-1, dtype=wide) for state in states])
        return (of_tokens if counted is None else of_tokens * counted).sum(2 if per_example else (1, 2))

    def of_examples(mixed: torch.Tensor) -> torch.Tensor:
        return mixed.permute(2, 0, 1) if per_example else mixed.expand(batch, *mixed.shape)

    pairs = layer_pairs(layers, len(mine), len(theirs))
    with _as_it_is(mine[0]):
        local, top = _windows(sums(mine), window, published), _from_the_top(sums(theirs).detach(), published)
    goal = _Goal(
        theirs,
        of_examples(torch.stack([top[j] for _, j in pairs])),  # an index of a list would wait for the device
        counted,
        batch * tokens * width if counted is None else (counted.sum() * width).clamp(min=1),
    )
    mixed = of_examples(torch.stack([local[i] for i, _ in pairs]))
    loss: torch.Tensor = _FusedSquares.apply(mixed, goal, *mine)
    return loss


def _from_the_top(totals: torch.Tensor, published: bool) -> torch.Tensor:
    """How much of each state (last) is in each globally fused one (first), from the sums of the states.

    Args:
        totals: ``[layers]`` or ``[layers, B]``.
        published: see :func:`shares`.
    """
    mixed = torch.zeros(len(totals), *totals.shape, dtype=totals.dtype, device=totals.device)
    mixed[-1, -1] = 1
    fused = totals[-1]
    for i in reversed(range(len(totals) - 1)):
        own, above = shares(torch.stack([totals[i], fused]), published=published)
        mixed[i] = above * mixed[i + 1]
        mixed[i, i] += own
        fused = own * totals[i] + above * fused
    return mixed


def _windows(totals: torch.Tensor, window: int, published: bool) -> torch.Tensor:
    """The same of locally fused states, with gradients. The last state stands for those that are not there."""
    layers = torch.arange(len(totals), device=totals.device)
    taken = (layers[:, None] + torch.arange(window, device=totals.device)).clamp(max=len(totals) - 1)
    parts = shares(totals[taken].transpose(0, 1), published=published).transpose(0, 1)
    chosen = (taken[..., None] == layers).view(*taken.shape, -1, *[1] * (totals.dim() - 1))
    return (parts[:, :, None] * chosen).sum(1)
