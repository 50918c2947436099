"""What a weight pruner keeps for each weight, laid out in portions."""

from __future__ import annotations

from typing import Callable, Mapping, Optional, Sequence

import numpy as np
import torch

from ...errors import HeadPruningError
from ..files import pack_mask, unpack_mask
from .masks import TINY, BoolMasks, SignMasks
from .portions import Portion, cut_into_portions, each, sample_portion, sample_stride
from .selection import kth_smallest
from .shards import Ranks, local
from .targets import Target


class Storage:
    """Weights, float32 states and masks of the targets, cut into portions anew when the host replaces tensors.

    Where the host keeps float32 master copies, values and gradients are those of the copies, and masks are applied to
    the parameters too. Where it shards the parameters, they are those of this rank's rows; numbers of weights, and
    what checkpoints hold, are those of whole tensors.

    Args:
        targets: all that may be pruned.
        kinds: names of the float32 states with one value per weight.
        carrier: one of them whose signs hold the mask; None for masks of one byte per weight.
        retained: whether pruned weights keep their last value aside, in the state ``original``.
        whole: whether each tensor is one portion.
        sampled: whether a sample of the weights helps to find thresholds.
        fixes_zeros: whether weights that are zero at the start stay so; the state ``fixed`` is true for the others.

    Attributes:
        state: kind to parameter name to that state.
        sizes: parameter name to its number of weights.
        active: the targets that are pruned by now.
        portions: their weights and states, in pieces.
        masks: what reads and writes the portions' masks.
        sample: a portion of evenly spread weights, where one is wanted and memory allows it.
        thresholds: tensor name to what a method remembers of its threshold.
        gone: parameter name to (dimension, places along it) of what belongs to heads that are gone.
        ranks: those that hold rows of the targets.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        *,
        kinds: Sequence[str],
        carrier: Optional[str],
        retained: bool,
        whole: bool,
        sampled: bool,
        fixes_zeros: bool = False,
    ) -> None:
        self.targets = list(targets)
        self.ranks = Ranks({target.name: target.parameter for target in targets})
        self.sizes = {target.name: target.parameter.numel() for target in targets}
        self.active: list[Target] = []
        self.portions: list[Portion] = []
        self.sample: Optional[Portion] = None
        self.thresholds: dict[str, torch.Tensor] = {}
        self.masks = SignMasks(carrier) if carrier else BoolMasks()
        self.state: dict[str, dict[str, torch.Tensor]] = {}
        self.gone: dict[str, list[tuple[int, torch.Tensor]]] = {}
        self._there: dict[str, dict[int, np.ndarray]] = {}
        self.fixes_zeros = fixes_zeros
        more = [*(["original"] if retained else []), *(["fixed"] if fixes_zeros else [])]
        self._kinds = list(dict.fromkeys([*kinds, *more, self.masks.kind]))
        self._carrier, self._retained, self._whole, self._sampled = carrier, retained, whole, sampled
        self._layout: tuple = ()
        self._tensors: list[torch.Tensor] = []  # the float32 master copies where there are any
        self._owners: list[torch.Tensor] = []  # the parameters, where any tensor is a master copy; else empty
        self._sources: list[torch.Tensor] = []  # what has the gradients

    @property
    def number(self) -> int:
        """How many weights the active targets have."""
        return sum(self.sizes[target.name] for target in self.active)

    @property
    def left(self) -> int:
        """How many of them do not belong to heads that are gone."""
        return self.number if not self.gone else sum(self.left_of(target) for target in self.active)

    def left_of(self, target: Target, block: Sequence[int] = ()) -> int:
        """How many weights of a target do not belong to heads that are gone; or how many blocks of it have such.

        Args:
            target: one of the targets.
            block: outputs and inputs of a block; empty: weights.
        """
        sizes, there = list(target.parameter.shape), self._there.get(target.name, {})
        found = 1
        for dim, size in enumerate(sizes):
            of = block[target.layout.index(dim)] if block and target.layout and dim in target.layout else 1
            stay = there.get(dim)
            found *= size // of if stay is None else int(stay.reshape(-1, of).any(1).sum())
        return found

    def set_gone(self, slices: Mapping[str, Sequence[tuple[int, torch.Tensor]]]) -> None:
        """Learn what belongs to heads that are gone: parameter name to (dimension, places along it)."""
        shapes = {target.name: target.parameter.shape for target in self.targets}
        self.gone = {name: list(parts) for name, parts in slices.items() if name in shapes}
        self._there = {}
        for name, parts in self.gone.items():
            for dim, places in parts:
                stay = self._there.setdefault(name, {}).setdefault(dim, np.ones(shapes[name][dim], dtype=bool))
                stay[places.numpy()] = False
        self._place_gone()

    def _place_gone(self) -> None:
        """Cut :attr:`gone` as the portions are."""
        for portion in self.portions:
            portion.gone = []
            for number, (index, start, length) in enumerate(portion.slots):
                for dim, places in self.gone.get(self.active[index].name, ()):
                    if dim == 0:
                        begin = self.ranks.first(self.active[index].parameter) + start
                        places = places[(places >= begin) & (places < begin + length)] - begin
                    if places.numel():
                        portion.gone.append((number, dim, places.to(portion.device, non_blocking=True)))
        if self.sample is not None:
            self.sample.gone, stride = [], sample_stride(self._tensors)
            for number, target in enumerate(self.active):
                if target.name in self.gone:
                    places = self.is_gone(target).view(-1)[::stride].nonzero().flatten()
                    self.sample.gone.append((number, 0, places))

    def is_gone(self, target: Target) -> torch.Tensor:
        """``bool`` of a target's shape on the CPU: which of its weights belong to heads that are gone."""
        found = torch.zeros(target.parameter.shape, dtype=torch.bool)
        for dim, places in self.gone.get(target.name, ()):
            found.index_fill_(dim, places, True)
        return found

    def remove_gone(self) -> None:
        """Prune, in the masks, what belongs to heads that are gone."""
        for portion in self.portions:
            if portion.gone:
                keep = [mask.clone() for mask in self.masks.keep(portion)]
                portion.fill_gone(keep, False)
                self.masks.store(portion, keep)

    def lay_out(self, master_of: Optional[Callable] = None) -> None:
        """Cut values, states and masks into portions, unless they already are.

        Raises HeadPruningError when a parameter has changed its size.
        """
        sources = [master_of(target.parameter) if master_of else target.parameter for target in self.active]
        tensors, owners = list(map(local, sources)), [local(target.parameter) for target in self.active]
        layout = tuple((t.data_ptr(), t.device, t.dtype) for t in (*tensors, *(owners if master_of else ())))
        if layout == self._layout and self.active:
            return
        for target, tensor in zip(self.active, sources):
            if tensor.numel() != self.sizes[target.name] or target.parameter.numel() != self.sizes[target.name]:
                raise HeadPruningError(
                    f"{target.name} has {tensor.numel()} weights here but had {self.sizes[target.name]} when the "
                    "pruner was attached; prune weights with plain data parallelism (DDP)."
                )
        self._layout, self._tensors, self._sources = layout, [tensor.detach() for tensor in tensors], sources
        doubled = any(tensor is not owner for tensor, owner in zip(tensors, owners))
        self._owners = [owner.detach() for owner in owners] if doubled else []
        state = {kind: self._states(kind) for kind in self._kinds}
        self.portions = cut_into_portions(self._tensors, whole=self._whole)
        for portion in self.portions:
            portion.values = portion.cut(self._tensors)
            portion.state = {kind: portion.cut(tensors) for kind, tensors in state.items()}
        self.sample = sample_portion(self._tensors, state) if self._sampled and not self.ranks.several else None
        if self.gone:
            self._place_gone()

    def follow(self, targets: Sequence[Target]) -> None:
        """Take other parameters in the places of the targets': the shards that a host made of them."""
        self.ranks = Ranks({target.name: target.parameter for target in targets})
        now, self.targets = {target.name: target for target in targets}, list(targets)
        self.active = [now[target.name] for target in self.active]
        for tensors in self.state.values():
            for name, tensor in tensors.items():
                tensors[name] = self.ranks.part(tensor, now[name].parameter).clone()
        self.forget_layout()

    def forget_layout(self) -> None:
        """Have the next :meth:`lay_out` start afresh."""
        self._layout = ()

    def release(self) -> None:
        """Give all memory back."""
        self.active, self.portions, self.sample, self.state, self.thresholds = [], [], None, {}, {}
        self._layout, self._tensors, self._owners, self._sources = (), [], [], []
        self.gone, self._there = {}, {}

    def _states(self, kind: str) -> list[torch.Tensor]:
        known, found = self.state.setdefault(kind, {}), []
        for target, tensor in zip(self.active, self._tensors):
            old = known.get(target.name)
            if old is None:
                dtype = {"mask": torch.bool, "fixed": torch.bool, "original": tensor.dtype}.get(kind, torch.float32)
                # Before the first mask every weight stays.
                start = {"mask": True, "fixed": True, self._carrier: TINY}.get(kind, 0.0)
                old = torch.full_like(tensor, start, dtype=dtype)
            known[target.name] = old.to(tensor.device)
            found.append(known[target.name])
        return found

    def gradients(self) -> list[torch.Tensor]:
        """Of the active targets, in their order; zeros where there is none."""
        found = []
        for target, source in zip(self.active, self._sources):
            gradient = source.grad if source.grad is not None else target.parameter.grad
            found.append(local(torch.zeros_like(source) if gradient is None else gradient))
        return found

    def touched(self) -> list[torch.Tensor]:
        """All tensors that :meth:`apply` writes to."""
        return [*self._tensors, *self._owners]

    def apply(self, portion: Portion, *, keep_originals: bool) -> None:
        """Zero the portion's pruned weights, after putting all its values aside if ``keep_originals``."""
        if keep_originals:
            torch._foreach_copy_(portion.state["original"], portion.values)
        self.masks.apply(portion, portion.values, *([portion.cut(self._owners)] if self._owners else []))

    def apply_all(self, *, keep_originals: bool) -> None:
        """:meth:`apply` to every portion, side by side."""
        each(self.portions, lambda portion: self.apply(portion, keep_originals=keep_originals))

    def find_zeros(self, master_of: Optional[Callable] = None) -> None:
        """Learn which weights are zero, once. Raises HeadPruningError when none of a matrix is."""
        if "fixed" in self.state:
            return
        tensors = {t.name: local(master_of(t.parameter) if master_of else t.parameter) for t in self.targets}
        found = {name: tensor.detach() != 0 for name, tensor in tensors.items()}
        # New biases are zero anyway.
        zeros = torch.stack([stay.numel() - stay.count_nonzero() for stay in found.values() if stay.dim() > 1]).sum()
        if not int(self.ranks.sum(zeros)):
            raise HeadPruningError(
                "The model has no zeros for --start-from-zeros to keep; start from a pruned model, or leave it out."
            )
        self.state["fixed"] = found
        self.forget_layout()

    def zero_fixed(self) -> None:
        """Zero what was zero at the start."""
        for portion in self.portions:
            for group in (portion.values, portion.cut(self._owners) if self._owners else ()):
                for tensor, stay in zip(group, portion.state["fixed"]):
                    tensor.masked_fill_(~stay, 0.0)

    def restore_originals(self) -> None:
        """Give the pruned weights the values that were put aside."""
        for portion in self.portions:
            torch._foreach_copy_(portion.values, portion.state["original"])

    def mask_gradients(self) -> None:
        """Zero the gradients of the pruned weights."""
        gradients = self.gradients()
        for portion in self.portions:
            self.masks.apply(portion, portion.cut(gradients))

    def count_kept(self) -> torch.Tensor:
        """The number of weights that stay, without those of heads that are gone; 0-dimensional, nothing waits."""
        counts = []
        for portion in self.portions:
            keep = self.masks.keep(portion)
            if portion.gone:
                keep = [mask.clone() for mask in keep]
                portion.fill_gone(keep, False)
            counts += [torch.count_nonzero(mask) for mask in keep]
        return self.ranks.sum(torch.stack([count.to(counts[0].device, non_blocking=True) for count in counts]).sum())

    def kth_smallest(self, score: torch.Tensor, k: int) -> torch.Tensor:
        """The ``k``-th smallest score (k from 1) of one tensor, of which this rank has its rows."""
        if not self.ranks.several:
            return score.flatten().kthvalue(k).values
        return kth_smallest(lambda: [[score]], k, signed=True, total=self.ranks.sum).value

    def kept(self) -> dict[str, torch.Tensor]:
        """Parameter name to ``bool`` mask (true: stays) on the CPU, without what belongs to heads that are gone."""
        found = {t.name: torch.empty(local(t.parameter).shape, dtype=torch.bool) for t in self.active}
        for portion in self.portions:
            for (index, start, length), keep in zip(portion.slots, self.masks.keep(portion)):
                found[self.active[index].name][start : start + length] = keep.cpu()
        for target in self.active if self.ranks.several else ():
            rows = found[target.name].to(local(target.parameter).device)
            found[target.name] = self.ranks.whole(rows, target.parameter).cpu()
        for target in self.active:
            if target.name in self.gone:
                found[target.name].masked_fill_(self.is_gone(target), False)
        return found

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def active_flags(self) -> np.ndarray:
        """1.0 for each target that is pruned by now, else 0.0."""
        names = {target.name for target in self.active}
        return np.array([target.name in names for target in self.targets], dtype=float)

    def load_active_flags(self, flags: np.ndarray) -> None:
        """Restore :meth:`active_flags`. Raises HeadPruningError when they are of other targets."""
        if flags.size != len(self.targets):
            raise HeadPruningError(
                f"The checkpoint has {flags.size} pruned tensors but this run prunes {len(self.targets)}; resume with "
                "the model and the options that the run was started with."
            )
        self.active = [target for target, live in zip(self.targets, flags) if live]
        self.forget_layout()

    def tensor_names(self) -> list[str]:
        """The names in :meth:`tensor_state`."""
        states = [f"{kind}.{name}" for kind, tensors in self.state.items() for name in tensors]
        return [*states, *(f"threshold.{name}" for name in self.thresholds)]

    def tensor_state(self) -> dict[str, torch.Tensor]:
        """Averages as they are (not copies), masks packed to one bit per weight, by ``kind.parameter``.

        Of shards they are gathered on the CPU of the rank that writes, and empty on the others.
        """
        found: dict[str, torch.Tensor] = {}
        parameters = {target.name: target.parameter for target in self.targets}
        for kind, tensors in self.state.items():
            for name, tensor in tensors.items():
                tensor = self.ranks.whole(tensor, parameters[name])
                if self.ranks.writes:
                    tensor = tensor.cpu() if self.ranks.several else tensor
                    found[f"{kind}.{name}"] = pack_mask(tensor) if kind in ("mask", "fixed") else tensor
        if not self.ranks.writes:
            return {}
        found.update({f"threshold.{name}": tensor for name, tensor in self.thresholds.items()})
        return found

    def load_tensor_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore :meth:`tensor_state`. Raises HeadPruningError when it is of other tensors."""
        parameters = {target.name: target.parameter for target in self.targets}
        self.state, self.thresholds = {}, {}
        self.forget_layout()
        for key, tensor in state.items():
            kind, _, name = key.partition(".")
            if name not in parameters:
                raise HeadPruningError(
                    f"The checkpoint's pruning state has {name}, which this run does not prune; resume with the model "
                    "and the options that the run was started with."
                )
            shape, device = parameters[name].shape, parameters[name].device
            if kind == "threshold" and tensor.numel() == 1:
                self.thresholds[name] = tensor.reshape(()).to(device)
                continue
            self._check_kind(kind, name, tensor)
            if kind in ("mask", "fixed"):
                tensor = unpack_mask(tensor, shape)
            if tensor.shape != shape:
                raise HeadPruningError(
                    f"The checkpoint's pruning state of {name} has shape {list(tensor.shape)} but the model's is "
                    f"{list(shape)}; resume with the model that the run was started with."
                )
            like = torch.empty_like(local(parameters[name]), dtype=tensor.dtype)  # its strides
            self.state.setdefault(kind, {})[name] = like.copy_(self.ranks.part(tensor, parameters[name]))
        for kind in self._kinds:
            lacking = [target.name for target in self.active if target.name not in self.state.get(kind, {})]
            if lacking:
                raise HeadPruningError(
                    f"The checkpoint's pruning state lacks the {kind} of {lacking[0]}; resume with the options that "
                    "the run was started with, or from another checkpoint."
                )

    def _check_kind(self, kind: str, name: str, tensor: torch.Tensor) -> None:
        """Raise HeadPruningError unless this run keeps such a tensor."""
        packed = kind in ("mask", "fixed")
        fits = tensor.dtype == (torch.uint8 if packed else torch.float32) or kind == "original"
        if kind not in self._kinds or not fits:
            raise HeadPruningError(
                f"The checkpoint's pruning state has {kind} of {name} as {tensor.dtype}, which this run does not "
                "keep; resume with the options that the run was started with, or from another checkpoint."
            )
