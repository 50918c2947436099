"""Which checkpoint folder of a Trainer can be resumed, and the large part of the pruning state in it."""

import json
import logging
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Mapping, Optional

import torch
from transformers.trainer import TRAINER_STATE_NAME

from head_pruning import HeadPruningError
from head_pruning.files import atomic_path

logger = logging.getLogger(__name__)

#: Averages and masks, as large as the model; what is the size of the gates lies in ``trainer_state.json``.
STATE_FILE = "pruning_state.safetensors"


# The parts of a checkpoint that a run needs beside its model to go on as it would have, and where each may lie.
_PARTS = {
    "optimizer.pt": ("optimizer*", "global_step*"),
    "scheduler.pt": ("scheduler.pt", "global_step*"),
    "rng_state.pth": ("rng_state*.pth",),
}
_MODELS = ("model*.safetensors", "adapter_model*", "pytorch_model*", "global_step*")


@dataclass(frozen=True)
class Checkpoint:
    """A whole ``checkpoint-N`` folder of a Trainer, read once.

    Args:
        folder: where it is.
        state: what its ``trainer_state.json`` holds.
    """

    folder: Path
    state: Mapping[str, Any]

    @property
    def step(self) -> int:
        """The number of updates that had been done."""
        return self.state["global_step"]

    def kept(self, callback: str) -> Optional[Mapping[str, Any]]:
        """What it keeps of the last callback of a class, ``{"args": ..., "attributes": ...}``; None: nothing."""
        stored = (self.state.get("stateful_callbacks") or {}).get(callback)
        return (stored[-1] if stored else None) if isinstance(stored, list) else stored


def read_checkpoint(folder: "str | Path") -> Checkpoint:
    """Read a whole checkpoint: ``trainer_state.json`` is what a Trainer writes last.

    Raises:
        HeadPruningError: it does not exist, or was cut off while it was written.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise HeadPruningError(f"There is no checkpoint {folder}; check the path.")
    try:
        found = Checkpoint(folder, json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8")))
        if found.step < 0:
            raise ValueError("no step")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HeadPruningError(
            f"The checkpoint {folder} is not whole (its {TRAINER_STATE_NAME} is missing or damaged); resume from the "
            "checkpoint before it."
        ) from error
    return found


def check_resumable(folder: "str | Path") -> Checkpoint:
    """Read a whole checkpoint with all that a run needs to end as one that never stopped.

    Raises:
        HeadPruningError: it is not whole, lacks a part, or a part is damaged.
    """
    found = read_checkpoint(folder)
    _check_parts(found.folder)
    return found


def _check_parts(folder: Path) -> None:
    if not any(any(folder.glob(pattern)) for pattern in _MODELS):
        raise HeadPruningError(f"The checkpoint {folder} lacks its model; resume from another one.")
    for part, patterns in _PARTS.items():
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            raise HeadPruningError(
                f"The checkpoint {folder} lacks {part} (--save_only_model leaves it out), so training cannot go on as "
                "it would have; resume from another one, or start anew from its model."
            )
    for path in sorted(folder.iterdir()):
        if path.name != TRAINER_STATE_NAME and _is_damaged(path):
            raise HeadPruningError(f"{path} is damaged; resume from another checkpoint.")


def _is_damaged(path: Path) -> bool:
    """Whether the file was cut off; reads no tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(str(path), framework="pt"):
                pass
        return path.suffix in (".pt", ".pth", ".bin") and path.is_file() and not zipfile.is_zipfile(path)
    except (SafetensorError, ValueError):
        return True


def last_checkpoint(output_dir: "str | Path") -> Optional[Checkpoint]:
    """The newest ``checkpoint-N`` in ``output_dir`` that can be resumed; None when none was finished yet.

    Raises:
        HeadPruningError: some were finished, but none of them can be resumed.
    """
    broken: Optional[HeadPruningError] = None
    for found in whole_checkpoints(output_dir):
        try:
            _check_parts(found.folder)
            return found
        except HeadPruningError as error:
            logger.warning("%s", error)
            broken = broken or error
    if broken is not None:
        raise broken
    return None


def whole_checkpoints(output_dir: "str | Path") -> Iterator[Checkpoint]:
    """The ``checkpoint-N`` in ``output_dir`` that were finished, newest first; the others are told of."""
    for folder in _newest_first(Path(output_dir)):
        try:
            yield read_checkpoint(folder)
        except HeadPruningError as error:  # cut off while it was written
            logger.warning("%s", error)


def _newest_first(output_dir: Path) -> list[Path]:
    numbered = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output_dir.glob("checkpoint-*")]
    found = [(int(number[1]), path) for number, path in numbered if number and path.is_dir()]
    return [path for _, path in sorted(found, reverse=True)]


def write_tensor_state(folder: "str | Path", tensors: Mapping[str, torch.Tensor], step: int) -> None:
    """Write a session's ``tensor_state()`` of update ``step`` into a checkpoint folder, atomically."""
    from safetensors.torch import save_file

    with atomic_path(Path(folder) / STATE_FILE) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(temporary), {"step": str(step)})


def read_tensor_state(folder: "str | Path", step: int) -> dict[str, torch.Tensor]:
    """What :func:`write_tensor_state` wrote, on the CPU.

    Raises:
        HeadPruningError: the file is missing, damaged, or of another update.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(folder) / STATE_FILE
    if not path.is_file():
        raise HeadPruningError(
            f"The checkpoint {folder} lacks {STATE_FILE}, which holds the masks and averages of its pruner; resume "
            "from another checkpoint."
        )
    try:
        with safe_open(str(path), framework="pt") as handle:
            written = (handle.metadata() or {}).get("step")
            state = {name: handle.get_tensor(name) for name in handle.keys()}
    except SafetensorError as error:
        raise HeadPruningError(f"{path} is damaged ({error}); resume from another checkpoint.") from error
    if written != str(step):
        raise HeadPruningError(
            f"{path} is of update {written} but its {TRAINER_STATE_NAME} of update {step}; resume from another "
            "checkpoint."
        )
    return state
