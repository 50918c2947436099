"""A pruning session driven from the events of a Trainer."""

import json
import logging
import math
from pathlib import Path
from typing import Any, Mapping, Optional

import numpy as np
import torch
import torch.distributed
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from head_pruning import HeadPruningError, PruningSession

logger = logging.getLogger(__name__)


class HeadPruningCallback(TrainerCallback, ExportableState):
    """Drives a session from any Trainer; its state, the size of the gates, is in every ``trainer_state.json``.

        session = open_session(model, [pruner("dsp", num_of_heads=12, joint_pruning=True)])
        trainer = Trainer(model=model, ...)
        HeadPruningCallback(session).add_to(trainer)

    Evaluation during training uses the hard mask. Only states at the target (exactly K heads, annealing over) count
    as best checkpoints. After training the mask is final and the gates stay on the model.

    Args:
        session: an open session on the Trainer's model.
        mask_steps: write the current mask into ``output_dir`` every so many updates and at the end; 0: never.
    """

    def __init__(self, session: Optional[PruningSession] = None, *, mask_steps: int = 0) -> None:
        if session is None:
            raise HeadPruningError(
                "HeadPruningCallback needs an open session; if restore_callback_states_from_checkpoint is set, leave "
                "it out: the gates are restored without it."
            )
        self.session = session
        self.mask_steps = mask_steps
        self._scale = 1.0

    def add_to(self, trainer: Any) -> "HeadPruningCallback":
        """Add to a Trainer, before its other callbacks, so that trackers report the gates' metrics too."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    # -- state -------------------------------------------------------------------------------------------------------

    def state(self) -> dict:
        """What ``trainer_state.json`` keeps of the session."""
        values = {name: np.asarray(value).tolist() for name, value in self.session.state_dict().items()}
        description = json.loads(self.session.description())
        return {"args": {}, "attributes": {**description, "session": values}}

    def restore(self, stateful_callbacks: Mapping[str, Any], where: str) -> None:
        """Take the session's state out of a checkpoint's ``stateful_callbacks``.

        Raises:
            HeadPruningError: it has none, or one of other pruners or another model.
        """
        stored = stateful_callbacks.get(type(self).__name__)
        stored = stored[0] if isinstance(stored, list) and stored else stored
        if not stored:
            raise HeadPruningError(
                f"{where} was not written by a pruning run; start from its model (--model_name_or_path) instead of "
                "resuming it."
            )
        attributes = stored["attributes"]
        mine = [pruner.name for pruner in self.session.pruners]
        if attributes.get("pruners") != mine:
            raise HeadPruningError(
                f"{where} was pruned with {', '.join(attributes.get('pruners', ['another version']))}, this run uses "
                f"{', '.join(mine)}; resume with the same pruner or choose another output_dir."
            )
        self.session.load_state_dict({n: np.array(v, dtype=np.float64) for n, v in attributes["session"].items()})

    # -- events ------------------------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Learn the length of training, restore a resumed run, refuse what cannot work."""
        if not any(module is self.session.model for module in model.modules()):
            raise HeadPruningError("The gates are on another model than the Trainer's; open the session on its model.")
        self.session.total_steps = state.max_steps
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if torch.distributed.get_world_size() > 1:
                self.session.all_reduce = torch.distributed.all_reduce
        if state.global_step > 0:
            self.restore(state.stateful_callbacks, "The checkpoint")
        if self.session.freezes_model:
            for group in optimizer.param_groups:
                group["weight_decay"] = 0.0  # the one parameter left to the optimizer must not move
        self.session.metrics()  # settles the schedules, or refuses them, before anything is trained

    def on_step_begin(self, args, state, control, **kwargs):
        """An update starts: draw the gates."""
        self.session.before_update(state.global_step)

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        """Keep the loss scale of this update; in pipelined pruning leave the model as it is."""
        scaler = getattr(optimizer, "scaler", None)
        self._scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0
        if self.session.freezes_model:
            if scaler is not None and scaler.is_enabled() and args.max_grad_norm <= 0:
                scaler.unscale_(optimizer.optimizer)  # looks for overflows, as clipping would have
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.zero_()

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        """The model has stepped: step the gates, unless the loss scaler found an overflow."""
        if getattr(optimizer, "step_was_skipped", False):
            return
        self.session.after_backward(self._scale)
        self.session.after_step(_lr_factor(optimizer))

    def on_step_end(self, args, state, control, **kwargs):
        """Forget scores of models that nobody will get."""
        self._only_at_target(state)
        if self.mask_steps and (state.global_step % self.mask_steps == 0 or state.global_step == state.max_steps):
            if state.is_world_process_zero:
                self.session.head_mask().save(Path(args.output_dir) / f"mask{state.global_step}.safetensors")

    def on_save(self, args, state, control, **kwargs):
        """As :meth:`on_step_end`: the last evaluation comes after the last step."""
        self._only_at_target(state)

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
            raise HeadPruningError(
                f"The loss or its gradient is not finite at step {state.global_step}; lower --learning_rate, clip "
                "with --max_grad_norm, or resume from the last checkpoint with bf16 in place of fp16."
            )
        metrics = self.session.metrics()
        logs.update(metrics)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(metrics)

    def on_train_end(self, args, state, control, **kwargs):
        """Fix the outcome. If the Trainer went back to its best checkpoint, the gates go back as well."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            path = Path(state.best_model_checkpoint) / TRAINER_STATE_NAME
            self.restore(json.loads(path.read_text(encoding="utf-8"))["stateful_callbacks"], str(path.parent))
        if not self.session.at_target():
            logger.warning(
                "training ended before the pruning schedule did: the model was never trained with exactly the heads "
                "that are kept; lower --cooldown_steps (a fraction such as 0.6 follows the length of training)"
            )
        self.session.harden()


def _lr_factor(optimizer: Any) -> float:
    """Where the learning-rate schedule stands: the gates' learning rate follows it, as in the published script."""
    group = optimizer.param_groups[0]
    initial = float(group.get("initial_lr", group["lr"]))
    return float(group["lr"]) / initial if initial else 1.0
