"""Removing heads for good: smaller tensors, equal outputs."""

import copy
import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Mapping, Optional, Sequence

import torch
from torch import nn

from .compact import ATTRIBUTE, VERSION, apply_recipe, held_heads, held_queries, stays, was
from .errors import HeadPruningError
from .gates.attach import refuse_gates
from .unit_map import AttentionSite, HeadMask, UnitMap, mask_without

# A block of a dimension: (1, width) is `width` slices per head, head after head; (1, width, first, end) is the same of
# some heads; (0, width) is shared by all heads; (2, width) is `width` slices per query head.
Blocks = tuple[tuple[int, ...], ...]

_UNGATE = "detach the session, or take the mask off, before heads are removed for good"


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
    module = model.get_submodule(projection)
    conv1d = hasattr(module, "nf")
    wide = module.weight.shape[1 if conv1d else 0]
    found = []
    for name, tensor in _own_tensors(module):
        if tensor.ndim and tensor.shape[-1 if conv1d else 0] == wide:
            found.append((f"{projection}.{name}", tensor.ndim - 1 if conv1d else 0, blocks))
    return found


def columns_of(model: nn.Module, projection: str, blocks: Blocks) -> list[tuple[str, int, Blocks]]:
    """The tensors of a projection whose inputs are ``blocks``."""
    module = model.get_submodule(projection)
    dim = 0 if hasattr(module, "nf") else 1
    return [
        (f"{projection}.{name}", dim, blocks)
        for name, tensor in _own_tensors(module)
        if tensor.shape == module.weight.shape
    ]


def _own_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


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
                f"It is not known how the {site.heads} heads of {site.name} lie in {name}; export the model masked, "
                "or give the unit map a planner that says it."
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
    for name, heads in removed.items():
        if name not in sites:
            raise HeadPruningError(f"There is no attention site {name}; the model has {', '.join(sites)}.")
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
    head_mask = head_mask.fitted(unit_map)
    recipe = _recipe(model, unit_map)
    for site, where in unit_map.slices():
        keep = head_mask.keep[where]
        if not keep.all():
            entry = _entry(recipe, model, unit_map, site)
            _keep(site.name, entry, [head for head, left in zip(held_heads(entry), keep, strict=True) if left])
    return recipe


def _recipe(model: nn.Module, unit_map: UnitMap) -> dict:
    if recipe_of(model) is not None:
        return {**copy.deepcopy(recipe_of(model)), "version": VERSION}
    return {"version": VERSION, "unit_map": json.loads(json.dumps(unit_map.to_dict())), "sites": {}}


def _entry(recipe: dict, model: nn.Module, unit_map: UnitMap, site: AttentionSite) -> dict:
    """The site's entry in the recipe, which it now has. Raises HeadPruningError where nothing can be cut out of it."""
    plan = (unit_map.planner or plain_plan)(model, site)
    entry = recipe["sites"].get(site.name)
    expanded = "its keys and values were repeated when query heads were removed"
    refuse = expanded if entry is not None and entry.get("expanded") else plan.refuse
    if refuse:
        raise HeadPruningError(f"Heads of {site.name} cannot be cut out exactly: {refuse}; export the model masked.")
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


def site_now(site: AttentionSite, entry: Mapping[str, Any]) -> AttentionSite:
    """A site of the original model as it is after the entry of a recipe; without heads where none is left."""
    heads, of = len(entry["kept"]), entry.get("per_group", 1)
    width = site.head_dim // of * len(held_queries(entry))
    if entry.get("expanded"):
        heads = len(held_queries(entry))
    return dataclasses.replace(site, heads=heads, head_dim=width // heads if heads else site.head_dim)


def sites_left(recipe: Mapping[str, Any]) -> UnitMap:
    """The sites of a compact model with the heads that they have now, also those without any."""
    original = UnitMap.from_dict(recipe["unit_map"])
    entries = recipe["sites"]
    sites = (site_now(site, entries[site.name]) if site.name in entries else site for site in original.attention)
    return dataclasses.replace(original, attention=tuple(sites))


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


def get_tensor(model: nn.Module, name: str) -> torch.Tensor:
    """The parameter or buffer of this dotted name."""
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


def recipe_of(model: nn.Module) -> Optional[dict]:
    """The recipe of the heads that were removed from ``model``; None when all are there."""
    return getattr(model, ATTRIBUTE, None)


def heads_left(model: nn.Module) -> Optional[HeadMask]:
    """Which heads of the original model are still in a compact ``model``; None when none was removed."""
    recipe = recipe_of(model)
    return None if recipe is None else heads_kept_by(recipe)


def heads_kept_by(recipe: Mapping[str, Any]) -> HeadMask:
    """Which heads of the original model a recipe keeps."""
    unit_map = UnitMap.from_dict(recipe["unit_map"])
    removed = {
        name: sorted(set(range(entry["heads"])) - set(entry["kept"])) for name, entry in recipe["sites"].items()
    }
    return mask_without(unit_map, removed)


def mask_of_original(recipe: Mapping[str, Any], mask: HeadMask) -> HeadMask:
    """``mask``, of the heads that a compact model has, as a mask of the heads of its original.

    A mask of all the original's heads is returned with the original's names.

    Args:
        recipe: that of the compact model.
        mask: of the heads there are now. Where keys were repeated for every query head, a head of the original stays
            as long as one of its query heads does.

    Raises:
        HeadPruningError: the mask is of another model.
    """
    left = heads_kept_by(recipe)
    if mask.fits(left.unit_map):
        return mask.fitted(left.unit_map)
    keep, given = left.keep.copy(), mask.fitted(sites_left(recipe)).by_site()
    for site, where in left.unit_map.slices():
        entry = recipe["sites"].get(site.name)
        there = list(range(site.heads)) if entry is None else entry["kept"]
        if entry is not None and entry.get("expanded"):
            there = [query // entry["per_group"] for query in held_queries(entry)]
        stay = {head for head, stays_there in zip(there, given.get(site.name, []), strict=True) if stays_there}
        keep[where] = [head in stay for head in range(site.heads)]
    return HeadMask(left.unit_map, keep)


def query_heads_left(recipe: Mapping[str, Any]) -> dict[str, tuple[list[int], int]]:
    """Of the sites that lost single query heads: site name to the query heads that stay, numbered as in the original
    model, and how many there were.
    """
    found = {}
    for name, entry in recipe["sites"].items():
        queries, of = held_queries(entry), entry.get("per_group", 1)
        if entry["kept"] and len(queries) < len(entry["kept"]) * of:
            found[name] = (queries, entry["heads"] * of)
    return found
