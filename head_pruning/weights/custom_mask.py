"""Custom masks: train with the weights that a file of masks leaves, from the first update on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Mapping, Optional

import torch

from ..errors import HeadPruningError
from ..registry import register_pruner
from .base import WeightConfig
from .engine.no_grad import no_grad
from .files import load_weight_masks
from .lock import FixedMaskPruner


@dataclass
class CustomMaskConfig(WeightConfig):
    """Options of custom masks."""

    weight_mask_file: Optional[str] = field(
        default=None,
        metadata={
            "help": "train with the weights that these masks leave: masks.safetensors of another run that pruned "
            "weights, or what head_pruning.weights.save_weight_masks wrote",
            "by_content": True,
        },
    )


class CustomMaskPruner(FixedMaskPruner):
    """Trains the model with only the weights of masks that were found before, by any method."""

    name = "custom_mask"

    def check_options(self) -> None:
        super().check_options()
        if self.config.weight_mask_file is None:
            raise HeadPruningError("custom_mask needs the masks of the weights to keep; add --weight-mask-file FILE.")

    def fixed_masks(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        path = self.config.weight_mask_file
        masks = load_weight_masks(path)
        for name, keep in masks.items():
            if name not in tensors:
                raise HeadPruningError(
                    f"{path} has a mask of {name}, which is none of the weights that can be pruned here; give masks "
                    "of this model, or correct --weights-include and --weights-exclude."
                )
            if keep.shape != tensors[name].shape:
                raise HeadPruningError(
                    f"The mask of {name} in {path} has the shape {list(keep.shape)}, the model's weights have "
                    f"{list(tensors[name].shape)}; give masks of this model."
                )
        if all(keep.all() for keep in masks.values()):
            raise HeadPruningError(f"The masks in {path} remove no weight; give those of a pruned model.")
        return masks

    @no_grad
    def before_update(self, step: int) -> None:
        fresh = not self.has_mask
        super().before_update(step)
        if fresh:
            self._lay_out()
            self._apply()


register_pruner(
    name="custom_mask",
    config=CustomMaskConfig,
    pruner=CustomMaskPruner,
    selected_by=lambda options: options.weight_mask_file is not None,
    example={"weight_mask_file": "masks.safetensors"},
)
