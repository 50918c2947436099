"""What a session asks of every method."""

import contextlib
import dataclasses
import numbers
from typing import TYPE_CHECKING, Any, ContextManager, Optional, Sequence, get_args, get_type_hints

import numpy as np
import torch

from .errors import HeadPruningError
from .masks import HeadMask

if TYPE_CHECKING:
    from .session import PruningSession


# A whole number will do for a float, numpy's numbers for Python's; a truth value is no number.
_KINDS: dict[type, tuple[type, str]] = {
    bool: (bool, "True or False"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    str: (str, "a text"),
}


def check_types(config: Any) -> None:
    """Raise HeadPruningError if an option's value is not of the type that its field in the dataclass says."""
    types = get_type_hints(type(config)) if dataclasses.is_dataclass(config) else {}
    for name, annotation in types.items():
        value, allowed = getattr(config, name), get_args(annotation) or (annotation,)
        wanted = next((kind for kind in allowed if kind in _KINDS), None)
        if wanted is None or value is None and type(None) in allowed:
            continue
        kind, words = _KINDS[wanted]
        if not isinstance(value, kind) or isinstance(value, bool) and wanted is not bool:
            raise HeadPruningError(f"--{name.replace('_', '-')} is {value!r}; it must be {words}.")


class Pruner:
    """Base of all methods: every hook of the life cycle, doing nothing.

    ``config`` is the method's dataclass; ``session`` is set while attached.
    """

    name = ""
    #: What the host must provide: any of "hidden_states", "attentions", "eager_attention".
    needs: frozenset = frozenset()
    #: Whether the model's own weights stay as they are (pipelined pruning).
    freezes_model = False
    #: Whether a run that starts anew from a checkpoint's weights takes over what was learnt there (gate logits).
    inherits = True
    #: Whether head gates must be on the model.
    needs_gates = True

    def __init__(self, config: Any) -> None:
        check_types(config)
        self.config = config
        self.session: Optional["PruningSession"] = None

    def check_options(self) -> None:
        """Raise HeadPruningError for options that fit no model or contradict each other; called before any is loaded.

        The session calls it too, so :meth:`attach` finds them checked.
        """

    def options(self) -> dict[str, Any]:
        """The options in force, for reports: those given, and what the defaults that depend on others came to."""
        return dict(vars(self.config))

    def attach(self, session: "PruningSession") -> None:
        """Bind to a session, whose unit map, seed and length of training are known."""
        self.session = session

    def detach(self) -> None:
        """Leave the model as it was."""
        self.session = None

    def before_update(self, step: int) -> None:
        """Move schedules and draw samples for update ``step`` (from 0)."""

    def loss(self, loss: torch.Tensor, inputs: Any, outputs: Any) -> torch.Tensor:
        """Replace or add to the task loss of one micro-batch."""
        return loss

    def after_backward(self, loss_scale: float, denominator: float, micro_batches: int) -> None:
        """Use the gradients of a whole update; see :meth:`PruningSession.after_backward`."""

    def before_step(self, step: int) -> None:
        """The gradients are final (unscaled, reduced, clipped) and the host's optimizer is about to step."""

    def after_step(self, step: int, lr_factor: float) -> None:
        """The host's optimizer has stepped."""

    def penalty(self) -> float:
        """The regulariser that the objective adds to each micro-batch's loss (its gradient is the method's own)."""
        return 0.0

    def metrics(self) -> dict[str, float]:
        """Numbers for the training log; no device is waited for."""
        return {}

    def at_target(self) -> bool:
        """Whether a score measured now belongs to the model that training will give."""
        return True

    def lr_factor(self, step: int) -> float:
        """Factor on the host's learning rate."""
        return 1.0

    def phase(self, step: int) -> int:
        """A new number asks the host for a new optimizer and schedule."""
        return 0

    def evaluating(self) -> ContextManager[None]:
        """Inside the block the model is what would be kept if training ended now; reversible, bit for bit."""
        return contextlib.nullcontext()

    def harden(self) -> None:
        """Fix the outcome: from now on training and evaluation use the final mask."""

    def reset_optimizer(self) -> None:
        """Forget the moments of the method's own optimizer, as the host's ``--reset-optimizer`` does with its own."""

    def head_mask(self) -> Optional[HeadMask]:
        """The heads that would stay if training ended now; None for methods that prune no heads."""
        return None

    def state_dict(self) -> dict[str, np.ndarray]:
        """Everything a killed run needs to go on bit-equal, as float64 arrays."""
        return {}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Restore :meth:`state_dict`."""

    def tensor_state(self) -> dict[str, torch.Tensor]:
        """What of the state is as large as the model; tensors may be the live ones, so write them at once."""
        return {}

    def load_tensor_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore :meth:`tensor_state`."""


def options_of(pruners: Sequence[Pruner]) -> dict[str, Any]:
    """The options in force of several pruners together; names are the methods' own and differ."""
    return {name: value for pruner in pruners for name, value in pruner.options().items()}
