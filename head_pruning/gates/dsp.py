"""DSP: differentiable subset pruning with the Gumbel soft top-K (Li et al. 2021)."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, fields, replace
from typing import Any, Mapping, Optional

import numpy as np

from ..compact.shapes import STEP, Whole
from ..errors import HeadPruningError
from ..options import require
from ..pruner import SessionView
from ..registry import register_pruner
from ..schedules import log_linear, resolve_steps
from .base import HeadCountConfig, HeadGateConfig, HeadGatePruner, JointConfig
from .engine.top_k import SoftTopK, gumbel
from .falling_count import CountConfig, FallingCount

logger = logging.getLogger(__name__)

# At and below this temperature (nearly) all gradients of the relaxation are exactly 0: the logits learn no more.
DEAD_TEMPERATURE = 1e-4

# What is not said of the schedule: as the published fairseq script has it, or, where nothing at all is said, so that
# trainings of any length choose heads (the published one keeps a random choice without --annealing).
_PUBLISHED = {"initial_temperature": 0.1, "final_temperature": 1e-8, "cooldown_steps": 15000}
_SHORT = {"annealing": True, "initial_temperature": 10.0, "final_temperature": DEAD_TEMPERATURE, "cooldown_steps": 0.6}


@dataclass
class DSPConfig(CountConfig, HeadGateConfig):
    """Options of DSP."""

    annealing: bool = field(
        default=False,
        metadata={
            "help": "anneal the temperature of the Gumbel soft top-K; without it, where no temperature is named, it "
            "falls from 10 to 1e-4 in the first 0.6 of training"
        },
    )
    initial_temperature: Optional[float] = field(
        default=None,
        metadata={"help": "temperature at the first update; default with --annealing: 0.1, in the BERT scripts 1000"},
    )
    final_temperature: Optional[float] = field(
        default=None,
        metadata={
            "help": "temperature after the cooldown, or throughout where a temperature is named without --annealing; "
            "default: 1e-8"
        },
    )
    cooldown_steps: Optional[float] = field(
        default=None,
        metadata={
            "help": "updates to anneal over; below 1: a fraction of training; default with --annealing: 15000, in the "
            "BERT scripts 25000"
        },
    )
    noise_after_cooldown: bool = field(
        default=False,
        metadata={
            "help": "go on drawing noisy subsets after the cooldown, as the published code does; without it the model "
            "trains on with the K heads that stay, where the final temperature is 1e-4 or less (above, draws go on)"
        },
    )
    anneal_noise: bool = field(
        default=False,
        metadata={
            "help": "let the Gumbel noise fall with the temperature: below 1 it is multiplied with it, so that the "
            "last draws are the heads that stay"
        },
    )


def _names_schedule(options: Mapping[str, Any]) -> bool:
    """Whether the options ask for the published annealing, or for a temperature."""
    return not all(_unsaid(options.get(name)) for name in ("annealing", "initial_temperature", "final_temperature"))


def _unsaid(value: Any) -> bool:
    return value is None or value is False


class DSPPruner(FallingCount, HeadGatePruner):
    """Keeps exactly K heads: a relaxed subset of the perturbed logits whose temperature falls."""

    name = "dsp"
    bert_defaults = {**HeadGatePruner.bert_defaults, "initial_temperature": 1000.0, "cooldown_steps": 25000}
    schedule_option = "cooldown_steps"
    state_shapes = {
        **HeadGatePruner.state_shapes,
        **FallingCount.state_shapes,
        "schedule": (Whole(), STEP),
    }

    def __init__(self, config: DSPConfig) -> None:
        defaults: dict[str, Any] = _PUBLISHED if _names_schedule(vars(config)) else _SHORT
        super().__init__(replace(config, **{k: v for k, v in defaults.items() if _unsaid(getattr(config, k))}))

    @classmethod
    def bert_options(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """With the published scripts' temperatures only where an annealing or a temperature is asked for."""
        defaults = cls.bert_defaults if _names_schedule(options) else HeadGatePruner.bert_defaults
        return {**defaults, **options}

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
        self.cooldown = None

    def settled(self, step: int) -> bool:
        """Whether the annealing is over and the logits are frozen.

        The Gumbel noise does not fall with the temperature. Where training was too short for gaps between the logits
        that dwarf it, a model that goes on with noise is trained with other heads than those it will keep
        (docs/results.md). Above ``DEAD_TEMPERATURE`` the logits go on learning, so it is never over.
        """
        return (
            self.config.annealing
            and not self.config.noise_after_cooldown
            and self.config.final_temperature <= DEAD_TEMPERATURE
            and self.temperature(step) == self.config.final_temperature
            and self.fallen(step)
        )

    @property
    def learns_gates(self) -> bool:
        return super().learns_gates and self.sample is not None

    def draw(self, step: int) -> np.ndarray:
        self.step = step
        if self.settled(step) or self.held(step):
            self.sample, self.gradient_norm = None, 0.0
            return (self.keep() if self.settled(step) else self.alive).astype(np.float64)
        temperature, noise = self.temperature(step), gumbel(self.uniforms(step))
        if self.config.anneal_noise:
            noise *= min(1.0, temperature)
        self.sample = SoftTopK(self.living(self.logits + noise), self.open_rounds(step), temperature)
        return self.sample.mask

    def after_backward(self, loss_scale: float, denominator: float, micro_batches: int) -> None:
        if self.sample is not None:
            super().after_backward(loss_scale, denominator, micro_batches)

    def chain(self, gradient: np.ndarray) -> np.ndarray:
        assert self.sample is not None
        return self.sample.backward(gradient)

    def at_target(self) -> bool:
        if not super().at_target():
            return False
        if self.final is not None or not self.config.annealing:
            return True
        # A session that was just loaded has not settled it yet; a fraction is in the state that it loaded.
        cooldown = self.config.cooldown_steps if self.cooldown is None else self.cooldown
        return cooldown >= 1 and self.step + 1 >= cooldown

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


_SHARED = {option.name for shared in (CountConfig, JointConfig, HeadCountConfig) for option in fields(shared)}
_OWN = [option.name for option in fields(DSPConfig) if option.name not in _SHARED]


def _asked_for(options: Any) -> bool:
    """Whether a count was given, and more of how gates learn than every method of a count has."""
    own = options.were_set(*_OWN)
    return own and options.num_of_heads is not None and not options.use_ste and options.l0_penalty is None


register_pruner(
    name="dsp",
    config=DSPConfig,
    pruner=DSPPruner,
    example={"num_of_heads": 4, "joint_pruning": True, "annealing": True, "cooldown_steps": 0.5},
    selected_by=_asked_for,
)
