"""What a session changes about a Trainer: its loss, its evaluations, and how it builds its optimizer."""

import functools
import math
import shutil
from pathlib import Path
from typing import Any, Callable, Mapping

import torch
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length

from head_pruning import HeadPruningError, PruningSession, UnitMap
from head_pruning.files import writing

from ..saving.folders import replacing_model
from .sharding import shard_again


def wrap(trainer: Any, name: str, around: Callable[..., Any]) -> None:
    """Have ``around(original, *args, **options)`` run in the place of a method of this one Trainer."""
    original = getattr(trainer, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **options: Any) -> Any:
        return around(original, *args, **options)

    setattr(trainer, name, wrapped)


def wrap_end(trainer: Any, resumed: Callable[[], int]) -> None:
    """Leave a run as it is that is resumed at its end: where that lies inside an epoch, one update more is trained.

    Args:
        trainer: whose ``train`` it is about.
        resumed: tells the number of updates in the checkpoint that is resumed; 0: none is.
    """

    def values(original: Callable, *args: Any, **options: Any) -> Any:
        epochs, per_epoch, *others, updates = original(*args, **options)
        return (epochs if resumed() < updates else resumed() // per_epoch, per_epoch, *others, updates)

    wrap(trainer, "set_initial_training_values", values)


def wrap_checkpoints(trainer: Any) -> None:
    """A checkpoint that a full disk cuts off ends training with its name, and goes; those before it stay."""

    def save(original: Callable, *args: Any, **options: Any) -> Any:
        folder = Path(trainer.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
        try:
            with writing(folder):
                return original(*args, **options)
        except HeadPruningError:
            if trainer.args.should_save and not (folder / TRAINER_STATE_NAME).is_file():
                shutil.rmtree(folder, ignore_errors=True)
            raise

    wrap(trainer, "_save_checkpoint", save)


def save_at_once(trainer: Any, folder: "str | Path", save_model: Callable[[str], None]) -> None:
    """Have ``save_model(place)`` write into ``folder`` all at once, or from several processes one file at a time."""
    if trainer.args.world_size > 1:
        with writing(folder):
            save_model(str(folder))
        return
    with replacing_model(folder) as place:
        save_model(str(place))


# The session of the model that is trained now: a Trainer with a ``model_init`` gets another with every model.
Current = Callable[[], PruningSession]


def wrap_evaluation(trainer: Any, current: Current) -> None:
    """Evaluate with the masks on: between two masks the weights of some pruners are all there."""

    def evaluation_loop(original: Callable, *args: Any, **options: Any) -> Any:
        with current().evaluating():
            try:
                return original(*args, **options)
            finally:
                shard_again(trainer.model)

    wrap(trainer, "evaluation_loop", evaluation_loop)


def wrap_loss(trainer: Any, current: Current) -> None:
    """Train on the session's objective; the loss of evaluations stays the task's."""

    def compute_loss(original: Callable, model: Any, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
        session = current()
        if not model.training or not session.changes_loss:
            return original(model, inputs, return_outputs=return_outputs, **options)
        given = dict(inputs) if isinstance(inputs, Mapping) else inputs  # label smoothing takes the labels out
        loss, outputs = original(model, inputs, return_outputs=True, **options)
        masks = None if session.unit_map is None else token_masks(session.unit_map, given)
        weight = mean_weight(trainer, options.get("num_items_in_batch"))
        with trainer.accelerator.autocast():  # what a pruner calls computes as the model did
            last = getattr(trainer, "last_layer", None)  # of Trainers that call the model without it
            loss = session.loss(loss, given, outputs, masks=masks, weight=weight, last=last)
        return (loss, outputs) if return_outputs else loss

    wrap(trainer, "compute_loss", compute_loss)


def mean_weight(trainer: Any, items: Any) -> float:
    """What a mean over a micro-batch weighs: the Trainer divides by their number only losses that are means."""
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is None:
        scaled = trainer.model_accepts_loss_kwargs and items is not None or trainer.compute_loss_func is not None
    return 1.0 / trainer.current_gradient_accumulation_steps if scaled else 1.0


def token_masks(unit_map: UnitMap, inputs: Any) -> dict[str, torch.Tensor]:
    """``bool[B, T]`` of the tokens that are no padding, by ``encoder`` and ``decoder``, as far as the batch tells."""
    if not isinstance(inputs, Mapping):
        return {}
    sides = {kind.partition("_")[0] for kind in unit_map.numbering("heads").kinds()}
    found = {side: inputs.get("attention_mask") for side in sorted(sides)}
    if "encoder" in sides and "decoder" in sides:
        labels, ids = inputs.get("labels"), inputs.get("decoder_input_ids")
        own = inputs.get("decoder_attention_mask")
        known = labels.ne(-100) if own is None and ids is None and torch.is_tensor(labels) else own
        found["decoder"] = known
    return {side: mask.bool() for side, mask in found.items() if torch.is_tensor(mask) and mask.dim() == 2}


def wrap_building(trainer: Any, current: Current, before: Callable[[], int]) -> None:
    """Build optimizers for the phase that ``before()``'s update is in, and their schedules over that phase."""

    def create_optimizer(original: Callable, *args: Any, **options: Any) -> Any:
        if current().steers_host:
            before()
        return original(*args, **options)

    def create_scheduler(original: Callable, num_training_steps: int, *args: Any, **options: Any) -> Any:
        session = current()
        if not session.steers_host:
            return original(num_training_steps, *args, **options)
        session.total_steps = num_training_steps
        begin, end = session.schedule_span(before())
        last = num_training_steps if end is None else end
        return original(last - begin, *args, **options)

    wrap(trainer, "create_optimizer", create_optimizer)
    wrap(trainer, "create_scheduler", create_scheduler)


def wrap_counting(trainer: Any, current: Current) -> None:
    """Tell the session of the updates in an epoch, as soon as the Trainer has its batches."""

    def get_train_dataloader(original: Callable, *args: Any, **options: Any) -> Any:
        batches = original(*args, **options)
        if has_length(batches):
            current().steps_per_epoch = max(1, math.ceil(len(batches) / trainer.args.gradient_accumulation_steps))
        return batches

    wrap(trainer, "get_train_dataloader", get_train_dataloader)


def allow_skipped_parameters(trainer: Any, session: PruningSession) -> None:
    """Have the data-parallel wrapper put up with parameters that have no gradient in some updates.

    Raises:
        HeadPruningError: it was told not to.
    """
    if not session.skips_parameters:
        return
    if trainer.args.ddp_find_unused_parameters is False:
        names = " and ".join(pruner.name for pruner in session.pruners if pruner.skips_parameters)
        raise HeadPruningError(
            f"In some updates {names} trains some of the parameters only, which DDP must look for; drop "
            "--ddp_find_unused_parameters False."
        )
    trainer.args.ddp_find_unused_parameters = True


def build_anew(trainer: Any, *, keeps_optimizer: bool) -> None:
    """Give a Trainer that is training a new learning-rate schedule and, unless ``keeps_optimizer``, a new optimizer,
    made as its first ones were.
    """
    accelerator, old = trainer.accelerator, trainer.optimizer
    trainer.lr_scheduler = None
    if not keeps_optimizer:
        trainer.optimizer = None
        trainer.create_optimizer()
        trainer.optimizer = accelerator.prepare(trainer.optimizer)
        # accelerate unscales the gradients of every optimizer that it knows: those of the old one would be twice.
        accelerator._optimizers[:] = [known for known in accelerator._optimizers if known is not old]
    trainer.create_scheduler(num_training_steps=trainer.state.max_steps)
    trainer.callback_handler.optimizer, trainer.callback_handler.lr_scheduler = trainer.optimizer, trainer.lr_scheduler


def refuse_steering(trainer: Any, session: PruningSession) -> None:
    """Raise HeadPruningError if pruners change the learning rate, or have several phases, where they cannot."""
    names = " and ".join(pruner.name for pruner in session.pruners if session.steers_host)
    if not session.steers_host:
        return
    if getattr(trainer, "is_fsdp_enabled", False) or getattr(trainer, "is_deepspeed_enabled", False):
        raise HeadPruningError(
            f"{names} changes the learning rate or trains in phases, which is not done under FSDP or DeepSpeed; use "
            "plain data parallelism (DDP)."
        )
    if session.overrides("phase") and (trainer.optimizer is not None or trainer.lr_scheduler is not None):
        raise HeadPruningError(
            f"{names} trains in phases, each with an optimizer and schedule of its own, but the Trainer was given "
            "ready ones (optimizers=...); let it build them (optimizer_cls_and_kwargs, optim, lr_scheduler_type)."
        )
