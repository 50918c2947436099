"""The object that a training loop drives, and the order in which it does.

One update calls the hooks in this order, in every host and in a loop of one's own::

    enter_phase      only where a phase begins: the optimizer and its schedule are built anew after it
    before_update    schedules move, gates are drawn, once
    loss             per micro-batch, between its forward and its backward pass
    after_backward   all gradients of the update are there
    before_step      they are final: unscaled, reduced over the ranks, clipped
    (the host's optimizer steps)
    after_step       or skip_update, where it did not step: an overflow, an update given up

Between ``before_step`` and either of the last two the learning rates of the optimizer are scaled by ``lr_factor``.
"""

import contextlib
import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, Optional, Sequence

import numpy as np
import torch
from torch import nn

from .compact.shapes import Whole
from .errors import HeadPruningError, one_line
from .gates.engine.bank import GateBank, refuse_gates
from .masks import HeadMask
from .outputs import NEEDS, LastLayer, Recorder, last_of
from .pruner import Pruner
from .quantization.engine.linears import refuse_integers
from .registry import KINDS
from .states import check_tensors, checked_entry
from .surgery.zeros import HeadWeights
from .unit_map import UnitMap

logger = logging.getLogger(__name__)

STATE_VERSION = 1
#: ``fired_within`` of models that skip whole layers at random: until then every site has run.
LAYERDROP_UPDATES = 100
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
        if pruner.kind not in KINDS:
            raise HeadPruningError(
                f"The pruner {pruner.name} is of the kind {pruner.kind!r}; the kinds are {', '.join(KINDS)}."
            )
        odd = sorted(set(pruner.needs) - NEEDS)
        if odd:
            raise HeadPruningError(
                f"The pruner {pruner.name} needs {', '.join(odd)}, which no host has; what there is: "
                f"{', '.join(sorted(NEEDS))}."
            )
    return listed


def is_attached(pruner: Pruner) -> bool:
    """Whether a pruner is attached to a session; a copy of one that is can be attached to another."""
    session = getattr(pruner, "session", None)
    return isinstance(session, PruningSession) and session._attached.get(id(pruner)) is pruner


def needs_of(pruners: Iterable[Pruner]) -> frozenset:
    """What the host must provide for these pruners: any of "hidden_states", "attentions", "eager_attention"."""
    return frozenset().union(*(pruner.needs for pruner in pruners))


