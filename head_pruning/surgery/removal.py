"""Removing heads for good: smaller tensors, equal outputs."""

import copy
import json
from typing import Mapping, Sequence

import torch
from torch import nn

from ..compact.recipe import VERSION, apply_recipe
from ..compact.slices import held_heads, held_queries, stays, was
from ..errors import HeadPruningError
from ..gates.engine.bank import refuse_gates
from ..masks import HeadMask, head_numbers
from ..unit_map import AttentionSite, Site, UnitMap
from .plans import get_tensor, plan_of
from .remaining import recipe_of

_UNGATE = "detach the session, or take the mask off, before heads are removed for good"


def remove_heads(model: nn.Module, unit_map: UnitMap, head_mask: HeadMask) -> dict:
    """Cut the heads that ``head_mask`` does not keep out of a model's tensors, in place, and so the feed-forward units
    of a mask that numbers them.

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
        HeadPruningError: the mask is of another model, the model has gates, or a site cannot be cut exactly (nothing
            is changed then).
    """
    refuse_gates(model, unit_map, _UNGATE)
    recipe = plan_recipe(model, unit_map, head_mask)
    _apply(model, unit_map, recipe)
    return recipe


def remove_query_heads(
    model: nn.Module, unit_map: UnitMap, removed: Mapping[str, Sequence[int]], *, expand: bool = False
) -> dict:
    """Cut single query heads out of groups that share keys and values, in place.

    The groups that keep query heads must keep equally many; a group without any goes. Heads are numbered as in the
    original model, group after group; those that are gone already are ignored.

    Args:
        model: as for :func:`remove_heads`.
        unit_map: its sites.
        removed: ``{site name: [query head, ...]}``.
        expand: where groups keep different numbers of query heads, repeat keys and values, one for each query head.
            Nothing more can be cut out of such a site.

    Returns:
        The recipe, as :func:`remove_heads` does.

    Raises:
        HeadPruningError: there is no such site or query head, the site's query heads share no keys or cannot be cut
            exactly, or groups would keep different numbers and ``expand`` is false (nothing is changed then).
    """
    refuse_gates(model, unit_map, _UNGATE)
    recipe = _recipe(model, unit_map)
    sites = {site.name: site for site in unit_map.attention}
    for name, listed in removed.items():
        heads = head_numbers(name, listed)
        if name not in sites:
            raise HeadPruningError(f"There is no site {name}; the model has {', '.join(sites)}.")
        entry = _entry(recipe, model, unit_map, sites[name])
        of = entry.get("per_group", 1)
        if of == 1:
            raise HeadPruningError(
                f"Single query heads cannot be cut out of {name}, because they share no keys or are tied to others in "
                "more ways; remove whole heads."
            )
        bad = [head for head in heads if not 0 <= head < entry["heads"] * of]
        if bad:
            raise HeadPruningError(
                f"{name} has the query heads 0 to {entry['heads'] * of - 1}; {bad[0]} is not one of them, give others."
            )
        left = [query for query in held_queries(entry) if query not in set(heads)] if entry["kept"] else []
        per_group = {head: sum(query // of == head for query in left) for head in entry["kept"]}
        uneven = len(set(per_group.values()) - {0}) > 1
        if uneven and not expand:
            counts = ", ".join(str(count) for count in per_group.values())
            raise HeadPruningError(
                f"The groups of {name} would keep {counts} query heads; "
                "remove equally many from each, or pass expand=True to repeat keys and values."
            )
        if left == (held_queries(entry) if entry["kept"] else []):
            continue
        _keep(name, entry, [head for head, count in per_group.items() if count])
        entry["queries"] = left if left else entry.get("queries")
        if uneven:
            entry["expanded"] = True
    _apply(model, unit_map, recipe)
    return recipe


def plan_recipe(model: nn.Module, unit_map: UnitMap, head_mask: HeadMask) -> dict:
    """The recipe that :func:`remove_heads` would apply; changes nothing. Arguments and errors are the same."""
    unit_map = unit_map.numbering(head_mask.unit_map.units)
    head_mask = head_mask.fitted(unit_map)
    recipe = _recipe(model, unit_map)
    for site, where in unit_map.slices():
        keep = head_mask.keep[where]
        if not keep.all():
            entry = _entry(recipe, model, unit_map, site)
            _keep(site.name, entry, [head for head, left in zip(held_heads(entry), keep, strict=True) if left])
    return recipe


def _recipe(model: nn.Module, unit_map: UnitMap) -> dict:
    before = recipe_of(model)
    if before is not None:
        return {**copy.deepcopy(before), "version": VERSION}
    return {"version": VERSION, "unit_map": json.loads(json.dumps(unit_map.numbering("heads").to_dict())), "sites": {}}


def _entry(recipe: dict, model: nn.Module, unit_map: UnitMap, site: Site) -> dict:
    """The site's entry in the recipe, which it now has. Raises HeadPruningError where nothing can be cut out of it."""
    plan = plan_of(model, unit_map, site)
    entry = recipe["sites"].get(site.name)
    expanded = "its keys and values were repeated when query heads were removed"
    refuse = expanded if entry is not None and entry.get("expanded") else plan.refuse
    if refuse:
        cure = "" if "; " in refuse else "; export the model masked"
        what = "Heads" if isinstance(site, AttentionSite) else "Units"
        raise HeadPruningError(f"{what} of {site.name} cannot be cut out exactly: {refuse}{cure}.")
    return recipe["sites"].setdefault(site.name, plan.entry(site.heads))


def _keep(name: str, entry: dict, kept: list[int]) -> None:
    held = held_heads(entry)
    if not kept and entry["empty"] is None:
        raise HeadPruningError(f"{name} cannot lose all of its heads; keep one of them, or export it masked.")
    entry["kept"] = kept
    if not kept and entry["empty"][1] is None:
        entry["dummy"] = held[0]


def _apply(model: nn.Module, unit_map: UnitMap, recipe: dict) -> None:
    with torch.no_grad():
        apply_recipe(model, recipe, recipe_of(model))
    if unit_map.adapt is not None:
        unit_map.adapt(model)


def removed_parameters(model: nn.Module, unit_map: UnitMap, head_mask: HeadMask) -> int:
    """How many parameters :func:`remove_heads` would remove. Arguments and errors are the same; changes nothing."""
    recipe, before = plan_recipe(model, unit_map, head_mask), recipe_of(model)
    gone: dict[int, int] = {}
    for name, entry in recipe["sites"].items():
        earlier = before["sites"].get(name) if before else None
        for tensor, dim, blocks in entry["tensors"] if earlier != entry else ():
            weight = get_tensor(model, tensor)
            if isinstance(weight, nn.Parameter):
                fewer = was(entry, earlier, blocks) - len(stays(entry, earlier, blocks))
                gone[id(weight)] = weight.numel() // weight.shape[dim] * fewer
        if earlier != entry and not held_heads(entry):
            module, options = entry["empty"]
            for parameter in _parameters(model.get_submodule(module), options["drop"]):
                gone[id(parameter)] = parameter.numel()
    return sum(gone.values())


def _parameters(module: nn.Module, names: Sequence[str]) -> list[nn.Parameter]:
    """The parameters of the modules and parameters of these dotted names."""
    dropped = tuple(f"{name}." for name in names)
    return [parameter for name, parameter in module.named_parameters() if f"{name}.".startswith(dropped)]
