"""Lock: fine-tune a pruned model while its zeros stay zeros."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Mapping

import torch

from ..errors import HeadPruningError
from ..registry import register_pruner
from .base import WeightConfig, WeightPruner
from .engine.shards import Wholes


@dataclass
class LockConfig(WeightConfig):
    """Options of lock."""


class FixedMaskPruner(WeightPruner):
    """Trains the model with masks that are there before the first update."""

    starts_anywhere = masks_frozen = masks_everywhere = True

    @property
    def drops_gradients(self) -> bool:
        return True

    def fixed_masks(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """``bool`` masks (true: stays), by parameter name, of those of the targets that are masked.

        Args:
            tensors: the targets' weights, by name; float32 master copies where the host keeps such.
        """
        raise NotImplementedError

    def plan(self) -> None:
        if self.has_mask:
            return  # resumed: the masks come with the checkpoint
        master = self.session.master_of or (lambda parameter: parameter)
        storage = self.storage
        tensors = {target.name: master(target.parameter).detach() for target in self.targets}
        masks = self.fixed_masks(Wholes(storage.ranks, tensors))
        storage.active = [target for target in self.targets if target.name in masks]
        storage.lay_out(self.session.master_of)
        for portion in storage.portions:
            mine = ((storage.active[index], start, length) for index, start, length in portion.slots)
            parts = [storage.ranks.part(masks[t.name], t.parameter)[start:][:length] for t, start, length in mine]
            storage.masks.store(portion, parts)
        self.has_mask = self.clean = self.locked = True
        self.selected = int(storage.count_kept()) / storage.number

    def final_density(self) -> float:
        return self.selected if not math.isnan(self.selected) else 1.0


class LockPruner(FixedMaskPruner):
    """Keeps the zeros that the model has at the first update; matrices without zeros are left alone.

    So are their biases: a new head starts dense. Poolers and heads with zeros are locked as the layers are. Frozen
    weights, such as those under adapters, have zeros too, which stay by themselves, and count.
    """

    name = "lock"
    needs_trained_model = True

    def fixed_masks(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        masks = {name: tensor != 0 for name, tensor in tensors.items()}
        zeros = {name for name, keep in masks.items() if not keep.all()}
        pruned = {name for name in zeros if tensors[name].dim() > 1 and self._has_pattern(name, masks[name])}
        if not pruned:
            raise HeadPruningError(
                "The model has no zeros to lock; start from a pruned one, or name its weights with --weights-include."
            )
        # New biases are all zero, of a new head too: they alone are no sign of pruning.
        modules = {name.rpartition(".")[0] for name in pruned}
        return {name: masks[name] for name in zeros if name in pruned or name.rpartition(".")[0] in modules}

    def _has_pattern(self, name: str, keep: torch.Tensor) -> bool:
        """Whether a matrix's zeros are those of pruning: outside of the layers one that is all zero is a new one."""
        return name not in self.found.outside or bool(keep.any())


register_pruner(name="lock", config=LockConfig, pruner=LockPruner)
