"""What transformers v5 took away, from outside of the model: ``prune_heads`` and ``head_mask``, and undoable masks."""

import contextlib
import dataclasses
import operator
from typing import Any, Iterable, Iterator, Mapping, Optional, Sequence, Union

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from head_pruning import HeadMask, HeadPruningError, UnfiredSiteError, UnitMap
from head_pruning.compact import held_queries
from head_pruning.gates import GateBank
from head_pruning.gates.attach import refuse_gates
from head_pruning.surgery import heads_left, recipe_of, remove_heads, sites_left
from head_pruning.surgery import remove_query_heads as cut_query_heads
from head_pruning.unit_map import alike, lifted, mask_without

from .loading import mark_compact
from .surgery import plan_site
from .tree import check_model
from .unit_map import unit_map as map_units

# A plain attribute of the model: neither a parameter nor a buffer nor a module, so in no state dict.
_ATTRIBUTE = "_masked_heads"
_UNGATE = "call detach() on the session that is open on the model, or leave the head_mask block, before masking heads"


class _Gates:
    """Gates on a model, and the check that the modules whose heads they scale do run."""

    def __init__(self, model: nn.Module, unit_map: UnitMap) -> None:
        self.bank = GateBank(model, unit_map)
        self.values = self.bank.evaluation_values
        self.checked = False
        self.bank.attach()
        # A bound method, as the gates' own hooks: a deep copy of the model then checks the copied gates.
        self.handle = model.register_forward_hook(self.check)

    def remove(self) -> None:
        """Leave the model as it was."""
        self.bank.detach()
        self.handle.remove()

    def check(self, model: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook of the model. In training nothing is checked, since layers may be dropped at random."""
        if self.checked or model.training:
            return
        self.bank.check_in_place(model)
        silent = set(self.bank.silent_sites())
        scaled = [
            site.name
            for site, where in self.bank.unit_map.slices()
            if site.name in silent and bool((self.values[where] != 1).any())
        ]
        if scaled:
            raise UnfiredSiteError(
                f"The gates of {', '.join(scaled)} did not run in a forward pass of the model, so the heads removed "
                "there are still at work; correct the unit map, or first run a batch that needs these modules."
            )
        self.checked = True


def prune_heads(
    model: nn.Module,
    heads: Union[Mapping[Union[int, str], Sequence[int]], HeadMask],
    *,
    unit_map: Optional[UnitMap] = None,
) -> HeadMask:
    """Remove heads for good: the model gets smaller and faster, and gives what it gives with those heads masked.

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
        original = now = unit_map or map_units(model)
    else:
        original = before.unit_map
        now = _sites_now(model)
        if unit_map is not None:
            original.check_same_heads(unit_map, "The unit map")
    mask = _mask(model, original, heads) if before is None else _mask_of_original(model, before, heads)
    if before is not None:
        mask = HeadMask(original, mask.keep & before.keep)
    keep = mask.keep if before is None else _keep_now(model, mask)
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
        name = layer if isinstance(layer, str) else _site_of_layer(units, layer)
        named.setdefault(name, []).extend(_indices(name, listed))
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
    return dataclasses.replace(sites_left(recipe_of(model)), planner=plan_site, adapt=mark_compact)


def mask_heads(
    model: nn.Module,
    heads: Union[Mapping[Union[int, str], Sequence[int]], HeadMask],
    *,
    unit_map: Optional[UnitMap] = None,
) -> HeadMask:
    """Take heads out by a mask: their outputs count as zero from now on, in training and in evaluation.

    The tensors keep their sizes, and the model's parameters, state dict and config stay as they are: what
    ``save_pretrained`` writes is the dense model, so keep the returned mask (:meth:`HeadMask.save`), or write the
    model with :func:`hf_plugin.save_pruned`. Wrap a model with PEFT first and mask it then.

    Args:
        model: any model that :func:`hf_plugin.unit_map` can map; its deep copies stay masked.
        heads: as :func:`prune_heads` takes them, a mask of the heads that are there. Added to what was masked before.
        unit_map: the sites; default: found by :func:`hf_plugin.unit_map`.

    Returns:
        The heads that stay, of all calls together.

    Raises:
        HeadPruningError: there is no such layer, site or head, a layer's index is ambiguous, the model cannot be
            mapped, or a session is open on it.
        UnfiredSiteError: raised by the first forward pass in evaluation mode in which a masked module does not run.
    """
    check_model(model)
    before = masked_heads(model)
    if unit_map is None:
        unit_map = before.unit_map if before is not None else map_units(model)
    elif before is not None:
        before.unit_map.check_same_heads(unit_map, "The unit map")
    left = heads_left(model)
    if left is not None and not isinstance(heads, HeadMask):
        mask = HeadMask(unit_map, _keep_now(model, _mask_of_original(model, left, heads)))
    else:
        mask = _mask(model, unit_map, heads)
    mask = HeadMask(unit_map, mask.keep if before is None else mask.keep & before.keep)
    held: Optional[_Gates] = vars(model).get(_ATTRIBUTE)
    refuse_gates(model, unit_map, _UNGATE, besides=None if held is None else held.bank)
    gates = _Gates(model, unit_map)
    try:
        gates.bank.set_fixed(mask.keep)
    except BaseException:
        gates.remove()
        raise
    gates.values = gates.bank.evaluation_values
    restore_heads(model)
    setattr(model, _ATTRIBUTE, gates)
    return mask


def masked_heads(model: nn.Module) -> Optional[HeadMask]:
    """The heads that :func:`mask_heads` left, or None when it masked none."""
    held: Optional[_Gates] = vars(model).get(_ATTRIBUTE)
    return None if held is None else HeadMask(held.bank.unit_map, held.values.cpu().numpy() > 0)


def restore_heads(model: nn.Module) -> None:
    """Undo :func:`mask_heads`: the model is again what it was, bit for bit. Without masked heads nothing happens."""
    held: Optional[_Gates] = vars(model).pop(_ATTRIBUTE, None)
    if held is not None:
        held.remove()


def _mask(
    model: nn.Module, unit_map: UnitMap, heads: Union[Mapping[Union[int, str], Sequence[int]], HeadMask]
) -> HeadMask:
    """What :func:`prune_heads` and :func:`mask_heads` take, as the mask of the heads that it leaves."""
    if isinstance(heads, HeadMask):
        return heads.fitted(unit_map)
    return mask_without(unit_map, _removed(model, unit_map, heads))


def _mask_of_original(
    model: nn.Module, left: HeadMask, heads: Union[Mapping[Union[int, str], Sequence[int]], HeadMask]
) -> HeadMask:
    """As :func:`_mask`, for a model that has only the heads ``left`` of the original, whose numbers count."""
    if isinstance(heads, HeadMask):
        there = [(name, len(kept)) for name, kept in left.kept_heads().items() if kept]
        if alike(there, heads.unit_map.sizes()):
            return lifted(left, heads)
    return _mask(model, left.unit_map, heads)


def _keep_now(model: nn.Module, mask: HeadMask) -> np.ndarray:
    """A mask of the original's heads for those that a compact model has now, where keys may have been repeated."""
    recipe, left = recipe_of(model), heads_left(model)
    parts = []
    for site, where in mask.unit_map.slices():
        entry = recipe["sites"].get(site.name, {})
        held = np.flatnonzero(left.keep[where])
        if entry.get("expanded"):
            held = np.array(held_queries(entry)) // entry["per_group"]
        parts.append(mask.keep[where][held])
    return np.concatenate(parts)


@contextlib.contextmanager
def head_mask(model: nn.Module, mask: Any, *, unit_map: Optional[UnitMap] = None) -> Iterator[None]:
    """Inside the block each head's output is multiplied by its entry of ``mask``, in training and in evaluation.

    Gradients flow into a tensor that requires them, through any number of passes. Heads taken out by
    :func:`mask_heads` stay out, and nested masks multiply. With gradient checkpointing the backward pass belongs
    into the block too, since it runs the layers again::

        ones = torch.ones(sites, heads, requires_grad=True)
        with head_mask(model, ones):
            model(**batch).loss.backward()
        ones.grad  # d loss / d gate

    Args:
        model: any model that :func:`hf_plugin.unit_map` can map.
        mask: a :class:`HeadMask`, or numbers (usually 0 to 1; a tensor, an array or a list) of shape
            ``[sites, heads]``, ``[heads]`` for every site alike, or ``[N]`` for all heads in the order of the unit
            map: encoder self-attention, cross-attention, decoder self-attention. Under grouped-query attention a head
            is a key/value group. As in transformers 4 also ``[sites, 1, heads, 1, 1]``, or None: no mask.
        unit_map: the sites; default: found by :func:`hf_plugin.unit_map`.

    Raises:
        HeadPruningError: the mask does not fit the model, or the model cannot be mapped.
        UnfiredSiteError: a masked module did not run in a forward pass of the model in evaluation mode.
    """
    if mask is None:
        yield
        return
    unit_map = unit_map or map_units(model)
    values = _flat(mask, unit_map)
    gates = _Gates(model, unit_map)
    try:
        gates.values = values.to(gates.bank.device, torch.float32)
        with gates.bank.reading(gates.values):
            yield
    finally:
        gates.remove()


def _removed(
    model: nn.Module, unit_map: UnitMap, heads: Mapping[Union[int, str], Sequence[int]]
) -> dict[str, list[int]]:
    """The heads to remove by site name. Raises HeadPruningError for what the model does not have."""
    sites = {site.name: site for site in unit_map.attention}
    removed: dict[str, list[int]] = {}
    if not isinstance(heads, Mapping):
        raise HeadPruningError("The heads to remove must be a dict such as {0: [1, 2]}, or a HeadMask.")
    for layer, listed in heads.items():
        name = layer if isinstance(layer, str) else _site_of_layer(unit_map, layer)
        if name not in sites:
            raise HeadPruningError(f"There is no attention site {name}; the model has {', '.join(sites)}.")
        indices = _indices(name, listed)
        bad = [head for head in indices if not 0 <= head < sites[name].heads]
        if bad:
            unit = " (key/value groups, which query heads share)" if _grouped(model) else ""
            raise HeadPruningError(
                f"{name} has the heads 0 to {sites[name].heads - 1}{unit}; {bad[0]} is not one of them, give others."
            )
        removed.setdefault(name, []).extend(indices)
    return removed


def _indices(name: str, listed: Sequence[int]) -> list[int]:
    try:
        return [operator.index(head) for head in listed]
    except TypeError:
        raise HeadPruningError(f"The heads to remove from {name} must be a list of integers.") from None


def _site_of_layer(unit_map: UnitMap, layer: Any) -> str:
    """The name of the site that a layer's index means."""
    kinds = list(unit_map.kinds())
    try:
        index = operator.index(layer)
    except TypeError:
        raise HeadPruningError(f"{layer!r} is neither a layer's index nor the name of a site; give one.") from None
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
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    groups = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None)
    return groups is not None and groups != getattr(config, "num_attention_heads", groups)


def _flat(mask: Any, unit_map: UnitMap) -> torch.Tensor:
    """``[N]`` gates from all that :func:`head_mask` takes; differentiable."""
    if isinstance(mask, HeadMask):
        return torch.from_numpy(mask.fitted(unit_map).keep)
    try:
        values = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise HeadPruningError(f"The head mask is no array of numbers ({error}); give one number per head.") from error
    if values.dim() == 5 and values.shape[1] == values.shape[3] == values.shape[4] == 1:
        values = values[:, 0, :, 0, 0]  # what transformers 4 made of a mask
    shape, sites, total = tuple(values.shape), len(unit_map.attention), unit_map.num_heads
    widths = {site.heads for site in unit_map.attention}
    if shape == (total,):
        return values
    if len(widths) == 1:
        heads = widths.pop()
        if shape in ((heads,), (sites, heads)):
            return values.expand(sites, heads).reshape(-1)
        wanted = f"[{sites}, {heads}] (sites, heads), [{heads}] or [{total}]"
    else:
        wanted = f"[{total}], since its sites differ in heads"
    raise HeadPruningError(f"The head mask has the shape {list(shape)}; the model takes {wanted}.")
