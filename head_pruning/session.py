"""The object that a training loop drives."""

import contextlib
import json
from typing import Any, Callable, Iterable, Iterator, Mapping, Optional, Sequence

import numpy as np
import torch
from torch import nn

from .errors import HeadPruningError
from .gates.bank import GateBank, refuse_gates
from .masks import HeadMask
from .pruner import Pruner
from .unit_map import UnitMap

STATE_VERSION = 1
_UNGATE = "detach the session, or take the mask off, before another session is attached"


def check_pruners(pruners: Any) -> list[Pruner]:
    """The pruners as a list. Raises HeadPruningError if they are none, or no list of pruners."""
    if isinstance(pruners, (str, Pruner)) or not isinstance(pruners, Iterable):
        raise HeadPruningError(f"The pruners are {pruners!r}, not a list of pruners; give a list, also of one.")
    listed = list(pruners)
    if not listed:
        raise HeadPruningError("A session needs at least one pruner.")
    for pruner in listed:
        if not isinstance(pruner, Pruner):
            raise HeadPruningError(f"{pruner!r} is no pruner; build one by its name and options, and give that.")
    return listed


class PruningSession:
    """Owns the pruners of one model: their gates, optimizers, step and state.

    Args:
        model: the model; its parameters and code are not changed.
        unit_map: its sites; None where no pruner works by sites.
        pruners: the methods; at most one of them may own the head gates.
        seed: of every draw; the same on all ranks.
        total_steps: updates in training if known, for step counts given as fractions.
        all_reduce: sums a float64 tensor over the data-parallel ranks in place; None when there is one rank.
        fired_within: every targeted site must have run within this many updates (1; more for models that drop layers).

    Typical use::

        session = PruningSession(model, unit_map, [pruner])
        session.attach()
        for step, batch in enumerate(batches):
            session.before_update(step)
            loss = session.loss(compute_loss(model, batch))
            loss.backward()
            session.after_backward()
            session.before_step()
            optimizer.step()
            session.after_step()
        session.harden()
    """

    def __init__(
        self,
        model: nn.Module,
        unit_map: Optional[UnitMap],
        pruners: Sequence[Pruner],
        *,
        seed: int = 1,
        total_steps: Optional[int] = None,
        all_reduce: Optional[Callable[[torch.Tensor], Any]] = None,
        fired_within: int = 1,
    ) -> None:
        self.model = model
        self.unit_map = unit_map
        self.pruners = check_pruners(pruners)
        self.seed = seed
        self.total_steps = total_steps
        self.all_reduce = all_reduce
        self.fired_within = fired_within
        self.gated = any(pruner.needs_gates for pruner in self.pruners)
        if self.gated and unit_map is None:
            raise HeadPruningError("Pruners of heads need the model's unit map; pass it to the session.")
        self.gates = None if unit_map is None else GateBank(model, unit_map)
        #: For hosts with float32 master copies: leads from a parameter to its copy, with ``.grad`` where it has one.
        self.master_of: Optional[Callable[[nn.Parameter], torch.Tensor]] = None
        self.step = 0
        #: Whether the outcome is fixed.
        self.hardened = False
        self._updates_here = 0
        self._started = False
        self._attached: list[Pruner] = []
        self._at_detach: list[Callable[[], Any]] = []

    # -- life cycle ----------------------------------------------------------------------------------------------

    def attach(self) -> "PruningSession":
        """Put gates and masks on. If that fails, the model is left as it was.

        Raises:
            HeadPruningError: the session is attached already, the heads are gated already, or options do not fit the
                model.
        """
        if self._attached:
            raise HeadPruningError("The session is attached already; detach() it first to start anew.")
        for pruner in self.pruners:
            pruner.check_options()
        if self.gated:
            refuse_gates(self.model, self.unit_map, _UNGATE)
        try:
            for pruner in self.pruners:
                pruner.attach(self)
                self._attached.append(pruner)
            if sum(pruner.head_mask() is not None for pruner in self.pruners) > 1:
                raise HeadPruningError("Two of the pruners own the head gates; keep one of them.")
            if self.gated:
                self.gates.attach()
        except BaseException:
            self.detach()
            raise
        self._started = self.hardened = False
        return self

    def before_update(self, step: int) -> None:
        """Start update ``step`` (from 0), which may be several micro-batches: move schedules, draw gates once.

        Raises:
            HeadPruningError: a gated module was wrapped or replaced since; told before the first update.
        """
        if self.gated and not self._started:
            self.gates.check_in_place(self.model)
        self._started = True
        self.step = step
        for pruner in self.pruners:
            pruner.before_update(step)

    def loss(self, loss: torch.Tensor, inputs: Any = None, outputs: Any = None) -> torch.Tensor:
        """The objective of one micro-batch: the task loss, unless a distiller replaces or adds terms."""
        for pruner in self.pruners:
            loss = pruner.loss(loss, inputs, outputs)
        return loss

    def after_backward(self, loss_scale: float = 1.0, denominator: float = 1.0, micro_batches: int = 1) -> None:
        """Collect the gradients of a whole update, once, before the host's optimizer steps.

        The gradient used is ``(sum over ranks of gradients / loss_scale + penalty per micro-batch) / sum of
        denominators``. For a loss summed over tokens pass this rank's token count and number of micro-batches; for a
        mean loss (already divided by the number of micro-batches) leave both at 1.

        Args:
            loss_scale: factor that the loss was multiplied with for fp16.
            denominator: this rank's share of what the host divides its gradients by.
            micro_batches: this rank's share of how often the penalty counts.

        Raises:
            UnfiredSiteError: a targeted site did not run in the first ``fired_within`` updates.
        """
        self._updates_here += 1
        if self.gated and self._updates_here == self.fired_within:
            self.gates.check_fired()
        for pruner in self.pruners:
            pruner.after_backward(loss_scale, denominator, micro_batches)

    def before_step(self) -> None:
        """The gradients are final and the host's optimizer is about to step (some weight pruners need this call)."""
        for pruner in self.pruners:
            pruner.before_step(self.step)

    def after_step(self, lr_factor: float = 1.0) -> None:
        """The host's optimizer has stepped, and the gradients are still there: step the gates' own, mask weights.

        Args:
            lr_factor: factor on the learning rate of the gates.
        """
        for pruner in self.pruners:
            pruner.after_step(self.step, lr_factor)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside the block the model runs in its evaluation state, even if it is in training mode."""
        with contextlib.ExitStack() as stack:
            if self.gates is not None:
                stack.enter_context(self.gates.forced("evaluation"))
            for pruner in self.pruners:
                stack.enter_context(pruner.evaluating())
            yield

    def harden(self) -> Optional[HeadMask]:
        """Fix the outcome (exactly K heads, the target density) and return the head mask, None without one."""
        for pruner in self.pruners:
            pruner.harden()
        self.hardened = True
        return self.head_mask()

    def detach(self) -> None:
        """Take everything off: the model is again what it was, bit for bit, but for the zeros of weight pruners."""
        if self.gates is not None:
            self.gates.detach()
        while self._attached:
            self._attached.pop().detach()
        while self._at_detach:
            self._at_detach.pop()()

    def freeze(self) -> None:
        """Freeze the model for pipelined pruning, but for the last of its smallest parameters, until :meth:`detach`.

        Optimizers, loss scalers and data-parallel wrappers refuse a model without any; the host must not step it.

        Raises:
            HeadPruningError: nothing of the model is trainable.
        """
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not trainable:
            raise HeadPruningError("All parameters of the model are frozen; leave at least one trainable.")
        spare = min(reversed(trainable), key=lambda parameter: parameter.numel())
        for parameter in trainable:
            parameter.requires_grad_(parameter is spare)
        self.on_detach(lambda: [parameter.requires_grad_(True) for parameter in trainable])

    def on_detach(self, undo: Callable[[], Any]) -> None:
        """Have :meth:`detach` call ``undo``: for what a host changed to make the gates run."""
        self._at_detach.append(undo)

    # -- what a host asks ----------------------------------------------------------------------------------------

    def head_mask(self) -> Optional[HeadMask]:
        """The heads that would stay if training ended now; None when no pruner prunes heads."""
        return next((mask for mask in (pruner.head_mask() for pruner in self.pruners) if mask is not None), None)

    def at_target(self) -> bool:
        """Whether a score measured now belongs to the model that training will give."""
        return all(pruner.at_target() for pruner in self.pruners)

    @property
    def freezes_model(self) -> bool:
        """Whether the model's own weights stay as they are (pipelined pruning)."""
        return any(pruner.freezes_model for pruner in self.pruners)

    @property
    def needs(self) -> frozenset:
        """What the host must provide: any of "hidden_states", "attentions", "eager_attention"."""
        return frozenset().union(*(pruner.needs for pruner in self.pruners))

    def lr_factor(self, step: int) -> float:
        """Factor on the host's learning rate at ``step``."""
        return float(np.prod([pruner.lr_factor(step) for pruner in self.pruners]))

    def phase(self, step: int) -> int:
        """Changes when the host must rebuild its optimizer and learning-rate schedule."""
        return sum(pruner.phase(step) for pruner in self.pruners)

    def metrics(self) -> dict[str, float]:
        """Numbers for the training log."""
        return {name: value for pruner in self.pruners for name, value in pruner.metrics().items()}

    def penalty(self) -> float:
        """What the objective adds to the loss of each micro-batch."""
        return sum(pruner.penalty() for pruner in self.pruners)

    def collect(self, gradients: torch.Tensor, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sum gradients and counts over the ranks and bring them to the host as float64: the one sync of an update."""
        if self.all_reduce is None:
            return gradients.double().cpu().numpy(), counts
        flat = torch.cat([gradients.double(), torch.from_numpy(counts.astype(np.float64)).to(gradients.device)])
        self.all_reduce(flat)
        flat = flat.cpu().numpy()
        return flat[: gradients.numel()], flat[gradients.numel() :]

    # -- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, np.ndarray]:
        """Everything a killed run needs to end bit-equal to one never killed: flat names to float64 arrays."""
        state = {"step": np.array([float(self.step)])}
        for pruner in self.pruners:
            state.update({f"{pruner.name}.{key}": value for key, value in pruner.state_dict().items()})
        return state

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Restore :meth:`state_dict`. Raises HeadPruningError when it is of other pruners or another model."""
        if "step" not in state:
            raise HeadPruningError("The checkpoint's pruning state has no step; it is damaged or of another version.")
        self.step = int(state["step"][0])
        for pruner in self.pruners:
            prefix = f"{pruner.name}."
            mine = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
            if not mine:
                raise HeadPruningError(
                    f"The checkpoint has no state of the pruner {pruner.name}; resume with the pruner that the run "
                    "was started with, or start from the model alone."
                )
            try:
                pruner.load_state_dict(mine)
            except KeyError as error:
                raise HeadPruningError(
                    f"The checkpoint's state of {pruner.name} lacks {error}; it is damaged or of another version."
                ) from error

    def tensor_state(self) -> dict[str, torch.Tensor]:
        """The part of the state that is as large as the model, for a file of the checkpoint (safetensors).

        The tensors may be the live ones: write them before the next update. A run without weight pruners has none.
        """
        return {
            f"{pruner.name}.{key}": tensor for pruner in self.pruners for key, tensor in pruner.tensor_state().items()
        }

    def load_tensor_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore :meth:`tensor_state`, after :meth:`load_state_dict`. Raises HeadPruningError if it does not fit."""
        for pruner in self.pruners:
            prefix = f"{pruner.name}."
            pruner.load_tensor_state(
                {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
            )

    def reset_optimizer(self) -> None:
        """Forget the moments of the pruners' own optimizers."""
        for pruner in self.pruners:
            pruner.reset_optimizer()

    def description(self) -> str:
        """JSON of what a reader of a checkpoint must know: the pruners and the unit map."""
        return json.dumps(
            {
                "version": STATE_VERSION,
                "pruners": [pruner.name for pruner in self.pruners],
                "unit_map": None if self.unit_map is None else self.unit_map.to_dict(),
            }
        )
