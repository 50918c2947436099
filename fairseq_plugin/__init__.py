"""fairseq user-dir: ``fairseq-train --user-dir fairseq_plugin --task translation_head_pruning ...``."""

from . import criterion, patches, task  # noqa: F401  (importing registers the task and the criterion with fairseq)
from .checkpoints.keeper import remove_heads
from .session import open_session

patches.install()

__all__ = ["open_session", "remove_heads"]
