"""The schedule of PLATON and its siblings: a warm-up, a cubic fall of the remaining ratio, a final phase."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any, Optional

import numpy as np

from ..compact.shapes import STEP
from ..errors import HeadPruningError
from ..options import require
from ..pruner import SessionView
from ..schedules import STEPS, count_of, cubic_density, resolve_steps
from .base import MaskConfig, WeightPruner

#: Options of a short run: a tenth of training dense, the last fifth at the final ratio.
EXAMPLE = {"final_threshold": 0.2, "warmup_steps": 0.1}
logger = logging.getLogger(__name__)

# The published script's.
_FINAL_THRESHOLD = 0.15


@dataclass
class CubicConfig(MaskConfig):
    """Options of every method that follows PLATON's schedule."""

    initial_threshold: float = field(
        default=1.0, metadata={"help": "remaining ratio of the weights before the cubic phase, 0 to 1"}
    )
    final_threshold: Optional[float] = field(
        default=None,
        metadata={
            "help": "remaining ratio of the weights at the end, 0 to 1; default: 0.15, or what an N:M selection keeps"
        },
    )
    warmup_steps: float = field(
        default=5400,
        metadata={"help": "unit of the two warm-ups, in updates; below 1: a fraction of training"},
    )
    initial_warmup: float = field(
        default=1, metadata={"help": "no masks during the first so many times warmup_steps updates"}
    )
    final_warmup: float = field(
        default=2, metadata={"help": "masks at the final ratio during the last so many times warmup_steps updates"}
    )
    deltaT: int = field(default=1, metadata={"help": "updates from one mask of the cubic phase to the next"})


class CubicPruner(WeightPruner):
    """Masks every deltaT updates while the remaining ratio falls, and at every update of the final phase."""

    schedule_option = "warmup_steps"
    state_shapes = {**WeightPruner.state_shapes, "schedule": (STEP,)}

    def check_options(self) -> None:
        super().check_options()
        options = self.config
        for option in ("initial_threshold", "final_threshold"):
            if getattr(options, option) is not None:
                require(options, option, lambda value: 0 <= value <= 1, "a remaining ratio from 0 to 1")
        fixed = self.selection.density
        given = options.final_threshold
        if fixed is not None and given is not None and not math.isclose(given, fixed):
            raise HeadPruningError(
                f"--weight-selection {options.weight_selection} keeps {fixed:g} of the weights, which contradicts "
                f"--final-threshold {given}; leave one of them out."
            )
        self._density = next(d for d in (fixed, given, _FINAL_THRESHOLD) if d is not None)
        if options.initial_threshold < self._density:
            raise HeadPruningError(
                f"--initial-threshold {options.initial_threshold} is below --final-threshold {self._density}: both "
                "are remaining ratios, and the first must not be the smaller."
            )
        for option in ("initial_warmup", "final_warmup"):
            require(options, option, lambda value: value >= 0, "0 or more")
        require(options, "warmup_steps", lambda value: value >= 0, STEPS)
        require(options, "deltaT", lambda value: value >= 1, "1 or more updates")

    def options(self) -> dict[str, Any]:
        return {**super().options(), "final_threshold": self._density}

    def attach(self, session: SessionView) -> None:
        self.warmup = -1
        super().attach(session)

    def plan(self) -> None:
        total = self.session.total_steps
        if not total:
            raise HeadPruningError(
                f"{self.name} needs the length of training, which is not known here; limit training by updates or "
                "epochs."
            )
        if self.warmup < 0:
            self.warmup = resolve_steps(self.config.warmup_steps, total, "--warmup-steps")
        self.start = count_of(self.config.initial_warmup, self.warmup)
        self.stop = total - count_of(self.config.final_warmup, self.warmup)
        if self.start >= self.stop:
            logger.warning(
                "the pruner's warm-ups take %d + %d updates but training has %d: the remaining ratio will not fall "
                "gradually; lower --warmup-steps (a value below 1 is a fraction of training)",
                self.start,
                total - self.stop,
                total,
            )

    def density_at(self, t: int) -> float:
        return cubic_density(
            t,
            initial=self.config.initial_threshold,
            final=self._density,
            start=self.start,
            stop=self.stop,
        )

    def count_removed(self, density: float, number: int) -> int:
        # One threshold over all weights is the published code's, and so is its float error.
        published = self.selection.scope == "global"
        return int(number * (1.0 - density)) if published else super().count_removed(density, number)

    @property
    def why_more(self) -> str:
        wait = (
            ", as averages are until deltaT updates have passed; train longer or lower --deltaT" if self.kinds else ""
        )
        return super().why_more + wait

    def due(self, t: int) -> bool:
        return t > self.start and (t > self.stop or t % self.config.deltaT == 0)

    def final_at(self, t: int) -> bool:
        return t > self.start and t > self.stop

    def final_density(self) -> float:
        return self._density

    def state_dict(self) -> dict[str, np.ndarray]:
        # The warm-up may have been given as a fraction: a resumed run keeps the length that it was started with.
        return {**super().state_dict(), "schedule": np.array([float(self.warmup)])}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        super().load_state_dict(state)
        if self.config.warmup_steps < 1:
            self.warmup = int(state["schedule"][0])
