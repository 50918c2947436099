"""Which checkpoint folder of a Trainer can be resumed, and the large part of the pruning state in it."""

import json
import logging
import re
from pathlib import Path
from typing import Mapping, Optional

import torch
from transformers.trainer import TRAINER_STATE_NAME

from head_pruning import HeadPruningError
from head_pruning.artifacts import atomic_path

logger = logging.getLogger(__name__)

#: Averages and masks, as large as the model; what is the size of the gates lies in ``trainer_state.json``.
STATE_FILE = "pruning_state.safetensors"


def check_checkpoint(folder: "str | Path") -> Path:
    """Return ``folder`` if it is a whole checkpoint: ``trainer_state.json`` is what a Trainer writes last.

    Raises:
        HeadPruningError: it does not exist, or was cut off while it was written.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise HeadPruningError(f"There is no checkpoint {folder}; check the path.")
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HeadPruningError(
            f"The checkpoint {folder} is not whole (its {TRAINER_STATE_NAME} is missing or damaged); resume from the "
            "checkpoint before it."
        ) from error
    return folder


def checkpoints(output_dir: "str | Path") -> list[tuple[int, Path]]:
    """The whole ``checkpoint-N`` folders in ``output_dir`` with their steps, oldest first."""
    found = []
    for folder in Path(output_dir).glob("checkpoint-*"):
        step = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if step and folder.is_dir():
            try:
                found.append((int(step[1]), check_checkpoint(folder)))
            except HeadPruningError as error:
                logger.warning("%s", error)
    return sorted(found)


def last_checkpoint(output_dir: "str | Path") -> Optional[Path]:
    """The newest whole ``checkpoint-N`` in ``output_dir``; None when there is none."""
    found = checkpoints(output_dir)
    return found[-1][1] if found else None


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
