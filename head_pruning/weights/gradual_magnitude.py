"""Gradual pruning by magnitude, per tensor (Zhu and Gupta 2017)."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..compact.shapes import STEP, Either
from ..errors import HeadPruningError
from ..options import require
from ..pruner import SessionView
from ..registry import register_pruner
from ..schedules import STEPS, gradual_sparsity, resolve_steps, rewound_rate
from .base import MaskConfig
from .tensor_magnitude import TensorMagnitudePruner, TensorSparsityConfig

logger = logging.getLogger(__name__)

#: Options of a short run.
EXAMPLE = {"target_sparsity": 0.8, "pruning_frequency": 2, "policy_end_step": 0.7}
_STEPS = ("begin_pruning_step", "end_pruning_step", "policy_begin_step", "policy_end_step")


@dataclass
class GradualConfig(TensorSparsityConfig, MaskConfig):
    """Options of gradual magnitude pruning."""

    initial_sparsity: float = field(default=0.0, metadata={"help": "ratio of weights removed at first, 0 to 1"})
    pruning_frequency: int = field(default=100, metadata={"help": "updates from one mask to the next"})
    begin_pruning_step: float = field(
        default=0, metadata={"help": "first update (from 0) with a mask; below 1: a fraction of training"}
    )
    end_pruning_step: float = field(
        default=-1,
        metadata={"help": "last update that may move masks; below 1: a fraction of training; -1: never frozen"},
    )
    policy_begin_step: float = field(
        default=0, metadata={"help": "update from which the sparsity rises; below 1: a fraction of training"}
    )
    policy_end_step: float = field(
        default=1000, metadata={"help": "update by which the target is reached; below 1: a fraction of training"}
    )
    lr_rewind: bool = field(
        default=False,
        metadata={
            "help": "while the sparsity rises, the learning rate returns with each mask to where it was before; needs "
            "a linear schedule"
        },
    )


class GradualMagnitudePruner(TensorMagnitudePruner):
    """Prunes the smallest weights of each tensor, a few more at each mask; pruned ones may come back."""

    name = "gradual_magnitude"
    default_policy = "retained"
    schedule_option = "policy_end_step"
    state_shapes = {**TensorMagnitudePruner.state_shapes, "schedule": Either((), (STEP,) * len(_STEPS))}

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if not config.lr_rewind:  # no host need change its learning rate
            vars(self)["lr_factor"] = super().lr_factor

    def check_options(self) -> None:
        super().check_options()
        require(self.config, "initial_sparsity", lambda value: 0 <= value <= 1, "a removed ratio from 0 to 1")
        require(self.config, "pruning_frequency", lambda value: value >= 1, "1 or more updates")
        for option in _STEPS:
            if option != "end_pruning_step" or self.config.end_pruning_step != -1:
                require(self.config, option, lambda value: value >= 0, STEPS)

    def attach(self, session: SessionView) -> None:
        self.steps: dict[str, int] = {}
        super().attach(session)

    def plan(self) -> None:
        total = self.session.total_steps
        for name in _STEPS:
            value = getattr(self.config, name)
            if name not in self.steps:
                never = name == "end_pruning_step" and value == -1
                self.steps[name] = -1 if never else resolve_steps(value, total, f"--{name.replace('_', '-')}")
        for first, last in (_STEPS[:2], _STEPS[2:]):
            if self.steps[first] > self.steps[last] != -1:
                told = [f"--{name.replace('_', '-')} {self.steps[name]}" for name in (first, last)]
                raise HeadPruningError(f"{told[0]} comes after {told[1]}, so it never acts; correct them.")
        if total and self.steps["policy_end_step"] >= total:
            logger.warning(
                "the sparsity rises until update %d but training has %d: the model will not be trained at the target; "
                "lower --policy-end-step",
                self.steps["policy_end_step"],
                total,
            )

    def before_update(self, step: int) -> None:
        super().before_update(step)
        if self.fresh and (self.config.initial_sparsity or self.config.threshold_decay):
            self.mask_now(1.0 - self.config.initial_sparsity)

    def _rising(self, t: int, final: float) -> float:
        begin, end = self.steps["policy_begin_step"], self.steps["policy_end_step"]
        return gradual_sparsity(t, initial=self.config.initial_sparsity, final=final, begin=begin, end=end)

    def density_at(self, t: int) -> float:
        if self._each and self.selection.scope == "pattern":
            return 1.0 - self._together(self._counted({n: self._rising(t, r) for n, r in self._ramps.items()}))
        rising = self._rising(t, self._ramp)
        return 1.0 - (min(rising, self._target) if self._ramp > self._target else rising)

    def density_of(self, name: str, density: float) -> float:
        if not self._each or density == self.final_density():
            return super().density_of(name, density)
        return 1.0 - self._rising(self.t, self._ramps[name])  # each on its own way

    def due(self, t: int) -> bool:
        begin, end = self.steps["begin_pruning_step"], self.steps["end_pruning_step"]
        return t >= begin and (end == -1 or t <= end) and (t - begin) % self.config.pruning_frequency == 0

    def final_at(self, t: int) -> bool:
        return t >= self.steps["policy_end_step"]

    def lr_factor(self, step: int) -> float:
        total, warmup = self.session.total_steps, self.session.warmup_steps
        if not total or warmup is None:
            raise HeadPruningError(
                "--lr-rewind changes a learning rate that rises and falls linearly over a known number of updates; "
                "choose the linear schedule, or tell the session total_steps and warmup_steps in a loop of your own."
            )
        self._plan_once()
        if step < warmup or step >= total:
            return 1.0
        rate = rewound_rate(
            step,
            total=total,
            warmup=warmup,
            begin=self.steps["policy_begin_step"],
            end=self.steps["policy_end_step"],
            interval=self.config.pruning_frequency,
        )
        return rate * max(1, total - warmup) / (total - step)  # over that of the host

    def state_dict(self) -> dict[str, np.ndarray]:
        # Steps may have been given as fractions: a resumed run keeps those that it was started with.
        settled = [float(self.steps.get(name, -1)) for name in _STEPS] if self.steps else []
        return {**super().state_dict(), "schedule": np.array(settled)}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        super().load_state_dict(state)
        for name, step in zip(_STEPS, state["schedule"]):
            if 0 < getattr(self.config, name) < 1:
                self.steps[name] = int(step)


register_pruner(name="gradual_magnitude", config=GradualConfig, pruner=GradualMagnitudePruner, example=EXAMPLE)
