"""``pruning_scheduler_factory`` of Prune Once for All's manual: pruning that a loop drives by ``step()``."""

from pathlib import Path
from typing import Any, Mapping

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from head_pruning import HeadPruningError, PruningSession

from ..command_line.mistakes import as_arguments
from .callback import HeadPruningCallback
from .pruning_config import build_pruner, read_config
from .session import open_session


class PruningScheduler:
    """Prunes the weights of a model as a configuration says; see :func:`pruning_scheduler_factory`.

    Attributes:
        session: the open session on the model.
    """

    def __init__(self, session: PruningSession) -> None:
        self.session = session
        self._mine = {id(parameter) for parameter in session.model.parameters()}
        self._stepped: set[int] = set()  # the optimizers that have stepped in this update
        session.before_update(session.step)
        self._hooks = [
            register_optimizer_step_pre_hook(self._before_optimizer),
            register_optimizer_step_post_hook(self._after_optimizer),
        ]

    @property
    def _fixed(self) -> bool:
        """Whether the masks will not move any more."""
        return all(getattr(pruner, "locked", True) for pruner in self.session.pruners)

    def _before_optimizer(self, optimizer: Any, args: Any, options: Any) -> None:
        parameters = (id(each) for group in optimizer.param_groups for each in group["params"])
        if self.session.in_step and not self._stepped or self._mine.isdisjoint(parameters):
            return  # a Trainer's callback drives the session, or another model is trained
        if id(optimizer) in self._stepped:
            raise HeadPruningError(
                "The optimizer steps once more, but scheduler.step() was not called since; call it after each "
                "optimizer.step(), or with a Trainer scheduler.add_to(trainer) once, before it trains."
            )
        if not self._stepped:
            self.session.after_backward()
            self.session.before_step(optimizer)
        self._stepped.add(id(optimizer))

    def _after_optimizer(self, optimizer: Any, args: Any, options: Any) -> None:
        if id(optimizer) in self._stepped and self._fixed:  # then nobody need call step()
            self._end_update()

    def _end_update(self) -> None:
        if self._stepped:
            self.session.after_step()
        else:
            self.session.skip_update()  # a loss scaler met an overflow
        self._stepped.clear()
        self.session.before_update(self.session.step + 1)

    def step(self) -> None:
        """The update is over: masks move if it is time. Call it once after each ``optimizer.step()``.

        Where masks are fixed from the start (``one_shot``) it may be left out.
        """
        if not self._fixed or self._stepped:
            self._end_update()

    def add_to(self, trainer: Any) -> HeadPruningCallback:
        """Have a Trainer drive the schedule, write what it needs into its checkpoints, and resume from these.

        Then ``step()`` is not called. ``HeadPruningTrainer(session=scheduler.session)`` does the same.
        """
        self._release()
        return HeadPruningCallback(self.session).add_to(trainer)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All that a killed loop needs to go on bit-equal: flat names to tensors, for ``torch.save``."""
        numbers = {f"session.{key}": torch.from_numpy(value) for key, value in self.session.state_dict().items()}
        return {**numbers, **{f"tensors.{key}": value for key, value in self.session.tensor_state().items()}}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore :meth:`state_dict`, after the model's weights. Raises HeadPruningError if it is of another run."""
        parts: dict[str, dict[str, Any]] = {"session": {}, "tensors": {}}
        for key, value in state.items():
            kind, _, name = key.partition(".")
            if kind not in parts:
                raise HeadPruningError(f"The state of the pruning schedule has {key}, which is none of its own.")
            parts[kind][name] = value.numpy() if kind == "session" else value
        self.session.load_state_dict(parts["session"])
        self.session.load_tensor_state(parts["tensors"])
        self.session.before_update(self.session.step)

    def remove_pruning(self) -> None:
        """End pruning: the model is an ordinary one again, and what is pruned stays zero until it is trained on."""
        if self._stepped:
            self._end_update()
        self.session.tell_unfinished()
        self._release()
        self.session.detach()

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def pruning_scheduler_factory(
    model: nn.Module, config: "str | Path | Mapping[str, Any]", **overrides: Any
) -> PruningScheduler:
    """Prune the weights of a model as a configuration of Prune Once for All's package says (Zafrir et al. 2021).

        scheduler = pruning_scheduler_factory(model, "lock_config.json")
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        scheduler.remove_pruning()

    The model's modules and parameters keep their names; any optimizer, made before or after, will do.

    Args:
        model: a model of transformers, or of torch alone.
        config: a JSON file of that format, or what it holds. ``lock_config.json`` and the others of
            :data:`hf_plugin.training.pruning_config.PUBLISHED` need no file.
        **overrides: keys that replace those of the configuration.

    Raises:
        HeadPruningError: the configuration is damaged, has a key that is unknown, or does not fit the model.
    """
    try:
        session = open_session(model, [build_pruner(model, read_config(config, **overrides))])
        try:
            return PruningScheduler(session)
        except BaseException:
            session.detach()
            raise
    except HeadPruningError as error:
        raise HeadPruningError(as_arguments(str(error))) from error
