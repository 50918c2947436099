"""What a run was asked for, kept in its checkpoints: a run with other options does not go on from them."""

import json
from pathlib import Path
from typing import Any, Mapping, Optional

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from head_pruning import HeadPruningError
from head_pruning.compact.shapes import conform
from head_pruning.errors import one_line
from head_pruning.options import is_same
from head_pruning.registry import option_fields

from ..command_line.arguments import Arguments
from ..command_line.scripts import choosers
from ..training.checkpoints import Checkpoint

# Beside the pruners' options. Lengths of training, batches and paths may differ: a run may go on longer, or elsewhere.
_DATA = (
    *("version_2_with_negative", "max_seq_length", "max_train_samples"),
    *("mlm_probability", "whole_word_mask", "validation_split_percentage"),
)
_TRAINING = ("seed", "learning_rate")


class RunSettings(TrainerCallback, ExportableState):
    """Keeps the settings of a run in every ``trainer_state.json``.

    Args:
        settings: flag name to value; what :func:`settings_of` gives.
    """

    def __init__(self, settings: Optional[Mapping[str, Any]] = None) -> None:
        self.settings = dict(settings or {})

    def state(self) -> dict:
        """What ``trainer_state.json`` keeps."""
        return {"args": {}, "attributes": {"settings": self.settings}}

    def on_train_begin(self, args, state, control, **kwargs):
        """Be in checkpoints from now on, also where the one that was resumed has no settings."""
        state.stateful_callbacks[type(self).__name__] = self.state()


def settings_of(arguments: Arguments, task: Optional[str] = None) -> dict[str, Any]:
    """The options that two runs have in common when one may go on where the other was stopped; no unset ones.

    Args:
        arguments: of the command line.
        task: the one name of the task, which users may spell in several ways.
    """
    data, training = vars(arguments.data), arguments.training
    found = {"model_name_or_path": Path(arguments.model.model_name_or_path).name}
    if task is not None:
        found["task_name"] = task
    found |= {name: data[name] for name in _DATA if name in data}
    found |= {name: getattr(training, name) for name in _TRAINING}
    found["optimizer"] = arguments.optimizer
    for flag, (kind, *_) in choosers().items():
        chosen = [pruner for pruner in arguments.pruners if pruner.kind == kind]
        if chosen:
            found[flag] = ",".join(pruner.name for pruner in chosen)
        for pruner in chosen:
            found |= vars(pruner.config)
    # As they come out of a file.
    return json.loads(json.dumps({name: value for name, value in found.items() if value is not None}))


def check_same_settings(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> None:
    """Raise HeadPruningError if the checkpoint is of a run with other settings.

    Older ones that tell none pass, and an option of a method that they do not know had its default.
    """
    stored = checkpoint.kept(RunSettings.__name__)
    if not stored:
        return
    try:
        theirs = conform(stored, {"attributes": {"settings": dict}})["attributes"]["settings"]
    except ValueError as error:
        raise HeadPruningError(
            f"The settings in {checkpoint.folder} are damaged ({one_line(error):.200}); resume from another one."
        ) from error
    # The pruner first: where it differs, so do all its options.
    names = sorted({*theirs, *settings}, key=lambda name: name not in ("task_name", *choosers()))
    options = option_fields()
    for name in names:
        option = options.get(name)
        unknown = None if option is None else option.default
        if not is_same(option, theirs.get(name, unknown), settings.get(name, unknown)):
            raise HeadPruningError(
                f"The checkpoint {checkpoint.folder} is of a run {_shown(name, theirs)}, this one is "
                f"{_shown(name, settings)}; go on with the same options, choose another --output_dir, or start "
                "anew with --overwrite_output_dir."
            )


def _shown(name: str, settings: Mapping[str, Any]) -> str:
    return f"with --{name} {settings[name]}" if name in settings else f"without --{name}"
