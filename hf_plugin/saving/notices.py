"""A word at the state dict of a gated or masked model: files are written from it, and it knows nothing of gates."""

import contextlib
import logging
import sys
import weakref
from types import FrameType
from typing import Any, Iterator, Optional

from torch import nn
from transformers import PreTrainedModel

from head_pruning import PruningSession

logger = logging.getLogger(__name__)


class SavingNotice:
    """Warns once, at the first state dict that is taken of a model to be written somewhere.

    ``save_pretrained``, ``push_to_hub``, ``torch.save``, accelerate's ``save_state`` and PEFT all take one. What is
    pickled or copied whole brings its gates along.

    A state-dict hook that is a bound method of this object, as gates are: copies of the model keep a copy of it.

    Args:
        model: the model; of a module around models of transformers, these are watched too.
        text: what to say, for ``%s``: the class of the model.
        gated: whether heads are gated: of them nothing is in the weights, also when training has ended.
        session: who prunes.
    """

    def __init__(
        self, model: nn.Module, text: str, *, gated: bool = True, session: Optional[PruningSession] = None
    ) -> None:
        self.text = text
        self.gated = gated
        self.said = False
        self.quiet = 0
        self.in_checkpoints = False  # whether a Trainer's checkpoints hold what the state dict lacks
        self._session = None if session is None else weakref.ref(session)
        watched = {id(module): module for module in model.modules() if isinstance(module, PreTrainedModel)}
        watched[id(model)] = model
        self._handles = [module.register_state_dict_pre_hook(self.look) for module in watched.values()]

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def look(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        """The hook. ``keep_vars`` are asked for by those who go on computing with the tensors."""
        if self.said or self.quiet or keep_vars or not self._lacks():
            return
        if self.in_checkpoints and _writes_checkpoint(sys._getframe()):
            return
        self.said = True
        logger.warning(self.text, type(module).__name__)

    def _lacks(self) -> bool:
        session = None if self._session is None else self._session()
        return self.gated or (session is not None and not session.hardened)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_session": None, "_handles": []}  # of a copy, which no session prunes


def _writes_checkpoint(frame: Optional[FrameType]) -> bool:
    """Whether a Trainer is writing a checkpoint: no event tells that it begins."""
    while frame is not None and frame.f_code.co_name != "_save_checkpoint":
        frame = frame.f_back
    return frame is not None


def notices_on(model: nn.Module) -> list[SavingNotice]:
    """The notices on a model and on the modules in it."""
    hooks = (hook for module in model.modules() for hook in module._state_dict_pre_hooks.values())
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return list({id(owner): owner for owner in owners if isinstance(owner, SavingNotice)}.values())


@contextlib.contextmanager
def quiet_saving(model: nn.Module) -> Iterator[None]:
    """Inside the block nothing is said: what the state dict lacks is written beside it, or put into it."""
    notices = notices_on(model)
    for notice in notices:
        notice.quiet += 1
    try:
        yield
    finally:
        for notice in notices:
            notice.quiet -= 1


_HEADS = (
    "the state dict of this %%s, and every file that is written from it, has all heads: gates and masks are not in "
    "it; %s"
)
_SESSION = (
    "write the pruned model with hf_plugin.save_pruned(model, session.harden(), folder), or with the save_model of a "
    "HeadPruningTrainer or of a Trainer that HeadPruningCallback(session).add_to(trainer) was called for"
)
_WEIGHTS = (
    "the state dict of this %s, and every file that is written from it, has weights that are to be pruned: call "
    "session.harden() first, or write the pruned model with the save_model of a HeadPruningTrainer or of a Trainer "
    "that HeadPruningCallback(session).add_to(trainer) was called for"
)
#: What to do instead of saving a model that ``mask_heads`` masked.
MASKED = (
    "write the masked model with hf_plugin.save_pruned(model, hf_plugin.masked_heads(model), folder), or remove the "
    "heads for good (restore_heads, then prune_heads) before it is saved"
)
#: Likewise inside a ``head_mask`` block.
BLOCK = "leave the head_mask block, and save the pruned model with hf_plugin.save_pruned(model, mask, folder)"


def watch_session(model: nn.Module, session: PruningSession) -> None:
    """Have the state dict of a session's model say what it lacks, until the session is detached."""
    text = _HEADS % _SESSION if session.gated else _WEIGHTS
    session.on_detach(SavingNotice(model, text, gated=session.gated, session=session).remove)


def watch_heads(model: nn.Module, cure: str) -> SavingNotice:
    """As :func:`watch_session`, of a model whose heads are masked; the notice can be taken off."""
    return SavingNotice(model, _HEADS % cure)
