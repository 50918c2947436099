"""What a checkpoint of fairseq keeps of a pruning run, and how it is read: nothing in it is unpickled."""

import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Mapping, Optional

import numpy as np
import torch

from head_pruning import HeadMask, HeadPruningError, UnitMap
from head_pruning.session import STATE_VERSION
from head_pruning.weights import unpack_mask

from ..modules.surgery import decode

PREFIX = "head_pruning."
KEEP = PREFIX + "keep"
SESSION = PREFIX + "session."
# fairseq's moving average of weights multiplies every entry of the state dict by a float, except those with
# "version" in their name; these hold bytes, in a wide type: averaging checkpoints adds them up before it divides.
META = PREFIX + "meta.version1"
RECIPE = PREFIX + "removed.version1"
#: In ``extra_state``, for weight pruners. Not in the model's state: fairseq averages that, and loads it strictly.
KEY = "head_pruning"
DAMAGED = "The checkpoint's pruning state is damaged or of an unknown version; use the checkpoint before it."


@dataclass(frozen=True)
class PruningState:
    """The pruning state of one checkpoint.

    Args:
        heads: the entries of the model's state dict that are not the model's own, but for the recipe.
        recipe: of a compact model, see :mod:`head_pruning.compact`; None of one with all its heads.
        weights: what :meth:`~fairseq_plugin.checkpoints.keeper.StateKeeper.of_weights` gave; empty without it.
    """

    heads: Mapping[str, torch.Tensor] = field(default_factory=dict)
    recipe: Optional[dict] = None
    weights: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any]) -> "PruningState":
        """That of a whole checkpoint, or of ``{"model": state dict}``. Raises HeadPruningError when it is damaged."""
        heads = split_state(checkpoint.get("model") or {})[1]
        recipe = heads.pop(RECIPE, None)
        try:
            recipe = None if recipe is None else decode(recipe)
        except (TypeError, ValueError) as error:
            raise HeadPruningError(DAMAGED) from error
        return cls(heads, recipe, (checkpoint.get("extra_state") or {}).get(KEY) or {})

    def description(self) -> dict:
        """The ``pruners`` (names, also those of weights) and the ``unit_map`` of a run that pruned heads.

        Raises:
            HeadPruningError: there is none, or it is damaged.
        """
        try:
            description = json.loads(bytes(self.heads[META].tolist()).decode())
            if description["version"] != STATE_VERSION:
                raise ValueError("another version")
            return {"pruners": list(description["pruners"]), "unit_map": UnitMap.from_dict(description["unit_map"])}
        except (KeyError, TypeError, ValueError) as error:
            raise HeadPruningError(DAMAGED) from error

    def head_mask(self) -> HeadMask:
        """The heads that stay. Raises HeadPruningError when there is no mask, or an average of several."""
        if KEEP not in self.heads:
            raise HeadPruningError("The checkpoint holds no head mask; it was not pruned by heads.")
        values = self.heads[KEEP].cpu().numpy()
        # A moving average of one run has nearly whole numbers, or heads on their way to another place.
        if abs(values.sum() - np.count_nonzero(values > 0.5)) > 0.5:
            raise HeadPruningError(
                "The checkpoint is an average of checkpoints that keep different heads; average those of the time "
                "after the heads were chosen."
            )
        return HeadMask(self.description()["unit_map"], values > 0.5)

    def of_session(self) -> dict[str, np.ndarray]:
        """What the session's state dict was, but for weight pruners."""
        return {name[len(SESSION) :]: value.numpy() for name, value in self.heads.items() if name.startswith(SESSION)}

    def weight_masks(self) -> dict[str, torch.Tensor]:
        """Parameter name to ``bool`` mask (true: stays); empty when no weights were pruned."""
        masks = self.weights.get("masks", {})
        return {name: unpack_mask(packed, self.weights["shapes"][name]) for name, packed in masks.items()}

    def weight_pruners(self) -> list[str]:
        """The registered names of the pruners of weights."""
        return list(self.weights.get("pruners", ()))


def split_state(state_dict: Mapping[str, torch.Tensor]) -> tuple[dict, dict]:
    """Split a model state dict into the model's own entries and the pruning state."""
    own = {name: value for name, value in state_dict.items() if not name.startswith(PREFIX)}
    return own, {name: value for name, value in state_dict.items() if name.startswith(PREFIX)}


def load_checkpoint(path: "str | Path") -> dict:
    """Read a fairseq checkpoint without unpickling code. Raises HeadPruningError when missing or damaged."""
    if not Path(path).is_file():
        raise HeadPruningError(f"There is no checkpoint {path}; check the path.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise HeadPruningError(f"{path} is damaged or no fairseq checkpoint ({reason}); write it again.") from error
    if not isinstance(state, dict) or "model" not in state:
        raise HeadPruningError(f"{path} is no fairseq checkpoint: it has no model in it.")
    return state


def peek(path: "str | Path") -> dict[str, Any]:
    """A checkpoint file, its tensors still on the disk; empty when it is no file that could be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # whoever loads the file says what is wrong with it
        return {}


def refuse_cut_off(path: "str | Path") -> None:
    """Raise HeadPruningError if the file of a checkpoint ends too early, as on a disk that was full."""
    path = Path(path)
    if not path.is_file():
        return
    with path.open("rb") as file:
        packed = file.read(2) == b"PK"
    if path.stat().st_size == 0 or (packed and not zipfile.is_zipfile(path)):
        raise HeadPruningError(f"The checkpoint {path} is damaged (it ends too early); use the checkpoint before it.")
