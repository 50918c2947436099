"""Which checkpoint folder of a Trainer can be resumed."""

import json
import logging
import re
from pathlib import Path
from typing import Optional

from transformers.trainer import TRAINER_STATE_NAME

from head_pruning import HeadPruningError

logger = logging.getLogger(__name__)


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


def last_checkpoint(output_dir: "str | Path") -> Optional[Path]:
    """The newest whole ``checkpoint-N`` in ``output_dir``; None when there is none."""
    found = []
    for folder in Path(output_dir).glob("checkpoint-*"):
        step = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if step and folder.is_dir():
            found.append((int(step[1]), folder))
    for _, folder in sorted(found, reverse=True):
        try:
            return check_checkpoint(folder)
        except HeadPruningError as error:
            logger.warning("%s", error)
    return None
