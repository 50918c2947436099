"""DSP: differentiable subset pruning with the Gumbel soft top-K (Li et al. 2021)."""

import logging
from dataclasses import dataclass, field
from typing import Optional

import numpy as np

from ..errors import HeadPruningError
from ..registry import register_pruner
from ..schedules import log_linear, resolve_steps
from .pruner import HeadGateConfig, HeadGatePruner
from .subset import SoftTopK, gumbel

logger = logging.getLogger(__name__)


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


class DSPPruner(HeadGatePruner):
    """Keeps exactly K heads: a relaxed subset of the perturbed logits whose temperature falls."""

    name = "dsp"

    def attach(self, session) -> None:
        self.require_count()
        for option in ("initial_temperature", "final_temperature"):
            if not getattr(self.config, option) > 0:
                raise HeadPruningError(f"--{option.replace('_', '-')} must be above 0; the usual end is 1e-8.")
        super().attach(session)
        self.step = 0
        self.cooldown: Optional[int] = None

    def _plan(self) -> int:
        """The length of the annealing in updates, settled at the first update (the host knows the run by then)."""
        total = self.session.total_steps
        if not self.config.annealing:
            if self.config.final_temperature < 1e-4:
                logger.warning(
                    "without --annealing the temperature is %g from the start, where gradients vanish: the heads will "
                    "be chosen at random; add --annealing or raise --final-temperature",
                    self.config.final_temperature,
                )
            return 0
        cooldown = resolve_steps(self.config.cooldown_steps, total, "--cooldown-steps")
        if total and cooldown > total:
            logger.warning(
                "the temperature anneals over %d updates but training has %d: the gates will not be hard at the end; "
                "lower --cooldown-steps",
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

    def draw(self, step: int) -> np.ndarray:
        self.step = step
        self.sample = SoftTopK(self.logits + gumbel(self.uniforms(step)), self.rounds, self.temperature(step))
        return self.sample.mask

    def chain(self, gradient: np.ndarray) -> np.ndarray:
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
    selected_by=lambda options: (
        options.num_of_heads is not None and not options.use_ste and options.l0_penalty is None
    ),
)
