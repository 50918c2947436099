"""DSP: differentiable subset pruning with the Gumbel soft top-K (Li et al. 2021)."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Optional

import numpy as np

from ..compact.shapes import STEP, Whole
from ..errors import HeadPruningError
from ..options import require
from ..pruner import SessionView
from ..registry import register_pruner
from ..schedules import log_linear, resolve_steps
from .base import HeadGateConfig, HeadGatePruner
from .subset import SoftTopK, gumbel

logger = logging.getLogger(__name__)

# At and below this temperature (nearly) all gradients of the relaxation are exactly 0: the logits learn no more.
DEAD_TEMPERATURE = 1e-4


@dataclass
class DSPConfig(HeadGateConfig):
    """Options of DSP."""

    annealing: bool = field(default=False, metadata={"help": "anneal the temperature of the Gumbel soft top-K"})
    initial_temperature: float = field(default=0.1, metadata={"help": "temperature at the first update"})
    final_temperature: float = field(
        default=1e-8, metadata={"help": "temperature after the cooldown, or throughout without --annealing"}
    )
    cooldown_steps: float = field(
        default=15000, metadata={"help": "updates to anneal over; below 1: a fraction of training"}
    )
    noise_after_cooldown: bool = field(
        default=False,
        metadata={
            "help": "go on drawing noisy subsets after the cooldown, as the published code does; without it the model "
            "trains on with the K heads that stay"
        },
    )


class DSPPruner(HeadGatePruner):
    """Keeps exactly K heads: a relaxed subset of the perturbed logits whose temperature falls."""

    name = "dsp"
    bert_defaults = {**HeadGatePruner.bert_defaults, "initial_temperature": 1000.0, "cooldown_steps": 25000}
    schedule_option = "cooldown_steps"
    state_shapes = {**HeadGatePruner.state_shapes, "schedule": (Whole(), STEP)}

    def check_options(self) -> None:
        self.require_count()
        for option in ("initial_temperature", "final_temperature"):
            require(self.config, option, lambda value: value > 0, "above 0")
        initial, final = self.config.initial_temperature, self.config.final_temperature
        if self.config.annealing and initial < final:
            raise HeadPruningError(
                f"--initial-temperature {initial:g} is below --final-temperature {final:g}, but annealing lowers the "
                "temperature; swap them."
            )
        super().check_options()

    def attach(self, session: SessionView) -> None:
        super().attach(session)
        self.step = 0
        self.cooldown: Optional[int] = None
        self.sample: Optional[SoftTopK] = None

    def _plan(self) -> int:
        """The length of the annealing in updates, settled at the first update (the host knows the run by then)."""
        total = self.session.total_steps
        if not self.config.annealing:
            if self.config.final_temperature < DEAD_TEMPERATURE:
                logger.warning(
                    "without --annealing the temperature is %g from the start, where gradients vanish: the heads will "
                    "be chosen at random; add --annealing or raise --final-temperature",
                    self.config.final_temperature,
                )
            return 0
        if not self.config.cooldown_steps:
            raise HeadPruningError("--cooldown-steps is 0, so there is nothing to anneal; leave out --annealing.")
        cooldown = resolve_steps(self.config.cooldown_steps, total, "--cooldown-steps")
        if total and cooldown > total:
            logger.warning(
                "the temperature anneals over %d updates but training has %d: the gates will not be hard at the end; "
                "lower --cooldown-steps (a value below 1 is a fraction of training)",
                cooldown,
                total,
            )
        return cooldown

    def temperature(self, step: int) -> float:
        """The temperature of update ``step``."""
        if self.cooldown is None:
            self.cooldown = self._plan()
        if not self.config.annealing:
            return self.config.final_temperature
        return log_linear(
            step, initial=self.config.initial_temperature, final=self.config.final_temperature, steps=self.cooldown
        )

    def reset_optimizer(self) -> None:
        super().reset_optimizer()
        self.step, self.cooldown = 0, None

    def settled(self, step: int) -> bool:
        """Whether the annealing is over and the logits are frozen.

        The Gumbel noise does not fall with the temperature. Where training was too short for gaps between the logits
        that dwarf it, a model that goes on with noise is trained with other heads than those it will keep (README,
        Results).
        """
        return (
            self.config.annealing
            and not self.config.noise_after_cooldown
            and self.config.final_temperature <= DEAD_TEMPERATURE
            and self.temperature(step) == self.config.final_temperature
        )

    def draw(self, step: int) -> np.ndarray:
        self.step = step
        if self.settled(step):
            self.sample, self.gradient_norm = None, 0.0
            return self.keep().astype(np.float64)
        assert self.rounds is not None
        self.sample = SoftTopK(self.logits + gumbel(self.uniforms(step)), self.rounds, self.temperature(step))
        return self.sample.mask

    def after_backward(self, loss_scale: float, denominator: float, micro_batches: int) -> None:
        if self.sample is not None:
            super().after_backward(loss_scale, denominator, micro_batches)

    def chain(self, gradient: np.ndarray) -> np.ndarray:
        assert self.sample is not None
        return self.sample.backward(gradient)

    def at_target(self) -> bool:
        if self.final is not None or not self.config.annealing:
            return True
        return self.cooldown is not None and self.step + 1 >= self.cooldown

    def metrics(self) -> dict[str, float]:
        return {"temperature": self.temperature(self.step), **super().metrics()}

    def state_dict(self) -> dict[str, np.ndarray]:
        # The annealing may have been given as a fraction: a resumed run keeps the length that it was started with.
        schedule = [float(self.step), -1.0 if self.cooldown is None else float(self.cooldown)]
        return {**super().state_dict(), "schedule": np.array(schedule)}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        super().load_state_dict(state)
        self.step, cooldown = (int(value) for value in state["schedule"])
        if cooldown >= 0 and self.config.cooldown_steps < 1:
            self.cooldown = cooldown


register_pruner(
    name="dsp",
    config=DSPConfig,
    pruner=DSPPruner,
    recommended=True,
    example={"num_of_heads": 4, "joint_pruning": True, "annealing": True, "cooldown_steps": 0.5},
    selected_by=lambda options: (
        options.num_of_heads is not None and not options.use_ste and options.l0_penalty is None
    ),
)
