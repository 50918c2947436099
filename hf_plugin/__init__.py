"""Head pruning for transformers (v5): prune while training, in a Trainer or any loop, without copied model code."""

import logging
from typing import TYPE_CHECKING

from head_pruning.lazy import exports

from .compact.registration import register_when_loaded

if TYPE_CHECKING:
    from .command_line.defaults import pruner
    from .compact.quantizer import mark_compact
    from .heads.importance import head_importance, least_important
    from .heads.load_v4 import load_pruned_v4
    from .heads.masking import head_mask, mask_heads, masked_heads, restore_heads
    from .heads.pruning import prune_heads, pruned_heads, remove_query_heads
    from .mapping.unit_map import unit_map
    from .saving.adapters import load_pruned_peft, merge_and_cut, merge_pruned
    from .saving.folders import save_compact, save_pruned
    from .training.callback import HeadPruningCallback
    from .training.pruning_scheduler import PruningScheduler, pruning_scheduler_factory
    from .training.session import open_session
    from .training.trainer import HeadPruningTrainer

__all__ = [
    "HeadPruningCallback",
    "HeadPruningTrainer",
    "PruningScheduler",
    "head_importance",
    "head_mask",
    "least_important",
    "load_pruned_peft",
    "load_pruned_v4",
    "mark_compact",
    "mask_heads",
    "masked_heads",
    "merge_and_cut",
    "merge_pruned",
    "open_session",
    "prune_heads",
    "pruned_heads",
    "pruner",
    "pruning_scheduler_factory",
    "remove_query_heads",
    "restore_heads",
    "save_compact",
    "save_pruned",
    "unit_map",
]
# Imported when first asked for: transformers takes seconds to load.
__getattr__ = exports(
    __name__,
    {
        "HeadPruningCallback": "training.callback",
        "HeadPruningTrainer": "training.trainer",
        "PruningScheduler": "training.pruning_scheduler",
        "head_importance": "heads.importance",
        "head_mask": "heads.masking",
        "least_important": "heads.importance",
        "load_pruned_peft": "saving.adapters",
        "load_pruned_v4": "heads.load_v4",
        "mark_compact": "compact.quantizer",
        "mask_heads": "heads.masking",
        "masked_heads": "heads.masking",
        "merge_and_cut": "saving.adapters",
        "merge_pruned": "saving.adapters",
        "open_session": "training.session",
        "prune_heads": "heads.pruning",
        "pruned_heads": "heads.pruning",
        "pruner": "command_line.defaults",
        "pruning_scheduler_factory": "training.pruning_scheduler",
        "remove_query_heads": "heads.pruning",
        "restore_heads": "heads.masking",
        "save_compact": "saving.folders",
        "save_pruned": "saving.folders",
        "unit_map": "mapping.unit_map",
    },
)
register_when_loaded()
for _name in ("torchao", "torch.utils._pytree"):  # what torchao says when transformers imports it
    logging.getLogger(_name).setLevel(logging.ERROR)
