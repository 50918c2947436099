"""What is left of a model whose heads were removed."""

import dataclasses
from typing import Any, Mapping, Optional

from torch import nn

from ..compact.recipe import ATTRIBUTE
from ..compact.slices import held_queries
from ..masks import HeadMask, mask_without
from ..unit_map import AttentionSite, UnitMap


def site_now(site: AttentionSite, entry: Mapping[str, Any]) -> AttentionSite:
    """A site of the original model as it is after the entry of a recipe; without heads where none is left."""
    heads, of = len(entry["kept"]), entry.get("per_group", 1)
    width = site.head_dim // of * len(held_queries(entry))
    if entry.get("expanded"):
        heads = len(held_queries(entry))
    return dataclasses.replace(site, heads=heads, head_dim=width // heads if heads else site.head_dim)


def sites_left(recipe: Mapping[str, Any]) -> UnitMap:
    """The sites of a compact model with the heads that they have now, also those without any; units are numbered where
    some were removed.
    """
    original, entries = original_of(recipe), recipe["sites"]
    sites = (site_now(site, entries[site.name]) if site.name in entries else site for site in original.attention)
    blocks = (
        dataclasses.replace(block, width=len(entries[block.name]["kept"])) if block.name in entries else block
        for block in original.feed_forward
    )
    return dataclasses.replace(original, attention=tuple(sites), feed_forward=tuple(blocks))


def original_of(recipe: Mapping[str, Any]) -> UnitMap:
    """The map of the original model; units are numbered where some were removed."""
    original = UnitMap.from_dict(recipe["unit_map"])
    cut = any(block.name in recipe["sites"] for block in original.feed_forward)
    return original.numbering("both" if cut else "heads")


def recipe_of(model: nn.Module) -> Optional[dict]:
    """The recipe of the heads that were removed from ``model``; None when all are there."""
    return getattr(model, ATTRIBUTE, None)


def heads_left(model: nn.Module) -> Optional[HeadMask]:
    """Which heads of the original model are still in a compact ``model``; None when none was removed."""
    recipe = recipe_of(model)
    return None if recipe is None else heads_kept_by(recipe)


def heads_kept_by(recipe: Mapping[str, Any]) -> HeadMask:
    """Which heads of the original model a recipe keeps."""
    unit_map = original_of(recipe)
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
    wider = {left.unit_map.units, mask.unit_map.units}
    if len(wider) > 1:
        left, mask = left.numbering("both"), mask.numbering("both")
    if mask.fits(left.unit_map):
        return mask.fitted(left.unit_map)
    keep, given = left.keep.copy(), mask.fitted(sites_left(recipe).numbering(mask.unit_map.units)).by_site()
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
