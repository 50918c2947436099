"""Losses of logits over a whole vocabulary, of which one chunk at a time is in memory.

The last layer of a language model makes ``[tokens, vocabulary]`` logits, by far the largest tensors of a step. Here a
chunk of them is made, compared, and turned into its gradient in place; what goes on to the backward pass is the
gradient of the layer's input and of its weight.
"""

from __future__ import annotations

from typing import Any, Callable, Optional, Union

import torch

from ...outputs import Late

# Logits in a chunk, and in what is worked on at once: the processor's cache holds that.
_CHUNK = {"cpu": 2**23, "cuda": 2**26}
_BLOCK = {"cpu": 2**18, "cuda": 2**23}

#: Sums the loss of a chunk's rows (from, logits) and, where asked to, turns the logits into their gradient.
_Compare = Callable[[int, torch.Tensor, bool], torch.Tensor]


def cross_entropy(logits: Union[torch.Tensor, Late], labels: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy of ``[rows, classes]`` with ``labels`` (``int64[rows]``); 0 without rows."""
    if isinstance(logits, torch.Tensor):
        return torch.nn.functional.cross_entropy(_wide(logits), labels, reduction="sum") / max(1, len(labels))

    def compare(begin: int, chunk: torch.Tensor, gradient: bool) -> torch.Tensor:
        total = _zero(chunk)
        for rows, wanted in zip(_blocks(chunk), _blocks(chunk, labels[begin : begin + len(chunk)])):
            mine = _log_softmax(rows, 1.0)
            total -= mine.gather(1, wanted[:, None]).sum()
            if gradient:
                mine.exp_().scatter_add_(1, wanted[:, None], -torch.ones_like(mine[:, :1]))
                _put(rows, mine)
        return total

    return _apply(logits, compare, 1.0) / max(1, len(labels))


def divergence(
    mine: Late, theirs: Union[torch.Tensor, Late], temperature: float, tokens: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """:func:`head_pruning.distillation.losses.divergence` of logits that are not made yet.

    Args:
        mine: ``[..., classes]`` of the student.
        theirs: the same of the teacher, made or not.
        temperature: above 0.
        tokens: ``bool[...]`` of the rows that count; None: all. On the CPU the others are not computed; elsewhere
            their loss is multiplied with 0, since finding them would wait for the device.
    """
    mine, theirs = mine.flat(), theirs.flat() if isinstance(theirs, Late) else theirs.detach().flatten(0, -2)
    weights = None if tokens is None else tokens.flatten()
    number: Union[int, torch.Tensor] = mine.shape[0] if weights is None else weights.sum().clamp(min=1)
    if weights is not None and _on_cpu(weights):
        (rows,) = weights.nonzero(as_tuple=True)
        mine, theirs, weights = mine[rows], theirs[rows], None

    targets_of = _projection(theirs) if isinstance(theirs, Late) else lambda *span: theirs[slice(*span)].clone()

    def compare(begin: int, chunk: torch.Tensor, gradient: bool) -> torch.Tensor:
        total, end = _zero(chunk), begin + len(chunk)
        targets = targets_of(begin, end)
        counts = chunk.new_ones(len(chunk)) if weights is None else weights[begin:end]
        for rows, aims, share in zip(_blocks(chunk), _blocks(targets), _blocks(chunk, counts)):
            log_aims, logs = _log_softmax(aims, temperature), _log_softmax(rows, temperature)
            aim = log_aims.exp()
            far = log_aims.sub_(logs).mul_(aim).sum(-1)
            total += far.sum() if weights is None else (far * share).sum()
            if gradient:
                logs.exp_().sub_(aim)
                _put(rows, logs if weights is None else logs.mul_(share[:, None]))
        return total

    return temperature**2 * _apply(mine, compare, 1.0 / temperature) / number


def _on_cpu(values: torch.Tensor) -> bool:
    return values.device.type == "cpu"


def _dtype(features: torch.Tensor) -> torch.dtype:
    """In which a linear layer computes here."""
    kind = features.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else features.dtype


def _projection(logits: Late) -> Callable[[int, int], torch.Tensor]:
    """Makes the logits from one row to another."""
    dtype, (weight, bias) = _dtype(logits.features), (logits.layer.weight.detach(), logits.layer.bias)
    own, shift = weight.to(dtype), None if bias is None else bias.detach().to(dtype)
    return lambda begin, end: torch.nn.functional.linear(logits.features[begin:end].to(dtype), own, shift)


def _apply(logits: Late, compare: _Compare, slope: float) -> torch.Tensor:
    layer = logits.layer
    return _Chunks.apply(logits.features, layer.weight, layer.bias, compare, slope)


class _Chunks(torch.autograd.Function):
    """The sum of ``compare`` over chunks of ``features @ weight.T + bias``; its gradients are made on the way.

    The chunks' gradients are ``slope`` times what ``compare`` leaves, a factor that is multiplied in at the end: small
    numbers would be lost in half precision.
    """

    @staticmethod
    def forward(
        ctx: Any, features: torch.Tensor, weight: torch.Tensor, bias: Any, compare: _Compare, slope: float
    ) -> torch.Tensor:
        kind = features.device.type
        dtype = _dtype(features)
        needs = ctx.needs_input_grad[:3]
        gradients = [
            torch.zeros_like(each) if each is not None and need else None
            for each, need in zip((features, weight, bias), needs)
        ]
        size = max(1, _of(_CHUNK, kind) // len(weight))
        total = _zero(features)
        with torch.autocast(kind, enabled=False):
            own, shift = weight.to(dtype), None if bias is None else bias.to(dtype)
            for begin in range(0, len(features), size):
                part = features[begin : begin + size].to(dtype)
                chunk = torch.nn.functional.linear(part, own, shift)
                total += compare(begin, chunk, any(needs))
                if gradients[0] is not None:
                    gradients[0][begin : begin + size] = chunk @ own
                if gradients[1] is not None and dtype == weight.dtype:
                    gradients[1].addmm_(chunk.T, part)
                elif gradients[1] is not None:
                    gradients[1] += chunk.T @ part
                if gradients[2] is not None:
                    gradients[2] += chunk.sum(0, dtype=gradients[2].dtype)
                del chunk
        ctx.save_for_backward(*gradients)
        ctx.slope = slope
        return total

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> tuple:
        outer = outer * ctx.slope
        return *(None if each is None else each * outer.to(each.dtype) for each in ctx.saved_tensors), None, None


def _of(sizes: dict[str, int], kind: str) -> int:
    return sizes.get(kind, sizes["cuda"])


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _zero(like: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))


def _blocks(chunk: torch.Tensor, values: Optional[torch.Tensor] = None) -> tuple[torch.Tensor, ...]:
    """The rows of a chunk, or what belongs to each, in pieces that fit the cache."""
    size = max(1, _of(_BLOCK, chunk.device.type) // chunk.shape[-1])
    return (chunk if values is None else values).split(size)


def _log_softmax(rows: torch.Tensor, temperature: float) -> torch.Tensor:
    """In place where the type is wide enough."""
    wide = _wide(rows)
    if temperature != 1.0:
        wide = wide.div_(temperature)
    return wide.sub_(wide.logsumexp(-1, keepdim=True))


def _put(rows: torch.Tensor, values: torch.Tensor) -> None:
    if values.data_ptr() != rows.data_ptr():
        rows.copy_(values)
