"""Weight pruning: scores, selections, mask policies, and the files they leave."""

from typing import TYPE_CHECKING

from ..lazy import exports

if TYPE_CHECKING:
    from .base import WeightPruner
    from .engine.targets import Target, weight_targets
    from .files import load_compressed, load_weight_masks, pack_mask, save_compressed, save_weight_masks, unpack_mask

__all__ = [
    "Target",
    "WeightPruner",
    "load_compressed",
    "load_weight_masks",
    "pack_mask",
    "save_compressed",
    "save_weight_masks",
    "unpack_mask",
    "weight_targets",
]
__getattr__ = exports(
    __name__,
    {
        **dict.fromkeys(("Target", "weight_targets"), "engine.targets"),
        **dict.fromkeys(("load_compressed", "load_weight_masks", "pack_mask"), "files"),
        **dict.fromkeys(("save_compressed", "save_weight_masks", "unpack_mask"), "files"),
        "WeightPruner": "base",
    },
)
