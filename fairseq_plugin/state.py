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

from .attention import UnfusedAttention
from .unit_map import unit_map

logger = logging.getLogger(__name__)

PREFIX = "head_pruning."
KEEP = PREFIX + "keep"
SESSION = PREFIX + "session."
# fairseq's moving average of weights multiplies every entry of the state dict by a float, except those with
# "version" in their name; this one holds bytes.
META = PREFIX + "meta.version1"


class StateKeeper:
    """Hangs on a model: writes the pruning state into its state dict and restores it.

    Either of a ``session`` (training) or of a fixed ``mask`` with the ``stored`` state of the run that made it
    (decoding, or training on with a task that does not prune).
    """

    def __init__(
        self,
        model: BaseFairseqModel,
        *,
        session: Optional[PruningSession] = None,
        stored: Optional[Mapping[str, torch.Tensor]] = None,
        reset_optimizer: bool = False,
    ) -> None:
        self.model = model
        self.session = session
        self.stored = dict(stored or {})
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

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take the state that came with a checkpoint (empty for a dense one)."""
        self.loaded = True
        if not state:
            return
        if self.session is None:
            self.stored = dict(state)
            return
        theirs = read_description(state)
        if theirs["pruners"] != [pruner.name for pruner in self.session.pruners]:
            if not self.reset_optimizer:
                raise HeadPruningError(
                    f"The checkpoint was pruned with {', '.join(theirs['pruners'])}, this run uses "
                    f"{', '.join(p.name for p in self.session.pruners)}; resume with the same pruner, or add "
                    "--reset-optimizer to start new gates from its weights."
                )
            logger.info("gates start anew: the checkpoint was pruned with another method")
            return
        UnitMap.from_dict(theirs["unit_map"]).check_same_heads(self.session.unit_map, "The checkpoint")
        self.session.load_state_dict(
            {name[len(SESSION) :]: value.numpy() for name, value in state.items() if name.startswith(SESSION)}
        )
        if self.reset_optimizer:
            self.session.reset_optimizer()


def read_description(state: Mapping[str, torch.Tensor]) -> dict:
    """The description stored with a pruned checkpoint. Raises HeadPruningError when it is damaged."""
    try:
        return json.loads(bytes(state[META].tolist()).decode())
    except (KeyError, ValueError) as error:
        raise HeadPruningError(
            "The checkpoint's pruning state is damaged or of an unknown version; use the checkpoint before it."
        ) from error


def split_state(state_dict: Mapping[str, torch.Tensor]) -> tuple[dict, dict]:
    """Split a model state dict into the model's own entries and the pruning state."""
    own = {name: value for name, value in state_dict.items() if not name.startswith(PREFIX)}
    return own, {name: value for name, value in state_dict.items() if name.startswith(PREFIX)}


def mask_of_state(state: Mapping[str, torch.Tensor]) -> HeadMask:
    """The head mask stored with a pruned checkpoint."""
    if KEEP not in state:
        raise HeadPruningError("The checkpoint holds no head mask; it was not pruned by heads.")
    return HeadMask(UnitMap.from_dict(read_description(state)["unit_map"]), state[KEEP].cpu().numpy() > 0.5)


def attach_mask(model: BaseFairseqModel, mask: HeadMask) -> GateBank:
    """Gate a model with a fixed mask, in training and in evaluation."""
    here = unit_map(model)
    mask.unit_map.check_same_heads(here, "The pruned checkpoint")
    gates = GateBank(model, here)
    UnfusedAttention(model).attach()
    gates.attach()
    gates.set_training(mask.keep)
    gates.set_evaluation(mask.keep)
    return gates


def install() -> None:
    """Teach every fairseq model to load pruned checkpoints; once per process."""
    original = BaseFairseqModel.load_state_dict
    if getattr(original, "reads_head_pruning", False):
        return

    @functools.wraps(original)
    def load_state_dict(self, state_dict, *args, **kwargs):
        own, state = split_state(state_dict)
        result = original(self, own, *args, **kwargs)
        keeper = getattr(self, "_head_pruning", None)
        if keeper is None and state:
            if KEEP in state:
                attach_mask(self, mask_of_state(state))
            StateKeeper(self, stored=state)
        elif keeper is not None and keeper.model is self:
            keeper.restore(state)
        return result

    load_state_dict.reads_head_pruning = True
    BaseFairseqModel.load_state_dict = load_state_dict
