"""PLATON: pruning by an upper confidence bound of weight importance (Zhang et al. 2022), and smoothed sensitivity."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from ..options import require
from ..pruner import SessionView
from ..registry import register_pruner
from .cubic import EXAMPLE, CubicConfig, CubicPruner
from .engine.masks import TINY
from .engine.portions import Portion, product

# With late_tracking, what the averages would have held of earlier updates weighs less than this.
_FORGOTTEN = 1e-3


@dataclass
class SensitivityConfig(CubicConfig):
    """Options of smoothed sensitivity."""

    beta1: float = field(
        default=0.85,
        metadata={"help": "decay rate, per window of deltaT updates, of the average of importance, 0 to 1"},
    )
    late_tracking: bool = field(
        default=False,
        metadata={
            "help": "start the averages shortly before the first mask, where what came earlier weighs less than a "
            "thousandth: less work in the warm-up, scores that differ by so much; without it they are exact"
        },
    )


@dataclass
class PlatonConfig(SensitivityConfig):
    """Options of PLATON."""

    beta2: float = field(
        default=0.0,
        metadata={
            "help": "decay rate, per window, of the average of uncertainty; 0: uncertainty of the newest updates "
            "alone; 1: none (smoothed sensitivity); 2: root of the mean squared deviation"
        },
    )


class SensitivityPruner(CubicPruner):
    """Prunes the weights of lowest smoothed sensitivity, the average of abs(weight * gradient)."""

    name = "sensitivity"
    needs_gradient = True
    kinds = ("window", "average")
    carrier = "average"
    beta2 = 1.0

    def check_options(self) -> None:
        require(self.config, "beta1", lambda value: 0 <= value < 1, "at least 0 and below 1")
        super().check_options()

    def plan(self) -> None:
        super().plan()
        self.track_from = 0
        if self.config.late_tracking:
            rate = max(self.config.beta1, self.beta2 if 0 < self.beta2 < 1 else 0.0)
            windows = 1 + (math.ceil(math.log(_FORGOTTEN) / math.log(rate)) if rate > 0 else 1)
            self.track_from = max(0, self.start // self.config.deltaT - windows) * self.config.deltaT

    def scores_moved(self, t: int) -> bool:
        return t % self.config.deltaT == 0

    def track(self, t: int, portion: Portion, gradients: list[torch.Tensor]) -> None:
        if t < self.track_from:
            return
        window, starts = portion.state["window"], t % self.config.deltaT == 0
        if starts:
            self._close_window(t, portion)
        newest = window if starts else portion.scratch()
        product(portion.values, gradients, out=newest)
        torch._foreach_abs_(newest)
        if not starts:  # the sum; the published code keeps the mean up to date
            torch._foreach_add_(window, newest)

    def _close_window(self, t: int, portion: Portion) -> None:
        """The averages take in the mean of the window that has ended."""
        x, averages = portion.scratch(), portion.state["average"]
        tiny = torch.full((), TINY, device=portion.device)
        for i, (window, average) in enumerate(zip(portion.state["window"], averages)):
            # Above 0, so that the average's sign can tell the mask; no other value is moved by so little.
            torch.add(tiny, window, alpha=1.0 / self.config.deltaT, out=x[i])
            average.abs_().lerp_(x[i], 1.0 - self.config.beta1)
            if "uncertainty" in portion.state:
                self._add_deviation(t, portion.state["uncertainty"][i], x[i].sub_(average))

    def _add_deviation(self, t: int, uncertainty: torch.Tensor, deviation: torch.Tensor) -> None:
        raise NotImplementedError

    def scores(self, portion: Portion) -> list[torch.Tensor]:
        scores = portion.scratch()
        for average, x in zip(portion.state["average"], scores):
            torch.abs(average, out=x)
        return scores


class PlatonPruner(SensitivityPruner):
    """Prunes the weights of lowest importance times uncertainty, both averaged over windows of deltaT updates.

    Equations 4 to 7 of the paper, with what the published code does: theta after the optimizer's step times the
    gradient before it, averaged within a window; the averages take in a window when the next one starts.
    State: 12 bytes per weight (8 at beta2 0 or 1); the mask lives in the sign bits of the averages.
    """

    name = "platon"

    def check_options(self) -> None:
        require(self.config, "beta2", lambda value: 0 <= value <= 1 or value == 2, "from 0 to 1, or 2")
        super().check_options()

    def attach(self, session: SessionView) -> None:
        self.beta2 = self.config.beta2
        self.kinds = ("window", "average", *(() if self.beta2 in (0, 1) else ("uncertainty",)))
        super().attach(session)

    def scores_moved(self, t: int) -> bool:
        return self.beta2 == 0 or super().scores_moved(t)

    def _add_deviation(self, t: int, uncertainty: torch.Tensor, deviation: torch.Tensor) -> None:
        if self.beta2 == 2:
            uncertainty.lerp_(deviation.square_(), 1.0 / (t // self.config.deltaT + 1))
        else:
            uncertainty.lerp_(deviation.abs_(), 1.0 - self.beta2)

    def scores(self, portion: Portion) -> list[torch.Tensor]:
        if self.beta2 == 1:
            return super().scores(portion)
        scores = portion.scratch()
        second = portion.state["window" if self.beta2 == 0 else "uncertainty"]
        for average, other, x, y in zip(portion.state["average"], second, scores, portion.scratch(1)):
            if self.beta2 == 0:
                torch.mul(other, 1.0 / (self.t % self.config.deltaT + 1), out=x)
                torch.abs(average, out=y)
                x.sub_(y).abs_().mul_(y)
            else:
                torch.mul(average, torch.sqrt(other, out=y) if self.beta2 == 2 else other, out=x).abs_()
        return scores


register_pruner(name="sensitivity", config=SensitivityConfig, pruner=SensitivityPruner, example=EXAMPLE)
register_pruner(name="platon", config=PlatonConfig, pruner=PlatonPruner, recommended=True, example=EXAMPLE)
