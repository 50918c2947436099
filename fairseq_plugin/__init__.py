"""fairseq user-dir: ``fairseq-train --user-dir fairseq_plugin --task translation_head_pruning ...``."""

from . import checkpoints, errors, state

errors.install()
checkpoints.allow_safe_globals()
checkpoints.allow_broadcasts()
checkpoints.install()
state.install()

from . import criterion, task  # noqa: E402, F401  (importing registers them with fairseq)
from .session import open_session  # noqa: E402
from .state import remove_heads  # noqa: E402

__all__ = ["open_session", "remove_heads"]
