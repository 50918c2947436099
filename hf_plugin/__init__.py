"""Head pruning for transformers (v5): prune while training, in a Trainer or any loop, without copied model code."""

from .callback import HeadPruningCallback
from .defaults import pruner
from .export import save_pruned
from .heads import head_mask, prune_heads, pruned_heads, restore_heads
from .importance import head_importance, least_important
from .session import open_session
from .trainer import HeadPruningTrainer
from .unit_map import unit_map

__all__ = [
    "HeadPruningCallback",
    "HeadPruningTrainer",
    "head_importance",
    "head_mask",
    "least_important",
    "open_session",
    "prune_heads",
    "pruned_heads",
    "pruner",
    "restore_heads",
    "save_pruned",
    "unit_map",
]