class PruningSession:
    """Owns the pruners of one model: their gates, optimizers, step and state.

    Args:
        model: the model; its parameters and code are not changed.
        unit_map: its sites and layers; None where no pruner works by them.
        pruners: the methods, any number of each kind; at most one of them may own the head gates.
        seed: of every draw; the same on all ranks.
        total_steps: updates in training if known, for step counts given as fractions.
        all_reduce: sums a float64 tensor over the data-parallel ranks in place; None when there is one rank.
        all_greatest: takes the greatest of each value of a float tensor over these ranks in place; quantizers need it.
        fired_within: every targeted site must have run within this many updates (1; more for models that drop layers).
            0: for gates that are driven by hand; neither this nor the calls of the hooks are checked.
        time_first: whether the model's layers give ``[T, B, width]`` instead of ``[B, T, width]``.
        read_attention: finds the probabilities ``[B, H, T, S]`` in what an attention module gives; default: its last
            output.
        steps_per_epoch: updates in one pass over the data if known, for lengths given in epochs.
        load_teacher: loads another model of the host by its path: ``load_teacher(path, needs)`` gives the model, in
            evaluation mode and able to give what :attr:`needs` says, and its unit map (None where ``needs`` is empty).
        warmup_steps: updates in which the host's learning rate rises linearly, to fall linearly to 0 afterwards; None
            where it has another schedule, or it is not known.
        weights_come_later: whether the host loads the model's trained weights after :meth:`attach`, so that a copy of
            the model as it is then teaches nothing.
        starts_trained: whether training goes on from a trained model; some methods choose heads otherwise where
            nothing was learnt yet. A host that learns it after :meth:`attach` sets it before :meth:`settle`.
        sums_losses: whether the host's losses are sums, whose gradients it divides before its optimizer steps.

    Typical use::

        session = PruningSession(model, unit_map, [pruner])
        session.attach()
        optimizer = build_optimizer(model)
        for step, batch in enumerate(batches):
            if session.enter_phase(step):  # only methods that train in several phases ever say so
                optimizer = build_optimizer(model)
            session.before_update(step)
            loss = session.loss(compute_loss(model, batch), batch)
            loss.backward()
            session.after_backward()
            session.before_step(optimizer)
            optimizer.step()
            session.after_step()
        session.harden()

    To resume: ``load_state_dict``, ``enter_phase(session.step)``, then build the optimizer and load its state.
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
        all_greatest: Optional[Callable[[torch.Tensor], Any]] = None,
        fired_within: int = 1,
        time_first: bool = False,
        read_attention: Callable[[Any], Optional[torch.Tensor]] = last_of,
        steps_per_epoch: Optional[float] = None,
        warmup_steps: Optional[int] = None,
        load_teacher: Optional[Callable[[str, frozenset], tuple[nn.Module, Optional[UnitMap]]]] = None,
        weights_come_later: bool = False,
        starts_trained: bool = True,
        sums_losses: bool = False,
    ) -> None:
        self.model = model
        self.unit_map = unit_map
        self.pruners = check_pruners(pruners)
        self.seed = seed
        self.total_steps, self.steps_per_epoch, self.warmup_steps = total_steps, steps_per_epoch, warmup_steps
        self.load_teacher, self.weights_come_later = load_teacher, weights_come_later
        self.starts_trained, self.sums_losses = starts_trained, sums_losses
        self.all_reduce, self.all_greatest = all_reduce, all_greatest
        self.fired_within = fired_within
        gating = [pruner for pruner in self.pruners if pruner.needs_gates]
        self.gated = bool(gating)
        if self.gated and unit_map is None:
            raise HeadPruningError("Pruners of heads need the model's unit map; pass it to the session.")
        if gating and unit_map is not None:
            self.unit_map = unit_map = unit_map.numbering(gating[0].units).told()
        self.gates = None if unit_map is None else GateBank(model, unit_map)
        needs = needs_of(self.pruners)
        self._changes_loss = self.overrides("loss") or bool(needs)
        self._time_first, self._read_attention = time_first, read_attention
        self._recorder = self.recorder(model, unit_map)
        #: For hosts with float32 master copies: leads from a parameter to its copy, with ``.grad`` where it has one.
        self.master_of: Optional[Callable[[nn.Parameter], torch.Tensor]] = None
        self.step = 0
        #: Whether the outcome is fixed.
        self.hardened = False
        self._updates_here = 0
        self._started = self._stepping = self._collected = False
        self._told: set[str] = set()
        self._phases = [0] * len(self.pruners)
        self._unscaled: list[tuple[dict, Any]] = []
        self._attached: dict[int, Pruner] = {}  # by their ids, which copies do not have
        self._at_detach: list[Callable[[], Any]] = []
        self._head_weights: Optional[HeadWeights] = None
        self._masks: Optional[dict[str, torch.Tensor]] = None

    # -- life cycle ----------------------------------------------------------------------------------------------

    def attach(self) -> "PruningSession":
        """Put gates and masks on. If that fails, the model is left as it was.

        Raises:
            HeadPruningError: the session or one of its pruners is attached already, the heads are gated already, the
                weights are stored integers, options do not fit the model, or pipelined pruning comes with what changes
                the model.
        """
        if self._attached:
            raise HeadPruningError("The session is attached already; detach() it first to start anew.")
        for pruner in filter(is_attached, self.pruners):
            raise HeadPruningError(
                f"The pruner {pruner.name} is attached to another session, and holds what it learns there; build "
                "another with pruner(...), or detach() that session first."
            )
        refuse_integers(self.model)
        for pruner in self.pruners:
            pruner.check_options()
        if self.gated:
            assert self.unit_map is not None
            refuse_gates(self.model, self.unit_map, _UNGATE)
        try:
            # Distillers ask what is pruned, and may copy the model, which comes before its layers are quantized.
            for pruner in sorted(self.pruners, key=lambda pruner: list(KINDS).index(pruner.kind)):
                pruner.attach(self)
                self._attached[id(pruner)] = pruner
            if sum(pruner.head_mask() is not None for pruner in self.pruners) > 1:
                raise HeadPruningError("Two of the pruners own the head gates; keep one of them.")
            names = [pruner.name for pruner in self.pruners]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise HeadPruningError(f"Two pruners are called {twice}, which their states are told apart by.")
            self._check_pipelined()
            if self.gated:
                assert self.gates is not None
                self.gates.attach()
            if self._changes_loss:
                self._recorder.live = False
                self._recorder.attach()
        except BaseException:
            self.detach()
            raise
        self._started = self._stepping = self._collected = self.hardened = False
        self.step, self._phases, self._updates_here = 0, [0] * len(self.pruners), 0
        return self

    def begin_anew(self) -> None:
        """Forget what was learnt and planned since :meth:`attach`: the host begins training once more, with update 0.

        The model keeps the weights that it has now, and teachers are what they were.
        """
        self.skip_update()
        for pruner in self.pruners:
            pruner.begin_anew()
        self.step, self._phases, self._updates_here = 0, [0] * len(self.pruners), 0
        self._started = False

    def follow(self) -> None:
        """Look the model's parameters up anew: the host put others, shards of them (FSDP2), in their places.

        Raises:
            HeadPruningError: a pruner cannot work with these.
        """
        self._head_weights = None
        for pruner in self.pruners:
            pruner.follow()

    def enter_phase(self, step: int) -> bool:
        """Whether update ``step`` is of another phase than the one entered last (at first: 0); pruners are told.

        The host must then build its optimizer (unless :attr:`keeps_optimizer`), of the parameters that are trainable
        now, and its learning-rate schedule anew; :meth:`schedule_span` says over which updates that runs. A resumed
        run enters the phase of its last update before it builds the optimizer whose state it loads.
        """
        entered = False
        for place, pruner in enumerate(self.pruners):
            phase = pruner.phase(step)
            if phase != self._phases[place]:
                pruner.enter_phase(phase)
                self._phases[place], entered = phase, True
        return entered

    def before_update(self, step: int) -> None:
        """Start update ``step`` (from 0), which may be several micro-batches: move schedules, draw gates once.

        An update that began and came to no end was skipped.

        Raises:
            HeadPruningError: a gated module was wrapped or replaced since (told before the first update), or a phase
                begins that was not entered.
        """
        if self._stepping:
            self.skip_update()
        for place, pruner in enumerate(self.pruners):
            if pruner.phase(step) != self._phases[place]:
                raise HeadPruningError(
                    f"A new phase of {pruner.name} begins with update {step}; call session.enter_phase(step) before "
                    "it, and build the optimizer and its schedule anew."
                )
        if self.gated and not self._started:
            assert self.gates is not None
            self.gates.check_in_place(self.model)
        self._started, self._collected = True, False
        self.step = step
        for pruner in self.pruners:
            pruner.before_update(step)
        self._recorder.live = self._changes_loss

    def loss(
        self,
        loss: torch.Tensor,
        inputs: Any = None,
        outputs: Any = None,
        *,
        masks: Optional[Mapping[str, torch.Tensor]] = None,
        weight: "float | torch.Tensor" = 1.0,
        last: Optional[LastLayer] = None,
    ) -> torch.Tensor:
        """The objective of one micro-batch: the task loss, unless a distiller replaces or adds terms.

        Call it between the micro-batch's forward and backward pass.

        Args:
            loss: the task loss.
            inputs: the batch, handed on as it is.
            outputs: what the model gave; default: what it was seen to give.
            masks: ``bool[B, T]`` of the tokens that are no padding, by ``encoder`` and ``decoder``.
            weight: see :class:`~head_pruning.outputs.Outputs`.
            last: the layer that the model was called without (``last.left_out()``).

        Raises:
            HeadPruningError: a pruner changes the loss, but the model was not called since :meth:`before_update` or
                the last micro-batch, or does not give what the pruner needs.
        """
        if not self._changes_loss:
            return loss
        seen = self._recorder.take(masks)
        raw = seen.raw if outputs is None else outputs
        given = dataclasses.replace(seen, raw=raw, weight=weight, last=last)
        self._recorder.live = False  # a pruner may call the model
        for pruner in self.pruners:
            loss = pruner.loss(loss, inputs, given)
        self._recorder.live = True
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
        self._recorder.live, self._collected = False, True
        self._updates_here += 1
        if self.gated and self._updates_here == self.fired_within:
            assert self.gates is not None
            self.gates.check_fired()
            self.gates.tell_untrained()
        for pruner in self.pruners:
            pruner.after_backward(loss_scale, denominator, micro_batches)

    def before_step(self, optimizer: Any = None, *, rests: bool = False) -> None:
        """The gradients are final, and the host's optimizer is about to step.

        In pipelined pruning the model's parameters have no gradient afterwards, so that the optimizer passes them over
        (no weight decay, no momentum).

        Args:
            optimizer: the host's; its learning rates are scaled until :meth:`after_step` or :meth:`skip_update`, so
                that neither it nor its schedule is left changed. Needed where a pruner changes the learning rate.
            rests: whether the host itself sees to it that pipelined pruning leaves the model as it is; gradients are
                not touched then.

        Raises:
            HeadPruningError: a pruner changes the learning rate, and there is no optimizer.
        """
        self._stepping = True
        for pruner in self.pruners:
            pruner.before_step(self.step)
        if self.freezes_model and not rests:
            for parameter in self.model.parameters():
                parameter.grad = None
        factor = self.lr_factor(self.step)
        if factor != 1.0:
            if optimizer is None:
                raise HeadPruningError(
                    "A pruner changes the learning rate, so session.before_step() must be given the optimizer."
                )
            self._unscaled = [(group, group["lr"]) for group in optimizer.param_groups]
            for group, rate in self._unscaled:
                group["lr"] = rate * factor

    def after_step(self, lr_factor: float = 1.0) -> None:
        """The host's optimizer has stepped, and the gradients are still there: step the gates' own, mask weights.

        Args:
            lr_factor: factor on the learning rate of the gates: where the host's schedule stands.

        Raises:
            HeadPruningError: a hook was not called in this update without which a pruner does not do its work.
        """
        if self.fired_within:
            self._check_called("after_backward", self._collected, self.overrides("after_backward"))
            self._check_called("before_step", self._stepping, self.freezes_model)
        self._end_step()
        for pruner in self.pruners:
            pruner.after_step(self.step, lr_factor)

    def _check_called(self, hook: str, called: bool, asked: bool) -> None:
        if asked and not called:
            raise HeadPruningError(
                f"session.{hook}() was not called in update {self.step}; call it after the backward pass and before "
                "the optimizer's step (head_pruning.session has the order)."
            )

    def skip_update(self) -> None:
        """The host gives the update up, which may have got anywhere since :meth:`before_update`.

        What :meth:`before_step` did is taken back, and the gates do not step. Tell it of an overflow in half precision
        or a batch given up; then the next update may begin, or the same once more.
        """
        self._recorder.live = False
        self._end_step()
        for pruner in self.pruners:
            pruner.skip_update(self.step)

    def _end_step(self) -> None:
        self._stepping = False
        for group, rate in self._unscaled:
            group["lr"] = rate
        self._unscaled = []

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside the block the model runs in its evaluation state, even if it is in training mode."""
        with contextlib.ExitStack() as stack:
            if self.gates is not None:
                stack.enter_context(self.gates.forced("evaluation"))
            for pruner in self.pruners:
                stack.enter_context(pruner.evaluating())
            yield

    @contextlib.contextmanager
    def stored(self) -> Iterator[None]:
        """Inside the block the model is in the form in which the outcome is stored."""
        with contextlib.ExitStack() as stack:
            for pruner in self.pruners:
                stack.enter_context(pruner.stored())
            yield

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside the block :meth:`weight_masks` asks no other rank; all that hold shards of the weights enter it."""
        self._masks = self.weight_masks()
        try:
            yield
        finally:
            self._masks = None

    def save_beside(self, folder: "str | Path") -> None:
        """Write into the folder of the stored outcome what goes with it."""
        for pruner in self.pruners:
            pruner.save_beside(Path(folder))

    def harden(self) -> Optional[HeadMask]:
        """Fix the outcome (exactly K heads, the target density) and return the head mask, None without one."""
        for pruner in sorted(self.pruners, key=lambda pruner: not pruner.needs_gates):  # weights go with their heads
            pruner.harden()
        self.hardened = True
        return self.head_mask()

    def detach(self) -> None:
        """Take everything off: the model is again what it was, bit for bit, but for the zeros of weight pruners."""
        self._recorder.detach()
        if self.gates is not None:
            self.gates.detach()
        while self._attached:
            self._attached.popitem()[1].detach()
        while self._at_detach:
            self._at_detach.pop()()

    def _check_pipelined(self) -> None:
        """Raise HeadPruningError if one pruner leaves the model's weights as they are and another changes them."""
        if not self.freezes_model:
            return
        others = [pruner.name for pruner in self.pruners if not pruner.freezes_model and not pruner.needs_gates]
        if others:
            raise HeadPruningError(
                "Pipelined pruning of heads leaves the model's weights as they are, so "
                f"{', '.join(others)} cannot change them in the same run; add --joint-pruning (joint_pruning=True), "
                "or do one after the other."
            )

    def freeze(self) -> None:
        """Freeze the model for pipelined pruning, but for the last of its smallest parameters, until :meth:`detach`.

        Optimizers, loss scalers and data-parallel wrappers refuse a model without any; the host must not step it.

        Raises:
            HeadPruningError: nothing of the model is trainable.
        """
        trainable = {name: each for name, each in self.model.named_parameters() if each.requires_grad}
        if not trainable:
            raise HeadPruningError("All parameters of the model are frozen; leave at least one trainable.")
        spare = min(reversed(trainable.values()), key=lambda parameter: parameter.numel())
        for parameter in trainable.values():
            parameter.requires_grad_(parameter is spare)

        def thaw() -> None:
            now = dict(self.model.named_parameters())  # a host may have put others in their places
            for name, parameter in trainable.items():
                now.get(name, parameter).requires_grad_(True)

        self.on_detach(thaw)

    def on_detach(self, undo: Callable[[], Any]) -> None:
        """Have :meth:`detach` call ``undo``: for what a host changed to make the gates run."""
        self._at_detach.append(undo)

    # -- what a host asks ----------------------------------------------------------------------------------------

    def of_kind(self, *kinds: str) -> list[Pruner]:
        """The pruners of these kinds (:data:`head_pruning.registry.KINDS`)."""
        return [pruner for pruner in self.pruners if pruner.kind in kinds]

    def overrides(self, hook: str) -> bool:
        """Whether a pruner does something in this hook."""
        return any(_overrides(pruner, hook) for pruner in self.pruners)

    @property
    def in_step(self) -> bool:
        """Whether :meth:`before_step` was called in this update, and neither of the hooks after it."""
        return self._stepping

    @property
    def changes_loss(self) -> bool:
        """Whether :meth:`loss` must be called for every micro-batch."""
        return self._changes_loss

    @property
    def steers_host(self) -> bool:
        """Whether a pruner changes the host's learning rate, or has it build its optimizer anew."""
        return any(self.overrides(hook) for hook in ("lr_factor", "phase", "schedule_end"))

    @property
    def keeps_optimizer(self) -> bool:
        """Whether the host's optimizer goes on, with its averages, where a phase begins."""
        phased = [pruner for pruner in self.pruners if _overrides(pruner, "phase")]
        return bool(phased) and all(pruner.keeps_optimizer for pruner in phased)

    @property
    def skips_parameters(self) -> bool:
        """Whether trainable parameters get no gradient in some updates, which data-parallel wrappers must be told."""
        return any(pruner.skips_parameters for pruner in self.pruners)

    def recorder(self, model: nn.Module, unit_map: Optional[UnitMap]) -> Recorder:
        """What records of a model, such as a teacher, all that the pruners need; not attached yet."""
        return Recorder(
            model,
            unit_map,
            needs_of(self.pruners),
            time_first=self._time_first,
            read_attention=self._read_attention,
        )

    def weight_masks(self) -> dict[str, torch.Tensor]:
        """Parameter name to ``bool`` mask (true: stays) on the CPU; empty before the first mask.

        Where weights are sharded, all ranks must call it.
        """
        if self._masks is not None:
            return self._masks
        return {name: mask for pruner in self.pruners for name, mask in pruner.weight_masks().items()}

    def head_mask(self) -> Optional[HeadMask]:
        """The heads that would stay if training ended now; None when no pruner prunes heads."""
        return next((mask for mask in (pruner.head_mask() for pruner in self.pruners) if mask is not None), None)

    def left_dense(self) -> dict[str, int]:
        """Names and sizes of the matrices that no pruner of weights prunes; empty without one."""
        left = [found for pruner in self.pruners if (found := pruner.left_dense()) is not None]
        return {name: size for name, size in left[0].items() if all(name in each for each in left)} if left else {}

    def weights_without(self, mask: HeadMask) -> dict[str, list[tuple[int, torch.Tensor]]]:
        """What of the model's parameters belongs to heads that ``mask`` removes alone.

        Returns:
            Parameter name to dimensions and the places along them, on the CPU.
        """
        if self._head_weights is None:
            self._head_weights = HeadWeights(self.model, mask.unit_map)
        found: dict[str, list[tuple[int, torch.Tensor]]] = {}
        for name, _, dim, places in self._head_weights.gone(mask.keep):
            found.setdefault(name, []).append((dim, places))
        return found

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
        return needs_of(self.pruners)

    def lr_factor(self, step: int) -> float:
        """Factor on the host's learning rate in update ``step``."""
        return math.prod(pruner.lr_factor(step) for pruner in self.pruners)

    def phase(self, step: int) -> tuple[int, ...]:
        """The phase of each pruner in update ``step``; see :meth:`enter_phase`."""
        return tuple(pruner.phase(step) for pruner in self.pruners)

    def schedule_span(self, step: int) -> tuple[int, Optional[int]]:
        """First update of the phase of ``step``, and the one at which its learning-rate schedule ends.

        None: at the end of training, as schedules do.
        """
        phase, begin = self.phase(step), step
        if self.overrides("phase"):
            while begin > 0 and self.phase(begin - 1) == phase:
                begin -= 1
        else:
            begin = 0
        ends = [end for end in (pruner.schedule_end(step) for pruner in self.pruners) if end is not None]
        return begin, min(ends, default=None)

    def size_before(self, step: Optional[int]) -> Optional[str]:
        """The name of a smaller model that is finished when update ``step`` begins; None where none is.

        It is the model as it is in :meth:`evaluating`, before :meth:`enter_phase`, without the heads that
        :meth:`head_mask` removes. When training is over, ask for the number of updates made, before :meth:`harden`,
        and for None, after it.
        """
        return next((name for pruner in self.pruners if (name := pruner.size_before(step)) is not None), None)

    def settle(self) -> None:
        """Fix what depends on the length of training, now that it is known; or refuse it, with HeadPruningError."""
        self.metrics()  # every schedule is worked out where its numbers are first asked for

    def metrics(self) -> dict[str, float]:
        """Numbers for the training log; ``lr_factor`` where a pruner changes the learning rate that the host logs."""
        found = {name: value for pruner in self.pruners for name, value in pruner.metrics().items()}
        return {**found, "lr_factor": self.lr_factor(self.step)} if self.overrides("lr_factor") else found

    def tell_unfinished(self) -> None:
        """Warn, once, of each pruner whose schedule was not over when training ended."""
        for pruner in self.pruners:
            if not pruner.at_target() and pruner.name not in self._told:
                self._told.add(pruner.name)
                prunes = pruner.kind in ("heads", "units", "weights")
                kept = f" with exactly the {pruner.kind} that are kept" if prunes else " as it is now"
                cure = f"; lower {pruner.schedule_option}" if pruner.schedule_option else ""
                if cure and not cure.endswith("_epochs"):
                    cure += " (a value below 1 is a fraction of training)"
                logger.warning(
                    "training ended before the schedule of %s did: the model was never trained%s%s",
                    pruner.name,
                    kept,
                    cure,
                )

    def penalty(self) -> float:
        """What the objective adds to the loss of each micro-batch."""
        return sum(pruner.penalty() for pruner in self.pruners)

    def summed(self, gradients: torch.Tensor, counts: np.ndarray) -> torch.Tensor:
        """Gradients, and counts behind them, summed over the ranks in float64; the device is not waited for."""
        behind = torch.from_numpy(counts.astype(np.float64)).to(gradients.device, non_blocking=True)
        flat = torch.cat([gradients.double(), behind])
        if self.all_reduce is not None:
            self.all_reduce(flat)
        return flat

    @property
    def greatest(self) -> Optional[Callable[[torch.Tensor], Any]]:
        """Takes the greatest of each value over the ranks, in place; None when there is one rank.

        Raises:
            HeadPruningError: the host sums over ranks, and gave no ``all_greatest``.
        """
        if self.all_reduce is not None and self.all_greatest is None:
            raise HeadPruningError(
                "A pruner needs the greatest of values over the ranks, and the session can only sum; give it "
                "all_greatest beside all_reduce (torch.distributed.all_reduce with ReduceOp.MAX)."
            )
        return self.all_greatest

    def collect(self, gradients: torch.Tensor, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sum gradients and counts over the ranks and bring them to the host as float64: the one sync of an update."""
        summed = self.summed(gradients, counts).cpu().numpy()
        return summed[: gradients.numel()], summed[gradients.numel() :]

    # -- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, np.ndarray]:
        """Everything a killed run needs to end bit-equal to one never killed: flat names to float64 arrays."""
        state = {"step": np.array([float(self.step)])}
        for pruner in self.pruners:
            state.update({f"{pruner.name}.{key}": value for key, value in pruner.state_dict().items()})
        return state

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            HeadPruningError: it is of other pruners or another model, or has numbers that cannot be. Nothing is taken
                of it then, unless only a pruner itself could tell.
        """
        if "step" not in state:
            raise HeadPruningError("The checkpoint's pruning state has no step; it is damaged or of another version.")
        step = checked_entry("step", state["step"], (Whole(),))
        theirs: list[dict[str, np.ndarray]] = []
        for pruner in self.pruners:
            shapes, mine = pruner.state_shapes, _of(pruner, state)
            if not mine and pruner.state_dict():
                raise HeadPruningError(
                    f"The checkpoint has no state of the pruner {pruner.name}; resume with the pruner that the run "
                    "was started with, or start from the model alone."
                )
            theirs.append(
                {key: checked_entry(f"{pruner.name}.{key}", value, shapes.get(key)) for key, value in mine.items()}
            )
        self.step = int(step[0])
        for pruner, mine in zip(self.pruners, theirs):
            try:
                pruner.load_state_dict(mine)
            except HeadPruningError:
                raise
            except KeyError as error:
                raise HeadPruningError(
                    f"The checkpoint's state of {pruner.name} lacks {error}; it is damaged or of another version."
                ) from error
            except (IndexError, TypeError, ValueError) as error:
                raise HeadPruningError(
                    f"The checkpoint's state of {pruner.name} is damaged or of another model ({one_line(error)}); "
                    "resume from another checkpoint."
                ) from error

    def tensor_names(self) -> list[str]:
        """The names in :meth:`tensor_state`, of which no other rank is asked."""
        return [f"{pruner.name}.{key}" for pruner in self.pruners for key in pruner.tensor_names()]

    def tensor_state(self) -> dict[str, torch.Tensor]:
        """The part of the state that is as large as the model, for a file of the checkpoint (safetensors).

        The tensors may be the live ones: write them before the next update. A run without weight pruners has none.
        Where weights are sharded, all ranks must call it, and the first of them gets whole tensors.
        """
        return {
            f"{pruner.name}.{key}": tensor for pruner in self.pruners for key, tensor in pruner.tensor_state().items()
        }

    def load_tensor_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore :meth:`tensor_state`, after :meth:`load_state_dict`. Raises HeadPruningError if it does not fit."""
        check_tensors(state)
        for pruner in self.pruners:
            pruner.load_tensor_state(_of(pruner, state))

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


def _overrides(pruner: Pruner, hook: str) -> bool:
    """Whether a pruner does something in this hook."""
    changed = getattr(getattr(pruner, hook), "__func__", None) is not getattr(Pruner, hook)
    return changed and hook not in pruner.idle_hooks


def _of(pruner: Pruner, state: Mapping[str, Any]) -> dict[str, Any]:
    """What of a session's state is a pruner's, by its own names."""
    prefix = f"{pruner.name}."
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
