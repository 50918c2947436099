"""Which checkpoint folder of a Trainer can be resumed, and the large part of the pruning state in it."""

import dataclasses
import logging
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Optional

import numpy as np
import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import safe_globals

from head_pruning import HeadPruningError
from head_pruning.compact.shapes import Either, Number, Whole, conform
from head_pruning.errors import one_line
from head_pruning.files import atomic_path, read_json, read_metadata, read_safetensors
from head_pruning.pickled import load_pickled

logger = logging.getLogger(__name__)

#: Averages and masks, as large as the model; what is the size of the gates lies in ``trainer_state.json``.
STATE_FILE = "pruning_state.safetensors"
_CURE = "resume from another checkpoint"


# The parts of a checkpoint that a run needs beside its model to go on as it would have, and where each may lie.
_PARTS = {
    "optimizer.pt": ("optimizer*", "global_step*"),
    "scheduler.pt": ("scheduler.pt", "global_step*"),
    "rng_state.pth": ("rng_state*.pth",),
}
_CALLBACK = {"args?": dict, "attributes?": dict}
_WORD, _NUMBER = Either(None, str), Either(None, int, float)
# What a Trainer reads back: a loss in the history may be NaN.
_STATE = {
    "global_step": Whole(),
    "max_steps?": int,
    **{f"{name}?": _NUMBER for name in ("epoch", "logging_steps", "eval_steps", "save_steps", "train_batch_size")},
    **{f"{name}?": _NUMBER for name in ("num_train_epochs", "num_input_tokens_seen", "total_flos", "best_metric")},
    "best_global_step?": Either(None, Whole()),
    "best_model_checkpoint?": _WORD,
    "log_history?": Either(None, [dict]),
    **{f"is_{name}?": bool for name in ("local_process_zero", "world_process_zero", "hyper_param_search")},
    "trial_name?": _WORD,
    "trial_params?": Either(None, dict),
    "stateful_callbacks?": Either(None, {str: Either(_CALLBACK, [_CALLBACK])}),
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
        state = read_json(folder / TRAINER_STATE_NAME, _STATE)
        unknown = sorted(state.keys() - {field.name for field in dataclasses.fields(TrainerState)})
        if unknown:
            raise HeadPruningError(f"transformers knows no {unknown[0]:.40}")
    except (HeadPruningError, OSError) as error:
        raise HeadPruningError(
            f"The checkpoint {folder} is not whole (its {TRAINER_STATE_NAME} is missing or damaged: "
            f"{one_line(error).rstrip('.')}); resume from the checkpoint before it."
        ) from error
    return Checkpoint(folder, state)


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
        if path.is_file() and path.name != TRAINER_STATE_NAME:
            _check_part(path)


def _check_part(path: Path) -> None:
    """Raise HeadPruningError if a Trainer could not read the file; the values of tensors are not looked at."""
    if path.suffix == ".json":
        read_json(path, cure=_CURE)
    elif path.suffix == ".safetensors":
        read_metadata(path)
    elif path.name == "scheduler.pt":
        _check(path, load_pickled(path, cure=_CURE), _check_scheduler)
    elif path.match("rng_state*.pth"):
        with safe_globals():  # numpy's arrays, as the Trainer allows
            state = load_pickled(path, cure=_CURE)
        _check(path, state, _check_random)
    elif path.suffix in (".pt", ".bin") and path.name != TRAINING_ARGS_NAME:  # which no Trainer reads
        load_pickled(path, cure=_CURE)


def _check(path: Path, state: Any, check: Callable[[Any], Any]) -> None:
    try:
        check(state)
    except Exception as error:  # random generators have errors of their own
        raise HeadPruningError(f"{path} is damaged ({one_line(error):.200}); {_CURE}.") from error


def _check_scheduler(state: Any) -> None:
    """Raise unless a schedule can take the state: it becomes its attributes."""
    rates = [Number()]
    conform(state, {"last_epoch": Whole(-1), "_step_count?": Whole(), "base_lrs?": rates, "_last_lr?": rates})
    odd = [name for name in state if not isinstance(name, str) or callable(getattr(LRScheduler, name, None))]
    if odd:
        raise ValueError(f"{odd[0]!r:.40} is no part of a schedule's state")


def _check_random(state: Any) -> None:
    """Raise unless generators can take the state, which is tried on others than the process's own."""
    conform(state, dict)
    if "python" in state:
        random.Random().setstate(state["python"])
    if "numpy" in state:
        np.random.RandomState().set_state(state["numpy"])
    if "cpu" in state:
        torch.Generator().set_state(state["cpu"])


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
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        raise HeadPruningError(
            f"The checkpoint {folder} lacks {STATE_FILE}, which holds the masks and averages of its pruner; resume "
            "from another checkpoint."
        )
    state, metadata = read_safetensors(path, "pt", cure=_CURE)
    written = metadata.get("step")
    if written != str(step):
        raise HeadPruningError(
            f"{path} is of update {one_line(ValueError(written)):.40} but its {TRAINER_STATE_NAME} of update {step}; "
            "resume from another checkpoint."
        )
    return state
