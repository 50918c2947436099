"""Weight pruning: scores, selections, mask policies, and the files they leave."""

from .artifacts import (
    load_compressed,
    load_weight_masks,
    pack_mask,
    save_compressed,
    save_weight_masks,
    unpack_mask,
    weight_report,
    write_weight_artifacts,
)
from .pruner import WeightPruner
from .targets import Target, weight_targets

__all__ = [
    "Target",
    "WeightPruner",
    "load_compressed",
    "load_weight_masks",
    "pack_mask",
    "save_compressed",
    "save_weight_masks",
    "unpack_mask",
    "weight_report",
    "weight_targets",
    "write_weight_artifacts",
]
