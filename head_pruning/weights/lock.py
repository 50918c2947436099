"""Lock: fine-tune a pruned model while its zeros stay zeros."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..errors import HeadPruningError
from ..registry import register_pruner
from .base import WeightConfig, WeightPruner


@dataclass
class LockConfig(WeightConfig):
    """Options of lock."""


class LockPruner(WeightPruner):
    """Keeps the zeros that the model has at the first update; tensors without zeros are left alone.

    Frozen weights, such as those under adapters, have zeros too, which stay by themselves, and count.
    """

    name = "lock"
    needs_trained_model = starts_anywhere = masks_frozen = True

    def plan(self) -> None:
        if self.has_mask:
            return  # resumed: the masks come with the checkpoint
        master = self.session.master_of or (lambda parameter: parameter)
        found = [
            t for t in self.targets if torch.count_nonzero(master(t.parameter).detach()).item() < t.parameter.numel()
        ]
        # A fresh model's biases are all zero: they alone are no sign of pruning.
        if not any(target.parameter.dim() > 1 for target in found):
            raise HeadPruningError(
                "The model has no zeros to lock; start from a pruned one, or name its weights with --weights-include."
            )
        storage = self.storage
        storage.active = found
        storage.lay_out(self.session.master_of)
        for portion in storage.portions:
            storage.masks.store(portion, [value != 0 for value in portion.values])
        self.has_mask = self.clean = self.locked = True
        self.selected = int(storage.count_kept()) / storage.number

    def final_density(self) -> float:
        return self.selected if not math.isnan(self.selected) else 1.0


register_pruner(name="lock", config=LockConfig, pruner=LockPruner)
