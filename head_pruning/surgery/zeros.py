"""The weights that belong to heads: which they are, and zeroing those of removed heads.

The model keeps its shapes then, and plain frameworks load it.
"""

import contextlib
from typing import Any, Iterator, Optional

import numpy as np
import torch
from torch import nn

from ..compact.slices import QUERIES
from ..errors import HeadPruningError
from ..masks import HeadMask
from ..unit_map import FeedForwardSite, Site, UnitMap
from .plans import Blocks, SitePlan, get_tensor, plan_of


class HeadWeights:
    """Which slices of a model's tensors belong to one head alone.

    These are what the unit map's planner says. Without one, or where it refuses, they are the columns of the output
    projections, and the rows of query, key and value where each has a projection of its own and no norm spans the
    heads; of feed-forward units the columns, and the rows of projections that are not fused. What several sites share
    (one parameter in several places) belongs to the heads of all of them.

    Args:
        model: the model, or a tree of modules that hold nothing but its tensors.
        unit_map: its sites.

    """

    def __init__(self, model: nn.Module, unit_map: UnitMap) -> None:
        self._model, self._unit_map = model, unit_map
        self._names: dict[int, str] = {}
        self._several: set[int] = set()  # tensors of several names, so perhaps of several sites
        many: dict[str, Any] = {"remove_duplicate": False}
        for name, tensor in (*model.named_parameters(**many), *model.named_buffers(**many)):
            if self._names.setdefault(id(tensor), name) != name:
                self._several.add(id(tensor))
        # Of each site that was asked for: tensors, dimensions, and along them the head, or -1 for what heads share.
        self._parts: dict[str, list[tuple[torch.Tensor, int, np.ndarray]]] = {}

    def gone(self, keep: np.ndarray) -> Iterator[tuple[str, torch.Tensor, int, torch.Tensor]]:
        """What belongs to heads that go, as ``(name, tensor, dimension, places along it)``, each place once.

        Args:
            keep: ``bool[N]``: the heads that stay.

        Raises:
            HeadPruningError: the map is of another model.
        """
        for site, where in self._unit_map.slices():
            for tensor, dim, gone in self._lost(site, keep[where]):
                for _, earlier, held, stay in self._sharing(site, tensor, dim, keep):
                    gone &= ~(held if earlier else stay)
                if gone.any():
                    yield self._names[id(tensor)], tensor, dim, torch.from_numpy(np.flatnonzero(gone))

    def disagreement(self, keep: np.ndarray) -> Optional[tuple[str, str]]:
        """Names of a site and of another that keeps what the first would lose of the output projection they share.

        Arguments and errors are those of :meth:`gone`.
        """
        for site, where in self._unit_map.slices():
            for tensor, dim, gone in self._lost(site, keep[where]):
                out = tensor is _plain(self._model.get_submodule(site.out_proj)).weight
                for other, _, _, stay in self._sharing(site, tensor, dim, keep):
                    if out and (gone & stay).any():
                        return site.name, other
        return None

    def _lost(self, site: Site, keep: np.ndarray) -> Iterator[tuple[torch.Tensor, int, np.ndarray]]:
        """What belongs to the site's heads that go: tensors, dimensions, and along them ``bool``."""
        if not keep.all():
            for tensor, dim, owner in self._parts_of(site):
                yield tensor, dim, (owner >= 0) & ~keep[owner]

    def _sharing(
        self, site: Site, tensor: torch.Tensor, dim: int, keep: np.ndarray
    ) -> Iterator[tuple[str, bool, np.ndarray, np.ndarray]]:
        """The other sites that have a tensor, whether they come before, and along it what is of their heads, and of
        those of them that stay.
        """
        earlier = id(tensor) in self._several
        for other, where in self._unit_map.slices() if earlier else ():
            if other.name == site.name:
                earlier = False
                continue
            for theirs, along, owner in self._parts_of(other) if other.heads else ():
                if theirs is tensor and along == dim:
                    yield other.name, earlier, owner >= 0, (owner >= 0) & keep[where][owner]

    def _parts_of(self, site: Site) -> list[tuple[torch.Tensor, int, np.ndarray]]:
        if site.name not in self._parts:
            self._parts[site.name] = list(owned_parts(self._model, self._unit_map, site))
        return self._parts[site.name]


