"""Head pruning for transformers (v5): prune while training, in a Trainer or any loop, without copied model code."""

from .callback import HeadPruningCallback
from .defaults import pruner
from .export import save_pruned
from .session import open_session
from .trainer import HeadPruningTrainer
from .unit_map import unit_map

__all__ = ["HeadPruningCallback", "HeadPruningTrainer", "open_session", "pruner", "save_pruned", "unit_map"]
