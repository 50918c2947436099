"""What a weight pruner keeps for each weight, laid out in portions."""

from __future__ import annotations

from typing import Callable, Mapping, Optional, Sequence

import numpy as np
import torch

from ...errors import HeadPruningError
from ..files import pack_mask, unpack_mask
from .masks import TINY, BoolMasks, SignMasks
from .portions import Portion, cut_into_portions, each, sample_portion
from .targets import Target, require_whole


class Storage:
    """Weights, float32 states and masks of the targets, cut into portions anew when the host replaces tensors.

    Where the host keeps float32 master copies, values and gradients are those of the copies, and masks are applied to
    the parameters too.

    Args:
        targets: all that may be pruned.
        kinds: names of the float32 states with one value per weight.
        carrier: one of them whose signs hold the mask; None for masks of one byte per weight.
        retained: whether pruned weights keep their last value aside, in the state ``original``.
        whole: whether each tensor is one portion.
        sampled: whether a sample of the weights helps to find thresholds.

    Attributes:
        state: kind to parameter name to that state.
        sizes: parameter name to its number of weights.
        active: the targets that are pruned by now.
        portions: their weights and states, in pieces.
        masks: what reads and writes the portions' masks.
        sample: a portion of evenly spread weights, where one is wanted and memory allows it.
        thresholds: tensor name to what a method remembers of its threshold.
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
    ) -> None:
        self.targets = list(targets)
        self.sizes = {target.name: target.parameter.numel() for target in targets}
        self.active: list[Target] = []
        self.portions: list[Portion] = []
        self.sample: Optional[Portion] = None
        self.thresholds: dict[str, torch.Tensor] = {}
        self.masks = SignMasks(carrier) if carrier else BoolMasks()
        self.state: dict[str, dict[str, torch.Tensor]] = {}
        self._kinds = list(dict.fromkeys([*kinds, *(["original"] if retained else []), self.masks.kind]))
        self._carrier, self._retained, self._whole, self._sampled = carrier, retained, whole, sampled
        self._layout: tuple = ()
        self._tensors: list[torch.Tensor] = []  # the float32 master copies where there are any
        self._owners: list[torch.Tensor] = []  # the parameters, where any tensor is a master copy; else empty
        self._sources: list[torch.Tensor] = []  # what has the gradients

    @property
    def number(self) -> int:
        """How many weights the active targets have."""
        return sum(self.sizes[target.name] for target in self.active)

    def lay_out(self, master_of: Optional[Callable] = None) -> None:
        """Cut values, states and masks into portions, unless they already are.

        Raises HeadPruningError when a parameter is sharded or has changed its size.
        """
        tensors = [master_of(target.parameter) if master_of else target.parameter for target in self.active]
        owners = [target.parameter for target in self.active]
        layout = tuple((t.data_ptr(), t.device, t.dtype) for t in (*tensors, *(owners if master_of else ())))
        if layout == self._layout and self.active:
            return
        for target, tensor in zip(self.active, tensors):
            require_whole(target.name, target.parameter)
            if tensor.numel() != self.sizes[target.name] or target.parameter.numel() != self.sizes[target.name]:
                raise HeadPruningError(
                    f"{target.name} has {tensor.numel()} weights here but had {self.sizes[target.name]} when the "
                    "pruner was attached; prune weights with plain data parallelism (DDP)."
                )
        self._layout, self._tensors, self._sources = layout, [tensor.detach() for tensor in tensors], tensors
        doubled = any(tensor is not owner for tensor, owner in zip(tensors, owners))
        self._owners = [owner.detach() for owner in owners] if doubled else []
        state = {kind: self._states(kind) for kind in self._kinds}
        self.portions = cut_into_portions(self._tensors, whole=self._whole)
        for portion in self.portions:
            portion.values = portion.cut(self._tensors)
            portion.state = {kind: portion.cut(tensors) for kind, tensors in state.items()}
        self.sample = sample_portion(self._tensors, state) if self._sampled else None

    def forget_layout(self) -> None:
        """Have the next :meth:`lay_out` start afresh."""
        self._layout = ()

    def release(self) -> None:
        """Give all memory back."""
        self.active, self.portions, self.sample, self.state, self.thresholds = [], [], None, {}, {}
        self._layout, self._tensors, self._owners, self._sources = (), [], [], []

    def _states(self, kind: str) -> list[torch.Tensor]:
        known, found = self.state.setdefault(kind, {}), []
        for target, tensor in zip(self.active, self._tensors):
            old = known.get(target.name)
            if old is None:
                dtype = {"mask": torch.bool, "original": tensor.dtype}.get(kind, torch.float32)
                # Before the first mask every weight stays.
                start = {"mask": True, self._carrier: TINY}.get(kind, 0.0)
                old = torch.full_like(tensor, start, dtype=dtype)
            known[target.name] = old.to(tensor.device)
            found.append(known[target.name])
        return found

    def gradients(self) -> list[torch.Tensor]:
        """Of the active targets, in their order; zeros where there is none."""
        found = []
        for target, source in zip(self.active, self._sources):
            gradient = source.grad if source.grad is not None else target.parameter.grad
            found.append(torch.zeros_like(source) if gradient is None else gradient)
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

    def restore_originals(self) -> None:
        """Give the pruned weights the values that were put aside."""
        for portion in self.portions:
            torch._foreach_copy_(portion.values, portion.state["original"])

    def mask_gradients(self) -> None:
        """Zero the gradients of the pruned weights."""
        gradients = self.gradients()
        for portion in self.portions:
            self.masks.apply(portion, portion.cut(gradients))

    def count_kept(self) -> int:
        """The number of weights that stay; waits for the device."""
        return sum(int(torch.count_nonzero(keep)) for portion in self.portions for keep in self.masks.keep(portion))

    def kept(self) -> dict[str, torch.Tensor]:
        """Parameter name to ``bool`` mask (true: stays) on the CPU."""
        found = {t.name: torch.empty(t.parameter.shape, dtype=torch.bool) for t in self.active}
        for portion in self.portions:
            for (index, start, length), keep in zip(portion.slots, self.masks.keep(portion)):
                found[self.active[index].name][start : start + length] = keep.cpu()
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

    def tensor_state(self) -> dict[str, torch.Tensor]:
        """Averages as they are (not copies), masks packed to one bit per weight, by ``kind.parameter``."""
        found: dict[str, torch.Tensor] = {}
        for kind, tensors in self.state.items():
            for name, tensor in tensors.items():
                found[f"{kind}.{name}"] = pack_mask(tensor) if kind == "mask" else tensor
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
            if kind == "threshold":
                self.thresholds[name] = tensor.to(device)
                continue
            if kind == "mask":
                tensor = unpack_mask(tensor, shape)
            if tensor.shape != shape:
                raise HeadPruningError(
                    f"The checkpoint's pruning state of {name} has shape {list(tensor.shape)} but the model's is "
                    f"{list(shape)}; resume with the model that the run was started with."
                )
            like = torch.empty_like(parameters[name], dtype=tensor.dtype)  # its strides
            self.state.setdefault(kind, {})[name] = like.copy_(tensor)
