"""Opening a pruning session on a fairseq model."""

from typing import Sequence

from torch import nn

from head_pruning import Pruner, PruningSession

from .modules.attention import UnfusedAttention
from .modules.unit_map import unit_map


def open_session(model: nn.Module, pruners: Sequence[Pruner], **options) -> PruningSession:
    """Map a fairseq model, put gates on it and make every attention module run them (for pruners of heads).

    Args:
        model: any fairseq model built on MultiheadAttention.
        pruners: see :class:`~head_pruning.PruningSession`.
        **options: further arguments of the session.

    Returns:
        The attached session; its ``detach()`` leaves the model as it was.
    """
    session = PruningSession(model, unit_map(model), pruners, **options).attach()
    if session.gated:
        unfused = UnfusedAttention(model)
        unfused.attach()
        session.on_detach(unfused.detach)
    return session
