"""A pruning session driven from the events of a Trainer."""

import contextlib
import functools
import json
import logging
import math
from pathlib import Path
from typing import Any, Callable, Mapping, Optional

import numpy as np
import torch
import torch.distributed
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SchedulerType

from head_pruning import HeadPruningError, PruningSession, UnitMap
from head_pruning.compact.shapes import Either, conform
from head_pruning.errors import one_line
from head_pruning.files import alone_in
from head_pruning.finite import all_finite
from head_pruning.weights import save_weight_masks

from ..saving.folders import save_pruned
from ..saving.notices import notices_on, quiet_saving
from ..saving.quantized import stored_form
from .checkpoints import (
    Checkpoint,
    check_resumable,
    last_checkpoint,
    read_checkpoint,
    read_tensor_state,
    write_tensor_state,
)
from .sharding import refuse_sharding, whole
from .sizes import check_sizes, save_size
from .weights import save_weight_masks_and_report
from .wrapping import (
    allow_skipped_parameters,
    build_anew,
    refuse_steering,
    save_at_once,
    wrap,
    wrap_building,
    wrap_checkpoints,
    wrap_counting,
    wrap_end,
    wrap_evaluation,
    wrap_loss,
)

logger = logging.getLogger(__name__)

# What a loss scale falls below only if every update overflows; where fairseq stops too.
_MIN_SCALE = 1e-4
# What a checkpoint keeps of a session.
_KEPT = {"pruners?": [str], "unit_map": Either(None, dict), "session": {str: list}, "tensors?": [str]}
_BROKEN = (
    "The loss or its gradient is not finite at step {step}; lower --learning_rate, clip with --max_grad_norm, or "
    "resume from the last checkpoint with bf16 in place of fp16."
)


def refuse_broken(model: nn.Module, step: int) -> None:
    """Raise HeadPruningError if a trained weight is NaN or infinite: losses are seen only where they are logged."""
    if not all_finite(model):
        raise HeadPruningError(_BROKEN.format(step=step))


