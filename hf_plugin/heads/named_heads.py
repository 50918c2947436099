"""Heads as users name them: by layer, by site, or as a mask."""

from typing import Any, Mapping, Sequence, Union

import numpy as np
from torch import nn

from head_pruning import HeadMask, HeadPruningError, UnitMap
from head_pruning.compact.slices import held_queries
from head_pruning.masks import head_numbers, lifted, mask_without, whole_number
from head_pruning.surgery.remaining import heads_left, recipe_of
from head_pruning.unit_map import alike


def mask_of(
    model: nn.Module, unit_map: UnitMap, heads: Union[Mapping[Union[int, str], Sequence[int]], HeadMask]
) -> HeadMask:
    """What :func:`prune_heads` and :func:`mask_heads` take, as the mask of the heads that it leaves."""
    unit_map = numbering(unit_map, heads)
    if isinstance(heads, HeadMask):
        return heads.numbering(unit_map.units).fitted(unit_map)
    return mask_without(unit_map, _removed(model, unit_map, heads))


def numbering(unit_map: UnitMap, heads: Union[Mapping[Union[int, str], Sequence[int]], HeadMask]) -> UnitMap:
    """The map that numbers all that it did, and the feed-forward units that ``heads`` tells of."""
    blocks = {site.name for site in unit_map.feed_forward}
    if isinstance(heads, HeadMask):
        told = heads.unit_map.units
    else:
        told = "both" if isinstance(heads, Mapping) and blocks.intersection(heads) else "heads"
    return unit_map if told == unit_map.units else unit_map.numbering("both")


def mask_of_left(
    model: nn.Module, left: HeadMask, heads: Union[Mapping[Union[int, str], Sequence[int]], HeadMask]
) -> HeadMask:
    """As :func:`mask_of`, for a model that has only the heads ``left`` of the original, whose numbers count."""
    if isinstance(heads, HeadMask):
        same = left.numbering(heads.unit_map.units)
        there = [(name, len(kept)) for name, kept in same.kept_heads().items() if kept]
        if alike(there, heads.unit_map.sizes()):
            return lifted(same, heads).numbering(left.unit_map.units)
    return mask_of(model, left.unit_map, heads)


def keep_now(model: nn.Module, mask: HeadMask) -> np.ndarray:
    """A mask of the original's heads for those that a compact model has now, where keys may have been repeated."""
    recipe, left = recipe_of(model), heads_left(model)
    assert recipe is not None and left is not None  # of a compact model
    left, parts = left.numbering(mask.unit_map.units), []
    for site, where in mask.unit_map.slices():
        entry = recipe["sites"].get(site.name, {})
        held = np.flatnonzero(left.keep[where])
        if entry.get("expanded"):
            held = np.array(held_queries(entry)) // entry["per_group"]
        parts.append(mask.keep[where][held])
    return np.concatenate(parts)


def _removed(
    model: nn.Module, unit_map: UnitMap, heads: Mapping[Union[int, str], Sequence[int]]
) -> dict[str, list[int]]:
    """The heads to remove by site name. Raises HeadPruningError for what the model does not have."""
    sites = {site.name: site for site in unit_map.sites}
    removed: dict[str, list[int]] = {}
    if not isinstance(heads, Mapping):
        raise HeadPruningError("The heads to remove must be a dict such as {0: [1, 2]}, or a HeadMask.")
    for layer, listed in heads.items():
        name = layer if isinstance(layer, str) else site_of_layer(unit_map, layer)
        if name not in sites:
            raise HeadPruningError(f"There is no site {name}; the model has {', '.join(sites)}.")
        numbers = head_numbers(name, listed)
        bad = [head for head in numbers if not 0 <= head < sites[name].heads]
        if bad:
            unit = " (key/value groups, which query heads share)" if _grouped(model) else ""
            raise HeadPruningError(
                f"{name} has the heads 0 to {sites[name].heads - 1}{unit}; {bad[0]} is not one of them, give others."
            )
        removed.setdefault(name, []).extend(numbers)
    return removed


def site_of_layer(unit_map: UnitMap, layer: Any) -> str:
    """The name of the site that a layer's index means."""
    kinds = list(unit_map.kinds())
    index = whole_number(layer)
    if index is None:
        raise HeadPruningError(f"{layer!r} is neither a layer's index nor the name of a site; give one.")
    if len(kinds) > 1:
        raise HeadPruningError(
            f"Layer {index} is ambiguous in a model with {', '.join(kinds)} attention; name the site, such as "
            f"{unit_map.attention[0].name}."
        )
    if not 0 <= index < len(unit_map.attention):
        raise HeadPruningError(
            f"The model has the attention layers 0 to {len(unit_map.attention) - 1}; {index} is not one of them, "
            "give another."
        )
    return unit_map.attention[index].name


def _grouped(model: nn.Module) -> bool:
    """Whether the model's query heads share keys and values."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    groups = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None)
    return groups is not None and groups != getattr(config, "num_attention_heads", groups)
