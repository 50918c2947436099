"""Removing heads for good: smaller tensors, equal outputs."""

import copy
from dataclasses import dataclass, field
from typing import Any, Mapping, Optional

import torch
from torch import nn

from .compact import ATTRIBUTE, VERSION, apply_recipe
from .errors import HeadPruningError
from .unit_map import AttentionSite, HeadMask, UnitMap

# A block of a dimension: (1, width) is `width` slices per head, head after head; (0, width) is shared by all heads.
Blocks = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class SitePlan:
    """What of a model belongs to the heads of one site, as :mod:`head_pruning.compact` describes it.

    Args:
        tensors: ``(dotted name, dimension, blocks)`` of every parameter and buffer with slices per head.
        counts: ``(dotted attribute, what one head adds to it)``.
        select: ``(module, argument, position or None, dimension, folded)`` of arguments with a slice per head.
        empty: ``(module, options)`` of what becomes :class:`head_pruning.compact.NoHeads` when no head stays; None:
            the site cannot lose its last head.
    """

    tensors: tuple[tuple[str, int, Blocks], ...]
    counts: tuple[tuple[str, int], ...] = ()
    select: tuple[tuple[str, str, Optional[int], int, bool], ...] = ()
    empty: Optional[tuple[str, Mapping[str, Any]]] = None
    refuse: str = field(default="", compare=False)


def rows_of(model: nn.Module, projection: str, blocks: Blocks) -> list[tuple[str, int, Blocks]]:
    """The tensors of a projection whose outputs are ``blocks``: weight (Linear or Conv1D) and bias."""
    module = model.get_submodule(projection)
    conv1d = hasattr(module, "nf")
    found = [(f"{projection}.weight", 1 if conv1d else 0, blocks)]
    if getattr(module, "bias", None) is not None:
        found.append((f"{projection}.bias", 0, blocks))
    return found


def columns_of(model: nn.Module, projection: str, blocks: Blocks) -> list[tuple[str, int, Blocks]]:
    """The tensor of a projection whose inputs are ``blocks``."""
    conv1d = hasattr(model.get_submodule(projection), "nf")
    return [(f"{projection}.weight", 0 if conv1d else 1, blocks)]


def plain_plan(model: nn.Module, site: AttentionSite) -> SitePlan:
    """The plan of a site with one projection each for query, key and value, heads one after the other.

    Raises:
        HeadPruningError: a projection's width is not that of so many heads.
    """
    tensors = columns_of(model, site.out_proj, ((1, site.head_dim),))
    for name in site.projections:
        module = model.get_submodule(name)
        wide = module.weight.shape[1 if hasattr(module, "nf") else 0]
        if wide % site.heads or len(site.projections) != 3:
            raise HeadPruningError(
                f"It is not known how the {site.heads} heads of {site.name} lie in {name}; export the model masked, or "
                "give the unit map a planner that says it."
            )
        tensors += rows_of(model, name, ((1, wide // site.heads),))
    return SitePlan(tuple(tensors))


def remove_heads(model: nn.Module, unit_map: UnitMap, head_mask: HeadMask) -> dict:
    """Cut the heads that ``head_mask`` does not keep out of a model's tensors, in place.

    The compact model's outputs equal the masked model's (up to the order of float additions). Sites may keep different
    numbers of heads; where none stays, attention is the constant it has become. Heads can be removed again from a
    compact model, with its own unit map.

    Args:
        model: a model without gates, on any device.
        unit_map: its sites; its planner says what of the model belongs to which head.
        head_mask: the heads that stay.

    Returns:
        The recipe, JSON-ready: what :func:`head_pruning.compact.apply_recipe` needs to give a freshly built model the
        same shape, with the heads' numbers in the original model. The model carries it too, see :func:`recipe_of`.

    Raises:
        HeadPruningError: the mask is of another model, or a site cannot be cut exactly (nothing is changed then).
    """
    unit_map.check_same_heads(head_mask.unit_map, "The head mask")
    before = recipe_of(model)
    planner = unit_map.planner or plain_plan
    recipe: dict[str, Any] = copy.deepcopy(before) or {"version": VERSION, "sites": {}}
    for site, where in unit_map.slices():
        keep = head_mask.keep[where]
        if keep.all():
            continue
        plan = planner(model, site)
        if plan.refuse:
            raise HeadPruningError(f"Heads of {site.name} cannot be cut out: {plan.refuse}; export the model masked.")
        if not keep.any() and plan.empty is None:
            raise HeadPruningError(f"{site.name} cannot lose all of its heads; keep one of them, or export it masked.")
        known = recipe["sites"].get(site.name)
        held = known["kept"] if known else list(range(site.heads))
        entry = known or {
            "heads": site.heads,
            "tensors": [[name, dim, [list(block) for block in blocks]] for name, dim, blocks in plan.tensors],
            "counts": [list(count) for count in plan.counts],
            "select": [list(select) for select in plan.select],
            "empty": [plan.empty[0], dict(plan.empty[1])] if plan.empty else None,
        }
        recipe["sites"][site.name] = {**entry, "kept": [head for head, stays in zip(held, keep) if stays]}
    with torch.no_grad():
        apply_recipe(model, recipe, before)
    return recipe


def recipe_of(model: nn.Module) -> Optional[dict]:
    """The recipe of the heads that were removed from ``model``; None when all are there."""
    return getattr(model, ATTRIBUTE, None)
