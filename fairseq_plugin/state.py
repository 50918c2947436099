"""Pruning state inside a fairseq checkpoint's model state, and its way back."""

import functools
import json
import logging
from typing import Any, Mapping, Optional

import numpy as np
import torch
from fairseq.models import BaseFairseqModel

from head_pruning import HeadMask, HeadPruningError, PruningSession, UnitMap
from head_pruning.gates import GateBank
from head_pruning.session import STATE_VERSION

from .attention import UnfusedAttention
from .unit_map import unit_map

logger = logging.getLogger(__name__)

PREFIX = "head_pruning."
KEEP = PREFIX + "keep"
SESSION = PREFIX + "session."
# fairseq's moving average of weights multiplies every entry of the state dict by a float, except those with
# "version" in their name; this one holds bytes.
META = PREFIX + "meta.version1"
DAMAGED = "The checkpoint's pruning state is damaged or of an unknown version; use the checkpoint before it."


class StateKeeper:
    """Hangs on a model: writes the pruning state into its state dict and restores it.

    Either of a ``session`` (training) or of a fixed mask with the ``stored`` state of the run that made it
    (decoding, or training on with a task that does not prune).
    """

    def __init__(
        self,
        model: BaseFairseqModel,
        *,
        session: Optional[PruningSession] = None,
        reset_optimizer: bool = False,
    ) -> None:
        self.model = model
        self.session = session
        self.stored: dict[str, torch.Tensor] = {}
        self.gates: Optional[GateBank] = None
        self.unfused = UnfusedAttention(model)
        self.reset_optimizer = reset_optimizer
        self.loaded = False
        self._handle = model.register_state_dict_post_hook(self)
        model._head_pruning = self

    def __deepcopy__(self, memo: dict) -> "StateKeeper":
        # A copy of the model (fairseq's moving average) goes on writing the state of the run.
        return self

    def __call__(self, module: torch.nn.Module, state_dict: dict, prefix: str, metadata: Any) -> None:
        """State-dict post hook."""
        for name, value in self.state().items():
            state_dict[prefix + name] = value

    def state(self) -> dict[str, torch.Tensor]:
        """Flat names to fresh tensors."""
        if self.session is None:
            return {name: value.clone() for name, value in self.stored.items()}
        state = {
            SESSION + name: torch.from_numpy(np.array(value)) for name, value in self.session.state_dict().items()
        }
        mask = self.session.head_mask()
        if mask is not None:
            state[KEEP] = torch.from_numpy(mask.keep.astype(np.float64))
        state[META] = torch.tensor(list(self.session.description().encode()), dtype=torch.uint8)
        return state

    def check(self, state: Mapping[str, torch.Tensor]) -> None:
        """Raise, before any weight is loaded, when the state that comes with a checkpoint cannot be taken."""
        if state:
            theirs = read_description(state)["unit_map"]
            theirs.check_same_heads(unit_map(self.model), "The pruned checkpoint")
        if state and self.session is not None and not self.reset_optimizer:
            self._check_pruners(state)

    def _check_pruners(self, state: Mapping[str, torch.Tensor]) -> None:
        theirs, mine = read_description(state)["pruners"], [pruner.name for pruner in self.session.pruners]
        if theirs != mine:
            raise HeadPruningError(
                f"The checkpoint was pruned with {', '.join(theirs)}, this run uses {', '.join(mine)}; resume with "
                "the same pruner, or add --reset-optimizer to start new gates from its weights."
            )

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take the state that came with a checkpoint (empty for a dense one)."""
        self.loaded = True
        if self.session is None:
            self._fix(state)
        elif state and read_description(state)["pruners"] != [pruner.name for pruner in self.session.pruners]:
            logger.info("gates start anew: the checkpoint was pruned with another method")
        elif state:
            values = {name[len(SESSION) :]: value.numpy() for name, value in state.items() if name.startswith(SESSION)}
            try:
                self.session.load_state_dict(values)
            except (KeyError, IndexError) as error:
                raise HeadPruningError(DAMAGED) from error
            if self.reset_optimizer:
                self.session.reset_optimizer()

    def _fix(self, state: Mapping[str, torch.Tensor]) -> None:
        """Gate the model with the mask of ``state``, in place of the one before."""
        if self.gates is not None:
            self.gates.detach()
            self.unfused.detach()
        self.gates = attach_mask(self.model, mask_of_state(state)) if KEEP in state else None
        if self.gates is not None:
            self.unfused.attach()
        self.stored = dict(state)


def read_description(state: Mapping[str, torch.Tensor]) -> dict:
    """The description stored with a pruned checkpoint: ``pruners`` and ``unit_map``.

    Raises:
        HeadPruningError: it is damaged.
    """
    try:
        description = json.loads(bytes(state[META].tolist()).decode())
        if description["version"] != STATE_VERSION:
            raise ValueError("another version")
        return {"pruners": list(description["pruners"]), "unit_map": UnitMap.from_dict(description["unit_map"])}
    except (KeyError, TypeError, ValueError) as error:
        raise HeadPruningError(DAMAGED) from error


def split_state(state_dict: Mapping[str, torch.Tensor]) -> tuple[dict, dict]:
    """Split a model state dict into the model's own entries and the pruning state."""
    own = {name: value for name, value in state_dict.items() if not name.startswith(PREFIX)}
    return own, {name: value for name, value in state_dict.items() if name.startswith(PREFIX)}


def mask_of_state(state: Mapping[str, torch.Tensor]) -> HeadMask:
    """The head mask stored with a pruned checkpoint."""
    if KEEP not in state:
        raise HeadPruningError("The checkpoint holds no head mask; it was not pruned by heads.")
    return HeadMask(read_description(state)["unit_map"], state[KEEP].cpu().numpy() > 0.5)


def attach_mask(model: BaseFairseqModel, mask: HeadMask) -> GateBank:
    """Gate a model, whose attention is unfused, with a fixed mask, in training and in evaluation."""
    gates = GateBank(model, unit_map(model))
    gates.attach()
    gates.set_fixed(mask.keep)
    return gates


def install() -> None:
    """Teach every fairseq model to load pruned checkpoints; once per process."""
    original = BaseFairseqModel.load_state_dict
    if getattr(original, "reads_head_pruning", False):
        return

    @functools.wraps(original)
    def load_state_dict(self, state_dict, *args, **kwargs):
        own, state = split_state(state_dict)
        keeper = getattr(self, "_head_pruning", None)
        if keeper is not None and keeper.model is not self:  # a copy of the model: its gates stay what they are
            return original(self, own, *args, **kwargs)
        if keeper is None and state:
            keeper = StateKeeper(self)
        if keeper is not None:
            keeper.check(state)
        result = original(self, own, *args, **kwargs)
        if keeper is not None:
            keeper.restore(state)
        return result

    load_state_dict.reads_head_pruning = True
    BaseFairseqModel.load_state_dict = load_state_dict
