"""Zeroing the weights of removed heads: the model keeps its shapes, and plain frameworks load it."""

import contextlib
from typing import Any, Iterator

import torch
from torch import nn

from ..errors import HeadPruningError
from ..masks import HeadMask


def removed_slices(model: nn.Module, mask: HeadMask) -> Iterator[tuple[torch.Tensor, int, torch.Tensor]]:
    """What of a model belongs to the removed heads alone, as ``(tensor, dimension, indices along it)``.

    These are the columns of the output projections, and the rows of query, key and value where each has a projection
    of its own and no norm spans the heads.

    Args:
        model: the model, or a tree of modules that hold nothing but its tensors.
        mask: the heads that stay.

    Raises:
        HeadPruningError: the mask is of another model.
    """
    for site, where in mask.unit_map.slices():
        removed = torch.from_numpy(~mask.keep[where])
        if not removed.any():
            continue
        out = _plain(model.get_submodule(site.out_proj))
        dim = 0 if hasattr(out, "nf") else 1  # a Conv1D keeps its weight as [in, out]
        if out.weight.shape[dim] != removed.numel() * site.head_dim:
            raise HeadPruningError(
                f"{site.out_proj} reads {out.weight.shape[dim]} features, the mask says "
                f"{removed.numel() * site.head_dim}; use a mask made for this model."
            )
        yield out.weight, dim, removed.repeat_interleave(site.head_dim).nonzero().flatten()
        normed = any("norm" in name for name, _ in model.get_submodule(site.name).named_children())
        if normed or len(set(site.projections)) != 3:
            continue
        for name in site.projections:
            projection = _plain(model.get_submodule(name))
            weight, bias = getattr(projection, "weight", None), getattr(projection, "bias", None)
            if weight is None or weight.ndim != 2 or hasattr(projection, "nf") or len(weight) % removed.numel():
                continue
            rows = removed.repeat_interleave(len(weight) // removed.numel()).nonzero().flatten()
            yield weight, 0, rows
            if bias is not None:
                yield bias, 0, rows


def _plain(module: Any) -> Any:
    """The layer itself under an adapter of PEFT."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def zero_heads(model: nn.Module, mask: HeadMask) -> None:
    """Zero the weights of the removed heads, in place. Arguments and errors are those of :func:`removed_slices`."""
    for tensor, dim, index in list(removed_slices(model, mask)):
        tensor.data.index_fill_(dim, index.to(tensor.device), 0)


@contextlib.contextmanager
def zeroed_heads(model: nn.Module, mask: HeadMask) -> Iterator[None]:
    """Inside the block the weights of the removed heads are zero; afterwards they are what they were.

    Arguments and errors are those of :func:`removed_slices`.
    """
    slices = [(tensor, dim, index.to(tensor.device)) for tensor, dim, index in removed_slices(model, mask)]
    before = [tensor.data.index_select(dim, index) for tensor, dim, index in slices]
    try:
        zero_heads(model, mask)
        yield
    finally:
        for (tensor, dim, index), values in zip(reversed(slices), reversed(before)):
            tensor.data.index_copy_(dim, index, values)
