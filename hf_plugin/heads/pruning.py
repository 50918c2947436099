"""``prune_heads``, which transformers v5 took away: heads removed for good."""

import dataclasses
from typing import Iterable, Mapping, Optional, Sequence, Union

from torch import nn
from transformers import PreTrainedModel

from head_pruning import HeadMask, HeadPruningError, UnitMap
from head_pruning.compact.slices import held_queries
from head_pruning.masks import head_numbers
from head_pruning.surgery.remaining import heads_left, recipe_of, sites_left
from head_pruning.surgery.removal import remove_heads
from head_pruning.surgery.removal import remove_query_heads as cut_query_heads

from ..compact.quantizer import mark_compact
from ..mapping.head_plans import plan_site
from ..mapping.module_tree import check_model
from ..mapping.unit_map import unit_map as map_units
from .named_heads import keep_now, mask_of, mask_of_left, numbering, site_of_layer


def prune_heads(
    model: nn.Module,
    heads: Union[Mapping[Union[int, str], Sequence[int]], HeadMask],
    *,
    unit_map: Optional[UnitMap] = None,
) -> HeadMask:
    """Remove heads for good: the model gets smaller and faster, and gives what it gives with those heads masked.

    Units of feed-forward blocks are removed as heads are: by the names of the blocks that the unit map lists, or by a
    mask that numbers them (:meth:`UnitMap.numbering`).

    Sites may keep different numbers of heads, also none. ``save_pretrained`` and ``from_pretrained`` work as before.
    Heads are numbered as in the original model, as in transformers 4: a model can be pruned again, and heads that are
    gone already are ignored. To undo, or to compare, use :func:`mask_heads`.

    Args:
        model: any model that :func:`hf_plugin.unit_map` can map, without adapters, quantization or gates.
        heads: ``{layer: [head, ...]}`` with the layer's index, as in transformers 4, for models with one kind of
            attention; ``{site name: [head, ...]}`` for all models; or a mask of the original model's heads, or of
            those that are left, whose missing heads are removed. Under grouped-query attention a head is a key/value
            group: its key, its value and the queries that share them.
        unit_map: the sites of the original model; default: found by :func:`hf_plugin.unit_map`.

    Returns:
        Which heads of the original model stay, of all calls together.

    Raises:
        HeadPruningError: there is no such layer, site or head, a layer's index is ambiguous, the model cannot be
            mapped, its heads are gated, a site cannot be cut exactly, or the model is a module of one's own around
            the one of transformers, which could not be saved; the model is unchanged then.
    """
    check_model(model)
    before = heads_left(model)
    if before is None:
        original = now = numbering(unit_map or map_units(model), heads)
    else:
        original = numbering(before.unit_map, heads)
        before, now = before.numbering(original.units), _sites_now(model).numbering(original.units)
        if unit_map is not None:
            original.check_same_heads(unit_map.numbering(original.units), "The unit map")
    mask = mask_of(model, original, heads) if before is None else mask_of_left(model, before, heads)
    if before is not None:
        mask = HeadMask(original, mask.keep & before.keep)
    keep = mask.keep if before is None else keep_now(model, mask)
    if not keep.all():
        _refuse_holder(model, [site.name for site, where in now.slices() if not keep[where].all()])
        remove_heads(model, now, HeadMask(now, keep))
        vars(model).pop("_cache", None)  # of an earlier generation, with as many heads as there were
    return mask


def remove_query_heads(
    model: nn.Module, heads: Mapping[Union[int, str], Sequence[int]], *, expand: bool = False
) -> dict[str, list[int]]:
    """Remove single query heads for good, of models whose query heads share keys and values in groups.

    What :func:`prune_heads` removes there are whole groups. Every group must keep equally many query heads; a group
    that keeps none goes.

    Args:
        model: as for :func:`prune_heads`.
        heads: ``{layer or site name: [query head, ...]}``, numbered as in the original model, group after group.
        expand: let the groups of a site keep different numbers: keys and values are repeated, one for each query
            head, so nothing of the cache is saved there, and no more heads can be removed there.

    Returns:
        Site name to the query heads that stay, of the sites that heads were removed from.

    Raises:
        HeadPruningError: there is no such site or query head, a site has no groups or cannot be cut exactly, or groups
            would keep different numbers and ``expand`` is false; the model is unchanged then.
    """
    check_model(model)
    units = map_units(model) if heads_left(model) is None else _sites_now(model)
    if not isinstance(heads, Mapping):
        raise HeadPruningError("The query heads to remove must be a dict such as {0: [1, 2]}.")
    named: dict[str, list[int]] = {}
    for layer, listed in heads.items():
        name = layer if isinstance(layer, str) else site_of_layer(units, layer)
        named.setdefault(name, []).extend(head_numbers(name, listed))
    _refuse_holder(model, named)
    recipe = cut_query_heads(model, units, named, expand=expand)
    vars(model).pop("_cache", None)
    return {name: held_queries(entry) if entry["kept"] else [] for name, entry in recipe["sites"].items()}


def _refuse_holder(model: nn.Module, names: Iterable[str]) -> None:
    """Raise HeadPruningError if sites lie in a model of transformers that ``model`` only holds.

    ``save_pretrained`` writes what a model lost beside its weights, so it is that model which must know. PEFT's
    wrappers are no such holders: they merge and unload.
    """
    if isinstance(model, PreTrainedModel) or hasattr(model, "peft_config"):
        return
    held = [name for name, inner in model.named_modules() if isinstance(inner, PreTrainedModel)]
    for name in names:
        outer = next((holder for holder in held if name.startswith(f"{holder}.")), None)
        if outer is not None:
            dotted = all(part.isidentifier() for part in outer.split("."))
            part = f"model.{outer}" if dotted else f'model.get_submodule("{outer}")'
            raise HeadPruningError(
                f"{name} lies in a model of transformers, which could not be saved if heads were removed through the "
                f"{type(model).__name__} around it; pass {part} itself."
            )


def pruned_heads(model: nn.Module) -> Optional[HeadMask]:
    """Which heads of the original model :func:`prune_heads` left, or None when all are there."""
    return heads_left(model)


def _sites_now(model: nn.Module) -> UnitMap:
    """The sites of a model that :func:`prune_heads` cut, with the heads that they have now, also those without any."""
    recipe = recipe_of(model)
    assert recipe is not None
    return dataclasses.replace(sites_left(recipe), planner=plan_site, adapt=mark_compact)
