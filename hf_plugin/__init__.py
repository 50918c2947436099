"""Head pruning for transformers (v5): prune while training, in a Trainer or any loop, without copied model code."""

from typing import TYPE_CHECKING, Any

from .loading import mark_compact  # which also lets from_pretrained load compact models
from .unit_map import unit_map

if TYPE_CHECKING:
    from .callback import HeadPruningCallback
    from .defaults import pruner
    from .export import save_compact, save_pruned
    from .heads import (
        head_mask,
        mask_heads,
        masked_heads,
        prune_heads,
        pruned_heads,
        remove_query_heads,
        restore_heads,
    )
    from .importance import head_importance, least_important
    from .old_worlds import load_pruned_v4
    from .session import open_session
    from .trainer import HeadPruningTrainer

# Imported when first asked for: transformers takes seconds to load.
_HOME = {
    "HeadPruningCallback": "callback",
    "HeadPruningTrainer": "trainer",
    "head_importance": "importance",
    "head_mask": "heads",
    "least_important": "importance",
    "load_pruned_v4": "old_worlds",
    "mask_heads": "heads",
    "masked_heads": "heads",
    "open_session": "session",
    "prune_heads": "heads",
    "pruned_heads": "heads",
    "pruner": "defaults",
    "remove_query_heads": "heads",
    "restore_heads": "heads",
    "save_compact": "export",
    "save_pruned": "export",
}
__all__ = [
    "HeadPruningCallback",
    "HeadPruningTrainer",
    "head_importance",
    "head_mask",
    "least_important",
    "load_pruned_v4",
    "mark_compact",
    "mask_heads",
    "masked_heads",
    "open_session",
    "prune_heads",
    "pruned_heads",
    "pruner",
    "remove_query_heads",
    "restore_heads",
    "save_compact",
    "save_pruned",
    "unit_map",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