def owned_parts(model: nn.Module, unit_map: UnitMap, site: Site) -> Iterator[tuple[torch.Tensor, int, np.ndarray]]:
    """The tensors with slices of a site's heads, each with a dimension, and along it the head, or -1 for what heads
    share. Raises HeadPruningError: the map is of another model.
    """
    out = _plain(model.get_submodule(site.out_proj))
    dim = 0 if hasattr(out, "nf") else 1  # a Conv1D keeps its weight as [in, out]
    if out.weight.shape[dim] != site.heads * site.head_dim:
        raise HeadPruningError(
            f"{site.out_proj} reads {out.weight.shape[dim]} features, the mask says {site.heads * site.head_dim}; use "
            "a mask made for this model."
        )
    planned = unit_map.planner is not None or isinstance(site, FeedForwardSite)
    plan = plan_of(model, unit_map, site) if planned else SitePlan((), refuse="no planner")
    if not plan.refuse:
        for name, along, blocks in plan.tensors:
            owner, tensor = _owners(blocks, site.heads, plan.per_group), get_tensor(model, name)
            if owner.size == tensor.shape[along]:
                yield tensor, along, owner
        return
    heads = np.arange(site.heads)
    yield out.weight, dim, heads.repeat(site.head_dim)
    if isinstance(site, FeedForwardSite):
        for name in site.projections:
            projection = _plain(model.get_submodule(name))
            if not hasattr(projection, "nf") and len(projection.weight) == site.width:
                yield projection.weight, 0, heads
        return
    normed = any("norm" in name for name, _ in model.get_submodule(site.name).named_children())
    if normed or len(set(site.projections)) != 3:
        return
    for name in site.projections:
        projection = _plain(model.get_submodule(name))
        weight, bias = getattr(projection, "weight", None), getattr(projection, "bias", None)
        if weight is None or weight.ndim != 2 or hasattr(projection, "nf") or len(weight) % site.heads:
            continue
        for tensor in (weight,) if bias is None else (weight, bias):
            yield tensor, 0, heads.repeat(len(weight) // site.heads)


def _owners(blocks: Blocks, heads: int, per_group: int) -> np.ndarray:
    """The head that each place of a dimension belongs to, -1 where all share it."""
    found = []
    for kind, width, *some in blocks:
        if not kind:
            found.append(np.full(width, -1))
            continue
        of = np.arange(heads).repeat(per_group if kind == QUERIES else 1)
        if some:
            of = of[(of >= some[0]) & (of < some[1])]
        found.append(of.repeat(width))
    return np.concatenate(found)


def removed_slices(model: nn.Module, mask: HeadMask) -> Iterator[tuple[torch.Tensor, int, torch.Tensor]]:
    """What of a model belongs to the removed heads alone, as ``(tensor, dimension, indices along it)``.

    Args:
        model: the model, or a tree of modules that hold nothing but its tensors.
        mask: the heads that stay.

    Raises:
        HeadPruningError: the mask is of another model.
    """
    for _, tensor, dim, places in HeadWeights(model, mask.unit_map).gone(mask.keep):
        yield tensor, dim, places


def removed_counts(model: nn.Module, mask: HeadMask) -> dict[str, int]:
    """Parameter name to how many of its numbers belong to removed heads. Errors are as in :func:`removed_slices`."""
    stay: dict[str, dict[int, int]] = {}
    sizes: dict[str, torch.Size] = {}
    for name, tensor, dim, places in HeadWeights(model, mask.unit_map).gone(mask.keep):
        sizes[name], of = tensor.shape, stay.setdefault(name, {})
        of[dim] = of.get(dim, tensor.shape[dim]) - len(places)
    return {
        name: shape.numel() - torch.Size(stay[name].get(dim, length) for dim, length in enumerate(shape)).numel()
        for name, shape in sizes.items()
    }


def _plain(module: Any) -> Any:
    """The layer itself under an adapter of PEFT."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def cannot_zero(model: nn.Module, mask: HeadMask) -> str:
    """Why zeros cannot give what the model gives without the removed heads; empty: they can.

    Arguments and errors are those of :func:`removed_slices`.
    """
    found = HeadWeights(model, mask.unit_map).disagreement(mask.keep)
    if found is None:
        return ""
    one, other = found
    return (
        f"{one} and {other} share their output projection, and the mask removes heads of the first that the other "
        "keeps, which zeros in shared weights cannot say; cut the heads out (--to compact)."
    )


def refuse_inexact_zeros(model: nn.Module, mask: HeadMask) -> None:
    """Raise HeadPruningError where :func:`cannot_zero` gives a reason."""
    reason = cannot_zero(model, mask)
    if reason:
        raise HeadPruningError(reason)


def zero_heads(model: nn.Module, mask: HeadMask) -> None:
    """Zero the weights of the removed heads, in place; those that heads which stay share are left: see
    :func:`cannot_zero`. Arguments and errors are those of :func:`removed_slices`."""
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
