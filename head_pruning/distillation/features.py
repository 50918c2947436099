"""Dual feature distillation (DFD, Neural Networks 2024): fused hidden states of the student against the teacher's.

A fused state is a sum of the states of layers, weighted by the shares that the sums of their elements have. So fusion
needs a number per layer and no copy of a state: the loss and its gradient go over the layers from the top, and hold
one fused state of each model at a time.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, Optional, Sequence

import torch

from ..errors import HeadPruningError
from ..options import require
from ..outputs import Outputs
from ..registry import register_pruner
from .logits import LogitsConfig, LogitsDistiller
from .losses import layer_pairs

#: A denominator is not taken as smaller than this share of what its parts are in absolute value.
_SMALLEST = 0.1


@dataclass
class DfdConfig(LogitsConfig):
    """Options of dual feature distillation."""

    window_size: int = field(
        default=3, metadata={"help": "layers of the student that are fused: one and those above it"}
    )
    flooding_b: float = field(
        default=0.01, metadata={"help": "level below which the task loss is pushed up again (flooding); 0: none"}
    )
    fuse_per_example: bool = field(
        default=False,
        metadata={"help": "fuse each example by its own shares; default: all by those of the batch, as published"},
    )
    published_fusion: bool = field(
        default=False,
        metadata={"help": "as the published code: shares grow without limit where sums of layers cancel out"},
    )


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
            yield i, *((far, far.numel()) if mask is None else (far * mask, mask.sum() * far.shape[-1]))


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


class DfdDistiller(LogitsDistiller):
    """Adds what the student's fused hidden states lack of its teacher's to the task loss.

    ``distill_task * (|task - b| + b) + distill_hidden * fused``, with flooding at the level b. The logits are compared
    too where ``distill_logits`` says so.
    """

    name = "dfd"
    defaults = {"logits": 0.0, "hidden": 1.0, "attention": 0.0}

    def check_options(self) -> None:
        super().check_options()
        require(self.config, "window_size", lambda value: value >= 1, "a number of layers, 1 or more")
        require(self.config, "flooding_b", lambda value: value >= 0, "0 or more")

    def loss(self, loss: torch.Tensor, inputs: Any, outputs: Outputs) -> torch.Tensor:
        level = self.config.flooding_b
        flooded = outputs.weight * ((loss / outputs.weight - level).abs() + level) if level else loss
        return super().loss(flooded, inputs, outputs)

    def compare_hidden(self, mine: Outputs, theirs: Outputs) -> torch.Tensor:
        """The fused states of each stack of layers."""
        config, terms = self.config, []
        depths = _depths(self.session.unit_map, len(mine.hidden_states))
        others = _depths(self.teacher.unit_map, len(theirs.hidden_states))
        if len(depths) != len(others):
            raise HeadPruningError("The student and its teacher have other stacks of layers; take one that is alike.")
        for (begin, end), (first, last) in zip(depths, others):
            mask = None if config.distill_padding else mine.masks[end - 1]
            terms.append(
                fused_loss(
                    mine.hidden_states[begin:end],
                    theirs.hidden_states[first:last],
                    config.window_size,
                    mask=mask,
                    layers=config.distill_layers,
                    per_example=config.fuse_per_example,
                    published=config.published_fusion,
                )
            )
        return torch.stack(terms).sum()


def _depths(unit_map: Any, states: int) -> list[tuple[int, int]]:
    """Of each stack of layers, where what comes out of its layers stands among the hidden states."""
    stacks = [
        len(list(group)) for _, group in itertools.groupby(unit_map.layers, lambda name: name.rpartition(".")[0])
    ]
    if len(stacks) == 1:  # a layer may run several times
        return [(1, states)]
    ends = list(itertools.accumulate(count + 1 for count in stacks))
    if ends[-1] != states:
        raise HeadPruningError(
            f"The model gave {states} hidden states, where its {len(stacks)} stacks of layers have {ends[-1]}; dfd "
            "cannot tell which are whose."
        )
    return [(end - count, end) for end, count in zip(ends, stacks)]


register_pruner(name="dfd", config=DfdConfig, pruner=DfdDistiller)
