"""What a session asks of every method."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Callable, ContextManager, Mapping, Optional, Protocol, Sequence

import numpy as np
import torch

from .masks import HeadMask
from .options import check_types
from .outputs import Outputs, Recorder
from .unit_map import UnitMap


class SessionView(Protocol):
    """What a pruner may ask of the session that it is attached to."""

    model: torch.nn.Module
    unit_map: Optional[UnitMap]
    pruners: list[Pruner]
    seed: int
    total_steps: Optional[int]
    steps_per_epoch: Optional[float]
    warmup_steps: Optional[int]
    load_teacher: Optional[Callable[[str, frozenset], tuple[torch.nn.Module, Optional[UnitMap]]]]
    weights_come_later: bool
    starts_trained: bool
    sums_losses: bool
    gates: Any
    master_of: Optional[Callable[[torch.nn.Parameter], torch.Tensor]]

    def collect(self, gradients: torch.Tensor, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sum gradients and counts over the ranks."""

    def summed(self, gradients: torch.Tensor, counts: np.ndarray) -> torch.Tensor:
        """The same on the device, counts behind the gradients; nothing is waited for."""

    @property
    def greatest(self) -> Optional[Callable[[torch.Tensor], Any]]:
        """Takes the greatest of each value over the ranks, in place; None when there is one rank."""

    @property
    def needs(self) -> frozenset:
        """What all pruners of the session need of a model's outputs."""

    def recorder(self, model: torch.nn.Module, unit_map: Optional[UnitMap]) -> Recorder:
        """What records all of this of another model."""

    def head_mask(self) -> Optional[HeadMask]:
        """The heads that would stay if training ended now; None when no pruner prunes heads."""

    def weights_without(self, mask: HeadMask) -> dict[str, list[tuple[int, torch.Tensor]]]:
        """Parameter name to (dimension, places along it) of what belongs to heads that the mask removes."""


