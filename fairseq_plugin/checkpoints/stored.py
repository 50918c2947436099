"""What a checkpoint of fairseq keeps of a pruning run, and how it is read: nothing in it is unpickled."""

import contextlib
import math
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator, Mapping, Optional, Sequence

import numpy as np
import torch

from head_pruning import HeadMask, HeadPruningError, UnitMap
from head_pruning.compact.shapes import Either, conform
from head_pruning.errors import one_line
from head_pruning.files import parse_json
from head_pruning.pickled import load_pickled
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
#: In ``extra_state``, what the session measured up to the checkpoint, for the reports on it.
NUMBERS = "head_pruning_numbers"
DAMAGED = "The checkpoint's pruning state is damaged or of an unknown version; use the checkpoint before it."


def damaged(what: str) -> HeadPruningError:
    """The error of a pruning state that cannot be what a run wrote; ``what`` says why."""
    return HeadPruningError(f"The checkpoint's pruning state is damaged ({what}); use the checkpoint before it.")


def take_numbers(extra_state: dict[str, Any]) -> Optional[dict[str, float]]:
    """Take what the session measured out of ``extra_state``; None where nothing is. HeadPruningError if damaged."""
    numbers = extra_state.pop(NUMBERS, None)
    try:
        return None if numbers is None else conform(numbers, {str: Either(float, int)})
    except ValueError as error:
        raise damaged(f"its numbers: {error}") from error


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
        for name, value in heads.items():
            _refuse_claims(name, value)
        recipe = heads.pop(RECIPE, None)
        try:
            recipe = None if recipe is None else decode(recipe)
        except (TypeError, ValueError) as error:
            raise HeadPruningError(DAMAGED) from error
        state = cls(heads, recipe, (checkpoint.get("extra_state") or {}).get(KEY) or {})
        state._check()
        return state

    def _check(self) -> None:
        """Raise HeadPruningError unless every entry is of the type that a run writes, and its numbers are finite."""
        weights = self.weights
        if not isinstance(weights, Mapping):
            raise damaged("that of its weights is no dictionary")
        parts = [weights.get(part, {}) for part in ("masks", "shapes", "session", "tensors", "norms")]
        if not all(isinstance(part, Mapping) for part in parts):
            raise damaged("a part of that of its weights is no dictionary")
        masks, shapes, session, tensors, _ = parts
        if masks.keys() != shapes.keys():
            raise damaged(f"it lacks the mask, or its shape, of {', '.join(sorted(masks.keys() ^ shapes.keys())[:3])}")
        for name, value in [*masks.items(), *session.items(), *tensors.items()]:
            _refuse_claims(name, value)
        for name, value in [*self.heads.items(), *session.items()]:  # whoever goes on from them looks at the rest
            if bool(value.isnan().any()):
                raise damaged(f"{name} has numbers that are none")
        keep = self.heads.get(KEEP)
        if keep is not None and not bool(((keep >= -0.001) & (keep <= 1.001)).all()):  # averages lie in between
            raise damaged("its head mask has entries other than 0 and 1")

    def description(self) -> dict:
        """The ``pruners`` (names, also those of weights) and the ``unit_map`` of a run that pruned heads.

        Raises:
            HeadPruningError: there is none, or it is damaged.
        """
        try:
            description = parse_json(bytes(self.heads[META].tolist()), dict)
            if description["version"] != STATE_VERSION:
                raise ValueError("another version")
            return {"pruners": list(description["pruners"]), "unit_map": UnitMap.from_dict(description["unit_map"])}
        except (KeyError, TypeError, ValueError) as error:
            raise HeadPruningError(DAMAGED) from error

    def head_mask(self) -> HeadMask:
        """The heads that stay. Raises HeadPruningError when there is no mask, or an average of several."""
        if KEEP not in self.heads:
            raise HeadPruningError("The checkpoint holds no head mask; it was not pruned by heads.")
        values = self.kept()
        # A moving average of one run has nearly whole numbers, or heads on their way to another place.
        if abs(values.sum() - np.count_nonzero(values > 0.5)) > 0.5:
            raise HeadPruningError(
                "The checkpoint is an average of checkpoints that keep different heads; average those of the time "
                "after the heads were chosen."
            )
        mask = HeadMask(self.description()["unit_map"], values > 0.5)
        if not mask.kept:
            raise HeadPruningError(
                "The checkpoint's head mask keeps no head: it is damaged, or its run closed every gate; use a "
                "checkpoint before it, or train with a lower penalty."
            )
        return mask

    def kept(self) -> np.ndarray:
        """``[N]``: 1 for a head that stays, 0 for another, in an average of checkpoints something in between."""
        return self.heads[KEEP].cpu().numpy().reshape(-1)

    def of_session(self) -> dict[str, np.ndarray]:
        """What the session's state dict was, but for weight pruners."""
        return {name[len(SESSION) :]: value.numpy() for name, value in self.heads.items() if name.startswith(SESSION)}

    def weight_masks(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Parameter name to ``bool`` mask (true: stays); empty when no weights were pruned.

        Args:
            weights: the tensors of the model, or of its moving average, that the checkpoint has.

        Raises:
            HeadPruningError: the masks do not fit the tensors, or are those of other ones: the average of several
                checkpoints has the masks of one of them.
        """
        found = {}
        for name, packed in self.weights.get("masks", {}).items():
            shape = self.weights["shapes"][name]
            if name not in weights or list(weights[name].shape) != list(shape):
                raise damaged(f"it has a mask of {name}, and the model no tensor of that shape")
            found[name] = unpack_mask(packed, shape)
            norms = self.weights.get("norms", {}).get(name)  # older checkpoints have none
            if not norms or not weights[name].masked_select(~found[name]).any():
                continue
            if not any(math.isclose(norm, norms_of([weights[name]])[0], rel_tol=1e-9) for norm in norms):
                raise HeadPruningError(
                    f"The weights of {name} are not those that the checkpoint's mask was drawn for, as in an average "
                    "of checkpoints with different masks; average checkpoints of one mask, such as those of a "
                    "run with --weight-pruner lock."
                )
        return found

    def weight_pruners(self) -> list[str]:
        """The registered names of the pruners of weights."""
        return list(self.weights.get("pruners", ()))


def _refuse_claims(name: str, value: Any) -> None:
    """Raise HeadPruningError unless an entry is a tensor that has memory for all of its numbers."""
    if not torch.is_tensor(value) or value.numel() > value.untyped_storage().nbytes():
        raise damaged(f"{name} is no tensor, or claims to be larger than it is")


def split_state(state_dict: Mapping[str, torch.Tensor]) -> tuple[dict, dict]:
    """Split a model state dict into the model's own entries and the pruning state."""
    own = {name: value for name, value in state_dict.items() if not name.startswith(PREFIX)}
    return own, {name: value for name, value in state_dict.items() if name.startswith(PREFIX)}


def norms_of(tensors: Sequence[torch.Tensor]) -> list[float]:
    """The sum of absolute values of each tensor, in float64: what tells a tensor from an average of several."""
    if not tensors:
        return []
    return torch.stack([tensor.detach().abs().sum(dtype=torch.float64) for tensor in tensors]).tolist()


def load_checkpoint(path: "str | Path") -> dict:
    """Read a fairseq checkpoint without unpickling code.

    Raises:
        HeadPruningError: the file is missing, damaged, or no checkpoint of fairseq, it holds what could run code, or
            its pruning state is damaged.
    """
    if not Path(path).is_file():
        raise HeadPruningError(f"There is no checkpoint {path}; check the path.")
    refuse_damage(path)
    problem, cure = "is damaged or no fairseq checkpoint", "write it again, or use the checkpoint before it"
    try:
        state = load_pickled(path, problem=problem, cure=cure)
    except HeadPruningError as error:
        code = re.search(r"GLOBAL (\S+)", str(error.__cause__))
        if code is None:
            raise
        raise HeadPruningError(
            f"{path} asks for {code[1]}, which no checkpoint of fairseq needs and which could run code, so nothing of "
            "it was loaded; use a checkpoint that you trust."
        ) from error
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise HeadPruningError(f"{path} is no fairseq checkpoint: it has no model in it.")
    PruningState.of(state)
    return state


@contextlib.contextmanager
def reading(path: "str | Path") -> Iterator[None]:
    """Whatever goes wrong while fairseq reads a checkpoint file inside the block ends in one sentence.

    Raises:
        HeadPruningError: as :func:`load_checkpoint`, or fairseq cannot use what is in the file.
    """
    refuse_damage(path)
    try:
        yield
    except HeadPruningError:
        raise
    except Exception as error:
        if "://" not in str(path):
            load_checkpoint(path)  # says what is wrong with it, if anything is
        reason = one_line(error)
        raise HeadPruningError(f"fairseq cannot use the checkpoint {path} ({reason:.300}).") from error


def peek(path: "str | Path") -> dict[str, Any]:
    """A checkpoint file, its tensors still on the disk; empty when it is no file that could be read."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # whoever loads the file says what is wrong with it
        return {}
    return found if isinstance(found, dict) else {}


def stored_task(state: Mapping[str, Any]) -> Optional[str]:
    """The name of the task of a checkpoint, old ones too; None where it tells none."""
    part = (state.get("cfg") or {}).get("task") if isinstance(state.get("cfg"), Mapping) else None
    old = getattr(state.get("args"), "task", None)
    name = old or (part.get("_name") if isinstance(part, Mapping) else getattr(part, "_name", None))
    return name if isinstance(name, str) else None


def refuse_damage(path: "str | Path") -> None:
    """Raise HeadPruningError if a checkpoint file was cut off, or if bytes of it have changed since it was written.

    torch writes the CRC-32 of every tensor into the file, and does not look at it when it loads. Reading it here takes
    a second per gigabyte. Files of before torch 1.6 have none, nor those written with ``set_crc32_options(False)``.
    """
    path = Path(path)
    if not path.is_file():
        return
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"PK"
    except OSError as error:
        raise HeadPruningError(f"The checkpoint {path} cannot be read ({error.strerror}); check the file.") from error
    if path.stat().st_size == 0 or (packed and not zipfile.is_zipfile(path)):
        raise HeadPruningError(f"The checkpoint {path} is damaged (it ends too early); use the checkpoint before it.")
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            checked = any(entry.CRC for entry in archive.infolist())
            changed = archive.testzip() if checked else None
    except Exception as error:  # zipfile has no one error for what it does not understand
        raise HeadPruningError(
            f"The checkpoint {path} is damaged ({one_line(error)}); use the checkpoint before it."
        ) from error
    if changed is not None:
        raise HeadPruningError(
            f"The checkpoint {path} is damaged (bytes of {changed} in it have changed); use the checkpoint before it."
        )
