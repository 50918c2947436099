"""What of a model belongs to the heads of one site."""

from dataclasses import dataclass
from typing import Any, Mapping, Optional

import torch
from torch import nn

from ..compact.recipe import get_tensor as get_tensor
from ..errors import HeadPruningError
from ..unit_map import FeedForwardSite, Site, UnitMap

# A block of a dimension: (1, width) is `width` slices per head, head after head; (1, width, first, end) is the same of
# some heads; (0, width) is shared by all heads; (2, width) is `width` slices per query head.
Blocks = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class SitePlan:
    """What of a model belongs to the heads of one site, as :mod:`head_pruning.compact` describes it.

    Args:
        tensors: ``(dotted name, dimension, blocks)`` of every parameter and buffer with slices per head.
        counts: ``(dotted attribute, what one head adds to it)``, with ``"queries"`` in third place: one query head.
        hooks: ``(kind, module, options)``, see :data:`head_pruning.compact.HOOKS`.
        empty: ``(module, options)`` of what becomes :class:`head_pruning.compact.NoHeads` when no head stays, or
            ``(output projection, None)`` for a site that keeps a dummy head then; None: the site cannot lose its last
            head.
        refuse: why no head of the site can be cut out; empty: they can.
        per_group: query heads in each head (a key/value group), where single ones can be cut out; else 1.
    """

    tensors: tuple[tuple[str, int, Blocks], ...]
    counts: tuple[tuple, ...] = ()
    hooks: tuple[tuple[str, str, Mapping[str, Any]], ...] = ()
    empty: Optional[tuple[str, Optional[Mapping[str, Any]]]] = None
    refuse: str = ""
    per_group: int = 1

    def entry(self, heads: int) -> dict[str, Any]:
        """The site's entry in a recipe, JSON-ready, with all heads kept."""
        return {
            "heads": heads,
            "kept": list(range(heads)),
            "tensors": [[name, dim, [list(block) for block in blocks]] for name, dim, blocks in self.tensors],
            "counts": [list(count) for count in self.counts],
            "hooks": [[kind, name, dict(options)] for kind, name, options in self.hooks],
            "empty": [self.empty[0], self.empty[1] and dict(self.empty[1])] if self.empty else None,
            **({"per_group": self.per_group} if self.per_group > 1 else {}),
        }


def rows_of(model: nn.Module, projection: str, blocks: Blocks) -> list[tuple[str, int, Blocks]]:
    """The tensors of a projection whose outputs are ``blocks``: weight (Linear or Conv1D), bias and buffers."""
    module: Any = model.get_submodule(projection)
    conv1d = hasattr(module, "nf")
    wide = module.weight.shape[1 if conv1d else 0]
    found = []
    for name, tensor in _own_tensors(module):
        if tensor.ndim and tensor.shape[-1 if conv1d else 0] == wide:
            found.append((f"{projection}.{name}", tensor.ndim - 1 if conv1d else 0, blocks))
    return found


def columns_of(model: nn.Module, projection: str, blocks: Blocks) -> list[tuple[str, int, Blocks]]:
    """The tensors of a projection whose inputs are ``blocks``."""
    module: Any = model.get_submodule(projection)
    dim = 0 if hasattr(module, "nf") else 1
    return [
        (f"{projection}.{name}", dim, blocks)
        for name, tensor in _own_tensors(module)
        if tensor.shape == module.weight.shape
    ]


def _own_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def unit_plan(model: nn.Module, site: FeedForwardSite) -> SitePlan:
    """The plan of a feed-forward block, whose units are rows of what makes them and columns of the output projection.

    Where one projection makes units and gates, all of one come before all of the other. A block without units keeps a
    dummy one, whose output counts as zero: then the output projection gives its bias, whatever class it has.
    """
    tensors = columns_of(model, site.out_proj, ((1, 1),))
    for name in site.projections:
        module: Any = model.get_submodule(name)
        wide = module.weight.shape[1 if hasattr(module, "nf") else 0]
        if wide % site.width:
            return SitePlan((), refuse=f"it is not known how its {site.width} units lie in {name}")
        tensors += rows_of(model, name, ((1, 1),) * (wide // site.width))
    norm = _norm_of_units(model, site)
    return SitePlan(tuple(tensors), empty=(site.out_proj, None), refuse=norm and f"{norm} normalizes over all of them")


def _norm_of_units(model: nn.Module, site: FeedForwardSite) -> str:
    """The norm between a block's projections, or nothing: it is beside them and as wide as the units alone are."""
    around = model.get_submodule(site.out_proj.rpartition(".")[0])
    hidden = get_tensor(model, f"{site.out_proj}.weight")
    for name, module in around.named_children():
        if "norm" in f"{name} {type(module).__name__}".lower() and hidden.numel() != site.width**2:
            if any(tensor.shape == (site.width,) for _, tensor in _own_tensors(module)):
                return name
    return ""


def plan_of(model: nn.Module, unit_map: UnitMap, site: Site) -> SitePlan:
    """What of a model belongs to the heads or units of a site: as the map's planner says, or :func:`plain_plan`."""
    return (unit_map.planner or plain_plan)(model, site)


def plain_plan(model: nn.Module, site: Site) -> SitePlan:
    """The plan of a site with one projection each for query, key and value, heads one after the other, or of a
    feed-forward block (:func:`unit_plan`).

    Raises:
        HeadPruningError: a projection's width is not that of so many heads.
    """
    if isinstance(site, FeedForwardSite):
        return unit_plan(model, site)
    if not site.projections:
        raise HeadPruningError(
            f"{site.name} names no projections, in whose rows the heads lie; name those of query, key and value in "
            "its AttentionSite (projections=)."
        )
    tensors = columns_of(model, site.out_proj, ((1, site.head_dim),))
    for name in site.projections:
        module: Any = model.get_submodule(name)
        wide = module.weight.shape[1 if hasattr(module, "nf") else 0]
        if wide % site.heads or len(site.projections) != 3:
            raise HeadPruningError(
                f"It is not known how the {site.heads} heads of {site.name} lie in {name}; export the model masked, "
                "or give the unit map a planner that says it."
            )
        tensors += rows_of(model, name, ((1, wide // site.heads),))
    return SitePlan(tuple(tensors))
