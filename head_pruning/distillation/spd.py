"""Sparse progressive distillation (Huang et al. 2022): a sparse student grows into its teacher's place.

In each update every layer is the student's with a probability, the replacing rate, and else the teacher's. The rate
rises to 1; meanwhile the student's weights are pruned (:mod:`head_pruning.weights.spd_magnitude`).
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, field
from typing import Any, Iterator, Optional

import numpy as np
import torch

from ..errors import HeadPruningError
from ..options import require
from ..outputs import HIDDEN_STATES, Outputs
from ..pruner import SessionView
from ..registry import register_pruner
from ..schedules import STEPS, resolve_steps
from ..weights.spd_magnitude import PhaseConfig, pruning_updates
from .base import DistillConfig, Distiller, compared
from .grafting import Grafts
from .losses import soft_cross_entropy
from .teacher import Teacher, open_teacher

logger = logging.getLogger(__name__)

SCHEDULERS = ("none", "linear", "mixed", "constantLinearWithGap")
# As in the recipe.
_RATE, _SCHEDULER = 0.8, "linear"
# Of the published code: epochs in which "mixed" reaches 1, and in which the learning rate of a phase falls to 0.
_MIXED_EPOCHS, _LR_EPOCHS = 10, 30
# Sets the draws of layers apart from the session's others.
_DRAW = 3


@dataclass
class SpdConfig(DistillConfig, PhaseConfig):
    """Options of sparse progressive distillation."""

    replacing_rate: Optional[float] = field(
        default=None,
        metadata={"help": "probability at first that a layer is the student's and not the teacher's; default: 0.8"},
    )
    scheduler_type: Optional[str] = field(
        default=None,
        metadata={
            "help": "how the replacing rate rises to 1: none (at once, after steps_for_replacing), linear (from the "
            "start), mixed (in ten epochs after steps_for_replacing), constantLinearWithGap (jumps to "
            "base_replacing_rate after steps_for_replacing, then linearly); default: linear"
        },
    )
    scheduler_linear_k: float = field(
        default=0.0,
        metadata={
            "help": "rise of the replacing rate per update (linear, constantLinearWithGap); where it is too small to "
            "reach 1 it is raised, unless published_schedule"
        },
    )
    base_replacing_rate: Optional[float] = field(
        default=None,
        metadata={"help": "what constantLinearWithGap jumps to; default: the replacing rate"},
    )
    steps_for_replacing: float = field(
        default=0,
        metadata={"help": "updates before the replacing rate rises (not for linear); below 1: a fraction of training"},
    )
    temperature: float = field(default=1.0, metadata={"help": "temperature of the logits in SPD's loss, above 0"})


def replacing_rate(
    step: int, kind: str, *, rate: float, slope: float = 0.0, start: int = 0, base: Optional[float] = None
) -> float:
    """The probability that a layer is the student's in update ``step`` (SPD, section 3.2, and its code).

    Args:
        step: the update, from 0; the first one always has ``rate``.
        kind: one of :data:`SCHEDULERS`.
        rate: at first.
        slope: rise per update.
        start: updates before it rises; ``linear`` rises from the beginning.
        base: what ``constantLinearWithGap`` jumps to at ``start``; default: ``rate``.
    """
    if kind == "linear":
        return min(rate + slope * step, 1.0)
    if step == 0 or step < start:
        return rate
    if kind == "none":
        return 1.0
    after = rate if kind == "mixed" or base is None else base
    return min(after + slope * (step - start), 1.0)


class SpdPruner(Distiller):
    """Trains a student whose layers step into its teacher's place one by one, sparser and sparser.

    The loss is ``distill_attention * L_att + distill_hidden * L_rep + distill_logits * L_cls`` (section 3.3): squared
    differences of attention probabilities and of hidden states, summed over layers, and the soft cross-entropy of the
    logits; in regression the task loss is L_cls, as in the published code. The task loss has no other part.

    Only the layers learn; what lies outside of them stays the teacher's, and is held in memory once. Training has two
    phases, each with an optimizer and a learning-rate schedule of its own. In evaluation the student stands alone.
    """

    name = "spd"
    defaults = {"logits": 1.0, "hidden": 1.0, "attention": 1.0}
    skips_parameters = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        # The layers of a teacher from elsewhere are found by its unit map, which hosts make for those who look at it.
        self.needs |= {HIDDEN_STATES}
        # The published code builds both learning-rate schedules on one optimizer.
        self.keeps_optimizer = bool(config.published_schedule)
        self._grafts: Optional[Grafts] = None
        self._frozen: list[torch.nn.Parameter] = []

    def check_options(self) -> None:
        super().check_options()
        options = self.config
        options.check()
        self.rate = _RATE if options.replacing_rate is None else options.replacing_rate
        self.scheduler = options.scheduler_type or _SCHEDULER
        if self.scheduler not in SCHEDULERS:
            raise HeadPruningError(
                f"--scheduler-type is {options.scheduler_type!r}; choose one of {', '.join(SCHEDULERS)}."
            )
        for option in ("replacing_rate", "base_replacing_rate"):
            if getattr(options, option) is not None:
                require(options, option, lambda value: 0 <= value <= 1, "a probability from 0 to 1")
        require(options, "scheduler_linear_k", lambda value: value >= 0, "0 or more")
        require(options, "steps_for_replacing", lambda value: value >= 0, STEPS)
        require(options, "temperature", lambda value: value > 0, "above 0")
        if options.base_replacing_rate is not None and self.scheduler != "constantLinearWithGap":
            raise HeadPruningError(
                "--base-replacing-rate is what --scheduler-type constantLinearWithGap jumps to, but the type is "
                f"{self.scheduler}; drop one of them."
            )
        if options.scheduler_linear_k and self.scheduler in ("none", "mixed"):
            raise HeadPruningError(
                f"--scheduler-linear-k is the slope of other schedules than {self.scheduler}; drop it, or choose "
                "--scheduler-type linear."
            )

    def options(self) -> dict[str, Any]:
        return {**super().options(), "replacing_rate": self.rate, "scheduler_type": self.scheduler}

    # -- life cycle --------------------------------------------------------------------------------------------------

    def attach(self, session: SessionView) -> None:
        self._settled: list[int] = []
        self._planned = False
        if session.unit_map is None:
            raise HeadPruningError("SPD needs the model's layers; pass its unit map to the session.")
        if session.weights_come_later:
            raise HeadPruningError(
                "A student of SPD starts as its teacher, but this host loads the weights only when training begins; "
                "take --distill logits with --teacher-path, or train SPD with transformers."
            )
        layers = session.unit_map.layers
        try:
            super().attach(session)
            self._check_numbers(session)
            theirs = () if self.teacher.unit_map is None else self.teacher.unit_map.layers
            self._grafts = Grafts(session.model, self.teacher.model, layers, theirs)
            found = [session.model.get_submodule(name).parameters() for name in layers]
            learns = np.array([any(parameter.requires_grad for parameter in each) for each in found], dtype=bool)
            self._learns = learns if learns.any() else np.ones_like(learns)
        except BaseException:
            self.detach()
            raise
        self.drawn = np.ones(len(layers), dtype=bool)
        self.step = 0

    def _check_numbers(self, session: SessionView) -> None:
        """Raise unless the teacher's layers compute with numbers of the student's type."""
        mine = next(session.model.parameters()).dtype
        if self.teacher.dtype not in (None, mine):
            raise HeadPruningError(
                "The teacher's layers stand in for the student's in SPD, whose numbers are "
                f"{str(mine).removeprefix('torch.')}; drop --teacher-dtype {self.config.teacher_dtype}."
            )

    @property
    def grafts(self) -> Grafts:
        """The layers that the teacher's can stand in for, while attached."""
        assert self._grafts is not None, "the distiller is not attached"
        return self._grafts

    def open_teacher(self, session: SessionView) -> Teacher:
        layers = () if session.unit_map is None else session.unit_map.layers
        inside = {id(parameter) for name in layers for parameter in session.model.get_submodule(name).parameters()}
        outside = {n: p for n, p in session.model.named_parameters() if id(p) not in inside}
        learn = {name for name, parameter in outside.items() if parameter.requires_grad}  # a teacher's do not
        # What is pruned is no longer the teacher's.
        pruned = {name for pruner in session.pruners for name in pruner.masked_parameters()}
        equal = [name for name in outside if name not in pruned]
        teacher = open_teacher(session, self.config.teacher_path, self.config.teacher_dtype, equal)
        own = [outside[name] for name in learn if id(outside[name]) not in teacher.shared]
        self._frozen = [outside[name] for name in learn if id(outside[name]) in teacher.shared]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        if own:
            logger.info(
                "%d parameters outside of the layers differ from the teacher's, or are pruned, and are trained too",
                len(own),
            )
        return teacher

    def detach(self) -> None:
        if self._grafts is not None:
            self._grafts.detach()
        self._grafts = None
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []
        super().detach()

    def begin_anew(self) -> None:
        super().begin_anew()
        self.grafts.detach()  # other modules may stand in the layers by the next update
        self._settled, self._planned = [], False
        self.drawn, self.step = np.ones_like(self.drawn), 0

    # -- schedule ----------------------------------------------------------------------------------------------------

    def _plan(self) -> None:
        """Settle the schedules once the length of training is known."""
        if self._planned:
            return
        config, session = self.config, self.session
        if not self._settled:
            total, per_epoch = session.total_steps or 0, session.steps_per_epoch
            length = pruning_updates(config, total, per_epoch, self.name)
            start = resolve_steps(config.steps_for_replacing, total, "--steps-for-replacing")
            epoch = round(per_epoch or 0)
            second = length
            if config.published_schedule and config.num_prune_epochs is not None:
                second = epoch * int(np.ceil(config.num_prune_epochs))  # phases are whole epochs there
            self._settled = [total, epoch, length, second, start]
        self._planned = True
        total, epoch, length, second, self.start = self._settled
        self.second = second if 0 < second < total else total
        self.slope, tells = config.scheduler_linear_k, ""
        if self.scheduler == "mixed":
            if not epoch:
                raise HeadPruningError(
                    "--scheduler-type mixed takes ten epochs, but the number of updates in one is not known here; "
                    "choose linear with --scheduler-linear-k."
                )
            self.slope = (1.0 - self.rate) / (_MIXED_EPOCHS * epoch)
        if not config.published_schedule:
            tells = self._reach_one(total)
        rates = [self._rate(step) for step in (0, self.second, total - 1)]
        logger.info(
            "replacing rate %.3g at first, %.3g when the second phase begins (update %d of %d), %.3g at the end%s",
            rates[0], rates[1], self.second, total, rates[2], tells,
        )  # fmt: skip
        if rates[2] < 1.0:
            logger.warning("the replacing rate never reaches 1: the student is never trained without its teacher")

    def _reach_one(self, total: int) -> str:
        """Raise the slope so far that the rate is 1 for the second half of the second phase; the log's words."""
        begin = 0 if self.scheduler == "linear" else self.start
        if begin >= total:
            begin = self.start = total // 2
        # The third part of training is for the student alone: "pruning, progressive distillation, finetuning".
        end = max(self.second + (total - self.second) // 2, begin + (total - begin) // 2, 1)
        end = min(end, total - 1) if total > 1 else 1
        if self.scheduler == "none" or self._rate(end) >= 1.0:
            return ""
        first = self.config.base_replacing_rate if self.config.base_replacing_rate is not None else self.rate
        self.slope = (1.0 - first) / max(1, end - begin)
        self.until = end
        return f"; it is raised to reach 1 by update {end} (--published-schedule leaves it as it is)"

    def _rate(self, step: int) -> float:
        rate = replacing_rate(
            step,
            self.scheduler,
            rate=self.rate,
            slope=self.slope,
            start=self.start,
            base=self.config.base_replacing_rate,
        )
        return 1.0 if rate > 1.0 - 1e-9 else rate  # a sum of slopes falls short by rounding

    def draw(self, step: int) -> np.ndarray:
        """Which layers are the student's in update ``step``, ``bool[layers]``: the same on all ranks.

        One at least of those that are not frozen, that of the lowest number drawn: all that lies outside of the layers
        is the teacher's, so without any there would be nothing to learn.
        """
        numbers = np.random.default_rng([self.session.seed, _DRAW, step]).random(self.drawn.size)
        return (numbers < self._rate(step)) | (numbers == numbers[self._learns].min())

    # -- an update ---------------------------------------------------------------------------------------------------

    def before_update(self, step: int) -> None:
        self._plan()
        self.teacher.follow()  # its layers run before it is asked
        self.grafts.attach()  # after the session's hooks, which so see the parameters that a layer ran with
        self.step, self.drawn = step, self.draw(step)
        self.grafts.set(self.drawn)

    def compare_logits(self, mine: Outputs, theirs: Outputs, task: torch.Tensor) -> torch.Tensor:
        pairs = compared(mine, theirs)
        if all(ours.shape[-1] == 1 for ours, _, _ in pairs):
            return task
        terms = [soft_cross_entropy(*pair[:2], self.config.temperature, pair[2]) for pair in pairs]
        return torch.stack(terms).mean()

    def objective(self, loss: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        return total

    # -- what a host asks --------------------------------------------------------------------------------------------

    def phase(self, step: int) -> int:
        self._plan()
        return int(step >= self.second)

    def schedule_end(self, step: int) -> Optional[int]:
        self._plan()
        begin = self.second if step >= self.second else 0
        if self.config.published_schedule:
            epoch = self._settled[1]
            return begin + _LR_EPOCHS * epoch if epoch else None
        return None if step >= self.second else self.second

    def metrics(self) -> dict[str, float]:
        self._plan()
        return {"replacing_rate": self._rate(self.step), **super().metrics()}

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside the block the student stands alone, also where it is in training mode."""
        grafts = self._grafts  # None once it is detached: then the student stands alone anyway
        if grafts is not None:
            grafts.set(np.ones_like(self.drawn))
        try:
            yield
        finally:
            if grafts is not None:
                grafts.set(self.drawn)

    def harden(self) -> None:
        """The student stands alone, in training mode too, until an update draws layers again."""
        self.drawn = np.ones_like(self.drawn)
        self.grafts.set(self.drawn)

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, np.ndarray]:
        # A resumed run keeps the schedule that it was started with.
        return {**super().state_dict(), "schedule": np.array(list(map(float, self._settled)))}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        super().load_state_dict(state)
        if state["schedule"].size:
            self._settled, self._planned = [int(value) for value in state["schedule"]], False


def _asked_for(options: Any) -> bool:
    return any(getattr(options, name) is not None for name in ("replacing_rate", "scheduler_type"))


register_pruner(
    name="spd",
    config=SpdConfig,
    pruner=SpdPruner,
    selected_by=_asked_for,
    example={"replacing_rate": 0.5, "distill_attention": 0.0},
)
