"""``head_mask``, which transformers v5 took away, and masks that can be undone."""

import contextlib
from typing import Any, Iterator, Mapping, Optional, Sequence, Union

import torch
from torch import nn

from head_pruning import HeadMask, HeadPruningError, UnfiredSiteError, UnitMap
from head_pruning.gates import GateBank
from head_pruning.gates.engine.bank import HeadGate, refuse_gates
from head_pruning.surgery.remaining import heads_left

from ..mapping.module_tree import check_model
from ..mapping.unit_map import unit_map as map_units
from ..saving.notices import BLOCK, MASKED, SavingNotice, watch_heads
from .named_heads import keep_now, mask_of, mask_of_left, numbering

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
        self.notice: Optional[SavingNotice] = None

    def watch(self, model: nn.Module, cure: str) -> None:
        """Have the model's state dict say that it has all heads."""
        if bool((self.values != 1).any()):
            self.notice = watch_heads(model, cure)

    def remove(self) -> None:
        """Leave the model as it was."""
        self.bank.detach()
        self.handle.remove()
        if self.notice is not None:
            self.notice.remove()

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


def mask_heads(
    model: nn.Module,
    heads: Union[Mapping[Union[int, str], Sequence[int]], HeadMask],
    *,
    unit_map: Optional[UnitMap] = None,
) -> HeadMask:
    """Take heads out by a mask: their outputs count as zero from now on, in training and in evaluation.

    The tensors keep their sizes, and the model's parameters, state dict and config stay as they are: what
    ``save_pretrained`` writes is the dense model, of which it warns once, so keep the returned mask
    (:meth:`HeadMask.save`), or write the model with :func:`hf_plugin.save_pruned`. Wrap a model with PEFT first and
    mask it then.

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
        before.unit_map.numbering(unit_map.units).check_same_heads(unit_map, "The unit map")
    unit_map = numbering(unit_map, heads)
    before = None if before is None else before.numbering(unit_map.units)
    left = heads_left(model)
    if left is not None and not isinstance(heads, HeadMask):
        mask = HeadMask(unit_map, keep_now(model, mask_of_left(model, left.numbering(unit_map.units), heads)))
    else:
        mask = mask_of(model, unit_map, heads)
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
    gates.watch(model, MASKED)
    restore_heads(model)
    setattr(model, _ATTRIBUTE, gates)
    return mask


def masked_heads(model: nn.Module) -> Optional[HeadMask]:
    """The heads that :func:`mask_heads` left, or None when it masked none."""
    held: Optional[_Gates] = vars(model).get(_ATTRIBUTE)
    return None if held is None else HeadMask(held.bank.unit_map, held.values.cpu().numpy() > 0)


def gates_of_mask(model: nn.Module) -> list[HeadGate]:
    """The gates that :func:`mask_heads` put on; none when it masked nothing."""
    held: Optional[_Gates] = vars(model).get(_ATTRIBUTE)
    return [] if held is None else [gate for _, gate in held.bank._targets]


def restore_heads(model: nn.Module) -> None:
    """Undo :func:`mask_heads`: the model is again what it was, bit for bit. Without masked heads nothing happens."""
    held: Optional[_Gates] = vars(model).pop(_ATTRIBUTE, None)
    if held is not None:
        held.remove()


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
            map: encoder self-attention, cross-attention, decoder self-attention (and feed-forward units, where the
            map numbers them). Under grouped-query attention a head
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
    unit_map = numbering(unit_map, mask) if isinstance(mask, HeadMask) else unit_map
    values = _flat(mask, unit_map)
    gates = _Gates(model, unit_map)
    try:
        gates.values = values.to(gates.bank.device, torch.float32)
        gates.watch(model, BLOCK)
        with gates.bank.reading(gates.values):
            yield
    finally:
        gates.remove()


def _flat(mask: Any, unit_map: UnitMap) -> torch.Tensor:
    """``[N]`` gates from all that :func:`head_mask` takes; differentiable."""
    if isinstance(mask, HeadMask):
        return torch.from_numpy(mask.numbering(unit_map.units).fitted(unit_map).keep)
    try:
        values = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise HeadPruningError(f"The head mask is no array of numbers ({error}); give one number per head.") from error
    if values.dim() == 5 and values.shape[1] == values.shape[3] == values.shape[4] == 1:
        values = values[:, 0, :, 0, 0]  # what transformers 4 made of a mask
    shape, sites, total = tuple(values.shape), len(unit_map.sites), unit_map.num_heads
    widths = {site.heads for site in unit_map.sites}
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