class HeadPruningCallback(TrainerCallback, ExportableState):
    """Drives a session from any Trainer; its state is in every checkpoint.

    What is the size of the gates lies in ``trainer_state.json``, what is the size of the model (averages and masks of
    weight pruners) in ``pruning_state.safetensors`` beside it.

        session = open_session(model, [pruner("dsp", num_of_heads=12, joint_pruning=True)])
        trainer = Trainer(model=model, ...)
        HeadPruningCallback(session).add_to(trainer)

    Evaluation during training uses the hard mask and masked weights. Only states at the target (exactly K heads and
    the final density, annealing over) count as best checkpoints. After training the masks are final and the gates
    stay on the model.

    Args:
        session: an open session on the Trainer's model.
        mask_steps: write the current masks into ``output_dir`` every so many updates and at the end; 0: never.
    """

    def __init__(self, session: Optional[PruningSession] = None, *, mask_steps: int = 0) -> None:
        if session is None:
            raise HeadPruningError(
                "HeadPruningCallback needs an open session; if restore_callback_states_from_checkpoint is set, leave "
                "it out: the gates are restored without it."
            )
        self.session = session
        self.mask_steps = mask_steps
        self._scale = self._gate_factor = 1.0
        self._trainer: Any = None
        self._resumed: Optional[Checkpoint] = None
        self._restored = self._in_phase = self._tried = False
        self._step = 0
        self._saved_step: Optional[int] = None
        self._preparing = contextlib.ExitStack()

    def add_to(self, trainer: Any) -> "HeadPruningCallback":
        """Add to a Trainer, before its other callbacks, so that trackers report the gates' metrics too.

        From now on the Trainer's ``evaluation_loop`` runs with the masks on (between two masks the weights of some
        pruners are all there), its ``compute_loss`` gives the session's objective in training, its ``save_model``
        writes the pruned model (checkpoints keep all weights), its ``train`` refuses to resume a checkpoint that was
        cut off, and where a pruner trains in phases it builds its optimizer and schedule anew for each.

        Raises:
            HeadPruningError: the Trainer shards what is to be pruned as no pruner can work with, or a pruner asks for
                what this Trainer cannot do.
        """
        self._check_trainer(trainer)
        trainer.callback_handler.callbacks.insert(0, self)
        wrap(trainer, "train", self._train)
        wrap(trainer, "_inner_training_loop", self._try)
        wrap_checkpoints(trainer)
        wrap_end(trainer, lambda: 0 if self._resumed is None else self._resumed.step)
        changes = getattr(trainer, "model_init", None) is not None  # then sessions to come may be of another kind
        wrap_counting(trainer, lambda: self.session)
        wrap_evaluation(trainer, lambda: self.session)
        if changes or self.session.changes_loss:
            wrap_loss(trainer, lambda: self.session)
        if changes or self.session.steers_host:
            wrap_building(trainer, lambda: self.session, self._before_building)
        if not getattr(trainer, "saves_outcome", False):
            wrap(trainer, "save_model", self._save_model)
        self._trainer = trainer
        return self

    def change_session(self, session: PruningSession) -> None:
        """Drive another session, on a new model of the same Trainer; errors are those of :meth:`add_to`."""
        self.session, self._tried = session, False
        self._check_trainer(self._trainer)

    def _check_trainer(self, trainer: Any) -> None:
        refuse_steering(trainer, self.session)
        refuse_sharding(trainer, self.session)
        allow_skipped_parameters(trainer, self.session)

    def _train(self, original: Callable, resume_from_checkpoint: Any = None, *args: Any, **options: Any) -> Any:
        """Read and check the checkpoint that is to be resumed, once, before the Trainer loads anything of it."""
        found = resume_from_checkpoint or None
        if found is True:
            found = last_checkpoint(self._trainer.args.output_dir)
            if found is None:
                raise HeadPruningError(
                    f"There is no whole checkpoint in {self._trainer.args.output_dir} to resume from."
                )
        elif found is not None and not isinstance(found, Checkpoint):
            found = check_resumable(found)
        if found is not None:
            self.stored(found)
        if self._tried and not self.session.hardened and getattr(self._trainer, "model_init", None) is None:
            self._begin_anew(reloaded=found is not None)  # after a training that was interrupted
        self._resumed, self._restored, self._in_phase, self._tried, self._step = found, False, False, False, 0
        with alone_in(self._trainer.args.output_dir) if self._trainer.args.should_save else contextlib.nullcontext():
            with self._preparing:  # FSDP takes a state dict to shard it; ends with on_train_begin()
                self._preparing.enter_context(quiet_saving(self.session.model))
                return original(None if found is None else str(found.folder), *args, **options)

    def _try(self, original: Callable, *args: Any, **options: Any) -> Any:
        """One try of ``--auto_find_batch_size``, which begins once more, with smaller batches, when memory is full."""
        if self._tried:
            self._begin_anew()
        self._tried = True
        return original(*args, **options)

    def _begin_anew(self, reloaded: bool = False) -> None:
        made = self._trainer.state.global_step - (0 if self._resumed is None else self._resumed.step)
        if made > 0 and not reloaded:
            logger.warning(
                "training begins anew, and pruning with it, but the model keeps the weights that %d updates left, "
                "zeros of masks among them; load it anew, with a batch size that fits "
                "(--per_device_train_batch_size), to train its first weights",
                made,
            )
        self.session.begin_anew()
        self._restored, self._in_phase, self._step = False, False, 0
        if self.session.steers_host:
            self._trainer.optimizer = None  # that of another phase, perhaps

    def _save_model(self, original: Callable, output_dir: Optional[str] = None, _internal_call: bool = False) -> None:
        if _internal_call and output_dir is not None:
            original(output_dir, _internal_call=True)  # a checkpoint
        else:
            self.save_outcome(self._trainer, output_dir, original)

    def _before_building(self) -> int:
        """The update whose phase an optimizer is about to be built for; a resumed session is restored before."""
        if self._resumed is not None and not (self._restored or self._in_phase):
            self.session.total_steps = self._resumed.state.get("max_steps") or None
            self._go_on(self._resumed)
        return self._step

    def _go_on(self, checkpoint: Checkpoint) -> None:
        self.restore(checkpoint)
        self._restored, self._step = True, max(0, checkpoint.step - 1)
        self.session.enter_phase(self._step)

    def save_outcome(self, trainer: Any, output_dir: Optional[str], save_model: Callable[..., None]) -> None:
        """Save the pruned model: removed heads zeroed, weights masked, masks and report beside it.

        Args:
            trainer: whose model it is.
            output_dir: where to; default: the Trainer's.
            save_model: the Trainer's own way of saving, for models that keep all their heads.
        """
        weights, mask = self.session.of_kind("weights"), self.session.head_mask()
        folder, model = Path(output_dir or trainer.args.output_dir), trainer.accelerator.unwrap_model(trainer.model)
        form = functools.partial(stored_form, model, self.session)
        with self.session.evaluating(), quiet_saving(model):
            if mask is None:
                with form():
                    save_at_once(trainer, folder, lambda place: save_model(place, _internal_call=True))
            with whole(model, self.session) as here:
                if not here or not trainer.is_world_process_zero():
                    return
                if mask is not None:
                    tokenizer, pruners = trainer.processing_class, self.session.pruners
                    save_pruned(model, mask, folder, processing_class=tokenizer, pruners=pruners, form=form)
                self.session.save_beside(folder)
                if weights:
                    save_weight_masks_and_report(folder, model, self.session)

    # -- state -------------------------------------------------------------------------------------------------------

    def state(self) -> dict:
        """What ``trainer_state.json`` keeps of the session."""
        values = {name: np.asarray(value).tolist() for name, value in self.session.state_dict().items()}
        description = json.loads(self.session.description())
        tensors = sorted(self.session.tensor_names())
        return {"args": {}, "attributes": {**description, "session": values, "tensors": tensors}}

    def save_tensors(self, folder: "str | Path", step: int) -> None:
        """Write what of the session's state is the size of the model into the checkpoint of update ``step``.

        Every process calls it; those that write checkpoints do.
        """
        tensors = self.session.tensor_state()
        if tensors and self._trainer.args.should_save:
            write_tensor_state(folder, tensors, step)
        self._saved_step = step

    def stored(self, checkpoint: Checkpoint) -> Mapping[str, Any]:
        """What a checkpoint keeps of a session like this one.

        Raises:
            HeadPruningError: it has nothing, or of other pruners or another model.
        """
        folder, stored = checkpoint.folder, checkpoint.kept(type(self).__name__)
        if not stored:
            raise HeadPruningError(
                f"{folder} was not written by a pruning run; start from its model (--model_name_or_path) instead of "
                "resuming it."
            )
        try:
            attributes = conform(stored.get("attributes"), _KEPT)
            theirs = attributes["unit_map"] and UnitMap.from_dict(attributes["unit_map"])
        except ValueError as error:
            raise HeadPruningError(
                f"The pruning state in {folder} is damaged ({one_line(error):.200}); resume from another checkpoint."
            ) from error
        pruners = attributes.get("pruners", ["another version"])
        mine = [pruner.name for pruner in self.session.pruners]
        if pruners != mine:
            raise HeadPruningError(
                f"{folder} was pruned with {', '.join(pruners)}, this run uses {', '.join(mine)}; resume with the "
                "same pruner or choose another output_dir."
            )
        if theirs and self.session.unit_map:
            theirs.check_same_heads(self.session.unit_map, str(folder))
        return attributes

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take the session's state out of a checkpoint.

        Raises:
            HeadPruningError: it has none, or one of other pruners or another model, it is damaged, or its tensors are
                missing.
        """
        folder, attributes = checkpoint.folder, self.stored(checkpoint)
        self.session.load_state_dict(attributes["session"])
        if self.session.step > checkpoint.step:
            raise HeadPruningError(
                f"The pruning state in {folder} is of update {self.session.step}, after that of the checkpoint; "
                "resume from another checkpoint."
            )
        if attributes.get("tensors"):
            tensors = read_tensor_state(folder, checkpoint.step)
            missing = sorted(set(attributes["tensors"]) - set(tensors))
            if missing:
                raise HeadPruningError(f"The pruning state in {folder} lacks {missing[0]}; resume from another one.")
            self.session.load_tensor_state(tensors)

    # -- events ------------------------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Learn the length of training, restore a resumed run, refuse what cannot work."""
        if not any(module is self.session.model for module in model.modules()):
            raise HeadPruningError(
                "The gates are on another model than the Trainer's; open the session on its model (for a model_init, "
                "HeadPruningTrainer opens one on each model)."
            )
        self._preparing.close()
        if self._trainer is None:  # not added by add_to()
            if self._tried and state.global_step == 0 and not self.session.hardened:
                self.session.begin_anew()
            self._tried = True
        self.session.total_steps = state.max_steps
        self.session.warmup_steps = (
            args.get_warmup_steps(state.max_steps) if args.lr_scheduler_type == SchedulerType.LINEAR else None
        )
        for notice in notices_on(self.session.model):
            notice.in_checkpoints = True  # on_save() sees to it
        self._saved_step = None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if torch.distributed.get_world_size() > 1:
                self.session.all_reduce = reduce = torch.distributed.all_reduce
                self.session.all_greatest = functools.partial(reduce, op=torch.distributed.ReduceOp.MAX)
        self._check_host(args)
        if self.session.overrides("size_before"):
            check_sizes(self.session)
        self.session.follow()
        if state.global_step > 0 and not self._restored:
            own = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            kept = {"global_step": state.global_step, "stateful_callbacks": state.stateful_callbacks}
            self._go_on(self._resumed or Checkpoint(own, kept))
        self._restored = False  # the Trainer may begin once more, with smaller batches
        self._rest(optimizer)
        self._trained = self._trainable() if self.session.steers_host else set()
        self.session.settle()  # before anything is trained
        self._only_at_target(state)  # a resumed run's best was written before on_save()

    def _check_host(self, args: Any) -> None:
        session = self.session
        if self._trainer is None and (session.of_kind("weights") or session.changes_loss or session.steers_host):
            raise HeadPruningError(
                "Add the callback with its add_to(trainer), not through the Trainer's callbacks: evaluations must see "
                "the masked weights, and training what its pruners make of the loss and of the learning rate."
            )
        if session.changes_loss and args.n_gpu > 1:
            raise HeadPruningError(
                "A pruner looks at what the model gives, which is in pieces where one process drives several GPUs; "
                "start one process for each (torchrun), or show it one of them (CUDA_VISIBLE_DEVICES)."
            )

    def _rest(self, optimizer: Any) -> None:
        """In pipelined pruning the one parameter that is left to the optimizer must not move."""
        if self.session.freezes_model:
            for group in optimizer.param_groups:
                group["weight_decay"] = 0.0

    def _trainable(self) -> set[int]:
        return {id(parameter) for parameter in self.session.model.parameters() if parameter.requires_grad}

    def on_step_begin(self, args, state, control, **kwargs):
        """An update starts: draw the gates. Where a phase begins, the Trainer gets a new optimizer and schedule."""
        self._only_at_target(state)  # of an evaluation since, before the schedule moves to the target
        self._save_size(state.global_step)
        if self.session.enter_phase(state.global_step):
            if self.session.all_reduce is not None and not self._trainable() <= self._trained:
                raise HeadPruningError(
                    "A phase of training begins with parameters that were frozen before, and whose gradients would "
                    "not be averaged over the processes (DDP); train with one process, or freeze no parameters."
                )
            self._step, self._in_phase = state.global_step, True
            build_anew(self._trainer, keeps_optimizer=self.session.keeps_optimizer)
            self._in_phase = False
            self._rest(self._trainer.optimizer)
        self.session.before_update(state.global_step)

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        """The gradients are final: collect those of the gates. In pipelined pruning leave the model as it is."""
        scaler: Any = getattr(optimizer, "scaler", None)
        scaled = scaler is not None and scaler.is_enabled()
        self._scale = scaler.get_scale() if scaled else 1.0
        self._gate_factor = _lr_factor(optimizer)  # before pruners change the learning rate
        looks = self.session.freezes_model or self.session.overrides("before_step")
        if scaled and args.max_grad_norm <= 0 and looks:
            scaler.unscale_(optimizer.optimizer)  # and looks for overflows, as clipping would have
        self.session.after_backward(self._scale)
        if self.session.freezes_model:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.zero_()  # not None: the optimizer's state is in checkpoints, also of shards
        self.session.before_step(optimizer, rests=True)

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        """The model has stepped: step the gates and mask the weights, unless the loss scaler found an overflow."""
        # Fused optimizers look for overflows themselves, which accelerate does not notice; but the scale falls.
        scaler = getattr(optimizer, "scaler", None)
        scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else self._scale
        if scale < _MIN_SCALE:
            raise HeadPruningError(_BROKEN.format(step=state.global_step))
        overflow = scale < self._scale
        if overflow or getattr(optimizer, "step_was_skipped", False):
            self.session.skip_update()
            return
        self.session.after_step(self._gate_factor)

    def on_step_end(self, args, state, control, **kwargs):
        """Forget scores of models that nobody will get."""
        self._only_at_target(state)
        if self.mask_steps and (state.global_step % self.mask_steps == 0 or state.global_step == state.max_steps):
            self._save_masks(Path(args.output_dir) / f"mask{state.global_step}.safetensors", state)

    def on_save(self, args, state, control, **kwargs):
        """As :meth:`on_step_end`: the last evaluation comes after the last step.

        HeadPruningTrainer has written the tensors before ``trainer_state.json``; here they are for other Trainers.
        """
        self._only_at_target(state)
        if self._saved_step != state.global_step:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            if folder.is_dir() or not args.should_save:
                self.save_tensors(folder, state.global_step)

    def _save_masks(self, path: Path, state: Any) -> None:
        heads, weights = self.session.head_mask(), self.session.weight_masks()
        if not state.is_world_process_zero:
            return
        if weights:
            save_weight_masks(path, weights, heads)
        elif heads is not None:
            heads.save(path)

    def _only_at_target(self, state) -> None:
        if not self.session.at_target():
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    def on_log(self, args, state, control, logs=None, optimizer=None, **kwargs):
        """Add the gates' metrics to the training log; stop when training has broken down."""
        if not logs or "loss" not in logs:
            return
        scaled = getattr(optimizer, "scaler", None) is not None  # then single overflows are normal
        broken = not math.isfinite(logs["loss"]) or not (scaled or math.isfinite(logs.get("grad_norm", 0.0)))
        if broken:
            raise HeadPruningError(_BROKEN.format(step=state.global_step))
        metrics = self.session.metrics()
        logs.update(metrics)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(metrics)

    def on_train_end(self, args, state, control, **kwargs):
        """Fix the outcome. If the Trainer went back to its best checkpoint, gates and masks go back as well."""
        refuse_broken(self.session.model, state.global_step)
        self._save_size(state.global_step)  # where training is cut short with it
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.restore(read_checkpoint(state.best_model_checkpoint))
        self.session.tell_unfinished()
        self.session.harden()
        self._save_size(None)

    def _save_size(self, step: Optional[int]) -> None:
        name = self.session.size_before(step)
        if name is not None:
            save_size(self._trainer, self.session, name, functools.partial(self.save_outcome, self._trainer))


def _lr_factor(optimizer: Any) -> float:
    """Where the learning-rate schedule stands: the gates' learning rate follows it, as in the published script."""
    groups = optimizer.param_groups  # FSDP restores no group without parameters
    group = next((each for each in groups if each["params"]), groups[0])
    initial = float(group.get("initial_lr", group["lr"]))
    return float(group["lr"]) / initial if initial else 1.0