class Pruner:
    """Base of all methods: every hook of the life cycle, doing nothing.

    ``config`` is the method's dataclass; ``session`` is set while attached. The hooks of an update come in the order
    that :mod:`head_pruning.session` gives. Hosts know no method: what they must know of one are the properties below.
    """

    name = ""
    #: What the method does, one of :data:`head_pruning.registry.KINDS`.
    kind = "heads"
    #: Where the defaults of the published BERT scripts differ from those of the options, which are fairseq's scripts'.
    bert_defaults: Mapping[str, Any] = {}
    #: What :meth:`loss` looks at: any of "hidden_states", "attentions"; "eager_attention" asks the host to compute
    #: attention openly ("attentions" does so too).
    needs: frozenset = frozenset()
    #: Whether the model's own weights stay as they are (pipelined pruning).
    freezes_model = False
    #: Whether a run that starts anew from a checkpoint's weights takes over what was learnt there (gate logits).
    inherits = True
    #: Whether the model may come with heads that were pruned by zeroing them: the method knows which these are.
    takes_zeroed_heads = False
    #: Whether the method goes on from a trained model only.
    needs_trained_model = False
    #: Whether it works by the sites and layers of the model.
    needs_unit_map = True
    #: Whether trainable parameters get no gradient in some updates.
    skips_parameters = False
    #: Whether a new phase goes on with the host's optimizer, and only the learning-rate schedule begins anew.
    keeps_optimizer = False
    #: Whether the method may set in in the middle of a training that did not use it: it has no schedule.
    starts_anywhere = False
    #: Whether it takes a training to know the outcome; False: a stored model can be run with it at once.
    needs_training = True
    #: The option that says how long the method's schedule takes; None: it has none.
    schedule_option: Optional[str] = None
    #: Entries of :meth:`state_dict` that a run which starts anew from a checkpoint's weights does not take over.
    schedule_state: frozenset = frozenset()
    #: What entries of :meth:`state_dict` must be, by name (:mod:`head_pruning.compact.shapes`); others: finite.
    state_shapes: Mapping[str, Any] = {}

    def __init__(self, config: Any) -> None:
        check_types(config)
        self.config = config
        #: Set while attached.
        self.session: SessionView = None  # type: ignore[assignment]

    @property
    def needs_gates(self) -> bool:
        """Whether head gates must be on the model."""
        return self.kind == "heads"

    @property
    def idle_hooks(self) -> frozenset:
        """Hooks that the class has and its options leave idle."""
        return frozenset()

    @property
    def units(self) -> str:
        """What is gated, where gates are needed: one of :data:`head_pruning.unit_map.NUMBERED`."""
        return getattr(self.config, "prune_units", "heads")

    @property
    def choosing(self) -> bool:
        """Whether this update's gradients tell a method what will stay, on its way to fewer heads."""
        return False

    @property
    def heads_final(self) -> bool:
        """Whether the heads that :meth:`head_mask` says would stay are those that will."""
        return True

    @property
    def learns_gates(self) -> bool:
        """Whether gates learn from this update's gradients although nothing is :attr:`choosing`."""
        return False

    @classmethod
    def bert_options(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options that were set, and what the published BERT scripts make of others.

        Raises:
            HeadPruningError: options contradict each other.
        """
        return {**cls.bert_defaults, **options}

    def check_options(self) -> None:
        """Raise HeadPruningError for options that fit no model or contradict each other; called before any is loaded.

        The session calls it too, so :meth:`attach` finds them checked.
        """

    def options(self) -> dict[str, Any]:
        """The options in force, for reports: those given, and what the defaults that depend on others came to."""
        return dict(vars(self.config))

    def summary(self) -> str:
        """What is pruned, in a few words for the log; called while attached."""
        return " ".join(f"{name}={value}" for name, value in self.options().items()) if self.config else ""

    def attach(self, session: SessionView) -> None:
        """Bind to a session, whose model, unit map and seed are known."""
        self.session = session

    def detach(self) -> None:
        """Leave the model as it was."""
        self.session = None  # type: ignore[assignment]

    def begin_anew(self) -> None:
        """Training begins once more, with the model as it is now: be again as :meth:`attach` left it."""
        session = self.session
        self.detach()
        self.attach(session)

    def follow(self) -> None:
        """Other parameters may stand in the model's places: a host made shards of them."""

    # -- an update ---------------------------------------------------------------------------------------------------

    def enter_phase(self, phase: int) -> None:
        """The next update is of this phase: settle what is trained. The host builds its optimizer after this."""

    def before_update(self, step: int) -> None:
        """Move schedules and draw samples for update ``step`` (from 0)."""

    def loss(self, loss: torch.Tensor, inputs: Any, outputs: Outputs) -> torch.Tensor:
        """Replace or add to the task loss of one micro-batch.

        Args:
            loss: the task loss, or what the pruners before made of it; a mean, or a sum as ``outputs.weight`` says.
            inputs: the host's batch, as it is.
            outputs: what the model gave, with what :attr:`needs` asks for.
        """
        return loss

    def after_backward(self, loss_scale: float, denominator: float, micro_batches: int) -> None:
        """Use the gradients of a whole update; see :meth:`PruningSession.after_backward`."""

    def before_step(self, step: int) -> None:
        """The gradients are final (unscaled, reduced, clipped) and the host's optimizer is about to step."""

    def after_step(self, step: int, lr_factor: float) -> None:
        """The host's optimizer has stepped."""

    def skip_update(self, step: int) -> None:
        """The host's optimizer has not stepped (an overflow): take back what :meth:`before_step` did, and do not step.

        Comes in the place of :meth:`after_step`, wherever the update had got to.
        """

    # -- what a host asks --------------------------------------------------------------------------------------------

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
        """Factor on the host's learning rate in update ``step``; that of the gates does not follow it."""
        return 1.0

    def phase(self, step: int) -> int:
        """A new number asks the host for a new optimizer and learning-rate schedule from update ``step`` on.

        It must follow from the step, the options and the state that checkpoints keep (of the length of training, say),
        so that a resumed run knows its phase before it builds its optimizer.
        """
        return 0

    def schedule_end(self, step: int) -> Optional[int]:
        """The update at which the learning-rate schedule of the phase of ``step`` ends; None: the end of training."""
        return None

    def size_before(self, step: Optional[int]) -> Optional[str]:
        """The name of the smaller model that is finished when update ``step`` begins, such as ``heads12``; else None.

        The host saves it, with the heads that it lacks cut out, before :meth:`enter_phase`. When training is over it
        asks once for the number of updates made, before :meth:`harden`, and once for None, after it.
        """
        return None

    def evaluating(self) -> ContextManager[None]:
        """Inside the block the model is what would be kept if training ended now; reversible, bit for bit."""
        return contextlib.nullcontext()

    def stored(self) -> ContextManager[None]:
        """Inside the block the model is in the form in which the outcome is stored; reversible, bit for bit."""
        return contextlib.nullcontext()

    def save_beside(self, folder: Path) -> None:
        """Write into the folder of the stored outcome what goes with it."""

    def harden(self) -> None:
        """Fix the outcome: from now on training and evaluation use the final mask."""

    def reset_optimizer(self) -> None:
        """Forget the moments of the method's own optimizer, as the host's ``--reset-optimizer`` does with its own."""

    def head_mask(self) -> Optional[HeadMask]:
        """The heads that would stay if training ended now; None for methods that prune no heads."""
        return None

    def weight_masks(self) -> dict[str, torch.Tensor]:
        """Parameter name to ``bool`` mask (true: stays) on the CPU; empty for methods that mask no weights."""
        return {}

    def left_dense(self) -> Optional[dict[str, int]]:
        """Names and sizes of the matrices that a method that prunes weights leaves dense; None for others."""
        return None

    def masked_parameters(self) -> frozenset[str]:
        """Names of the parameters of which single weights are pruned."""
        return frozenset()

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, np.ndarray]:
        """Everything a killed run needs to go on bit-equal, as float64 arrays."""
        return {}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Restore :meth:`state_dict`."""

    def tensor_names(self) -> list[str]:
        """The names in :meth:`tensor_state`."""
        return list(self.tensor_state())

    def tensor_state(self) -> dict[str, torch.Tensor]:
        """What of the state is as large as the model; tensors may be the live ones, so write them at once."""
        return {}

    def load_tensor_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore :meth:`tensor_state`."""


def options_of(pruners: Sequence[Pruner]) -> dict[str, Any]:
    """The options in force of several pruners together; names are the methods' own and differ."""
    return {name: value for pruner in pruners for name, value in pruner.options().items()}
