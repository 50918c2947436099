"""What the head-gate methods share: logits, their optimizer, clipping, the minimum of heads per group."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Callable, Optional

import numpy as np

from ..compact.shapes import FLAG, Number, Whole
from ..errors import HeadPruningError
from ..masks import HeadMask, full_mask
from ..options import require
from ..pruner import Pruner, SessionView
from ..unit_map import NUMBERED
from .adam import GateAdam
from .engine.top_k import Rounds, hard_top_k, plan_rounds

logger = logging.getLogger(__name__)


@dataclass
class HeadCountConfig:
    """Options of every method that keeps a set number of heads."""

    num_of_heads: Optional[int] = field(
        default=None, metadata={"help": "number of heads to keep, of all heads of the model (K)"}
    )
    min_heads_per_layer: int = field(
        default=0, metadata={"help": "keep at least this many heads in every attention layer"}
    )
    min_heads_per_kind: Optional[int] = field(
        default=None,
        metadata={
            "help": "keep at least this many heads of every kind of attention (encoder, cross, decoder); default: the "
            "method's own, else 0",
            "once_unset": 0,
        },
    )


@dataclass
class UnitsConfig:
    """The option of every method that prunes feed-forward units as it does heads."""

    prune_units: str = field(
        default="heads",
        metadata={
            "help": "what is pruned: heads, ffn (the units of feed-forward blocks) or both; counts and masks are then "
            "of units, or of heads and units together"
        },
    )


@dataclass
class BudgetConfig(UnitsConfig, HeadCountConfig):
    """Options of every method that ranks heads and units and keeps the first of them: how many these are."""

    keep_share: Optional[float] = field(
        default=None,
        metadata={"help": "keep this share of the heads, and of the units, in the place of num_of_heads"},
    )
    keep_macs: Optional[float] = field(
        default=None,
        metadata={
            "help": "keep heads and units of at most this share of their multiply-accumulates, in the place of "
            "num_of_heads"
        },
    )
    macs_length: int = field(
        default=128, metadata={"help": "tokens of an example, where multiply-accumulates are counted"}
    )


@dataclass
class JointConfig:
    """The option of every method that may leave the model as it is."""

    joint_pruning: bool = field(
        default=False,
        metadata={
            "help": "train the model together with the gates; without it only the gates are trained (pipelined)"
        },
    )


@dataclass
class HeadGateConfig(JointConfig, HeadCountConfig):
    """Options of every method that learns gates."""

    pruning_lr: float = field(
        default=0.2,
        metadata={
            "help": "learning rate of the gate logits (Adam); with transformers it follows the model's schedule, with "
            "fairseq it stays constant"
        },
    )
    gate_clip_norm: float = field(
        default=1.0, metadata={"help": "clip the gradient norm of the gate logits, apart from the model's; 0: never"}
    )
    gate_weight_decay: float = field(
        default=0.0, metadata={"help": "decoupled weight decay of the gate logits, per step and learning rate"}
    )
    gate_adam_beta1: float = field(default=0.9, metadata={"help": "Adam's first decay rate for the gate logits"})
    gate_adam_beta2: float = field(default=0.98, metadata={"help": "Adam's second decay rate for the gate logits"})
    sample_in_eval: bool = field(
        default=False,
        metadata={"help": "evaluate during training with the sampled soft gates, as the published code does"},
    )


class HeadPruner(Pruner):
    """A method with a head mask: gates on the model, one value per head in training and one in evaluation."""

    def check_options(self) -> None:
        super().check_options()
        if self.units not in NUMBERED:
            raise HeadPruningError(f"--prune-units is {self.units!r}; give one of {', '.join(NUMBERED)}.")
        if isinstance(self.config, HeadCountConfig):
            for option in ("min_heads_per_layer", "min_heads_per_kind"):
                if getattr(self.config, option) is not None:
                    require(self.config, option, lambda value: value >= 0, "0 or more")
            if self.units == "ffn" and self.config.min_heads_per_kind:
                raise HeadPruningError(
                    "--min-heads-per-kind is for kinds of attention, but --prune-units ffn prunes no heads; drop it, "
                    "or give --min-heads-per-layer for the units of each block."
                )

    def attach(self, session: SessionView) -> None:
        super().attach(session)
        assert session.unit_map is not None  # the session refuses pruners of heads without one
        self.unit_map = session.unit_map
        count = self.first_count()
        self.rounds = None if count is None else self.plan(count)
        self.final: Optional[np.ndarray] = None

    def first_count(self) -> Optional[int]:
        """The number of heads that would stay, were training to end at once; None: it is not set."""
        return self.config.num_of_heads if isinstance(self.config, HeadCountConfig) else None

    def plan(self, count: int) -> Rounds:
        """How ``count`` heads are chosen, with the minimum of each group; HeadPruningError if that cannot be."""
        return plan_rounds(
            self.unit_map.num_heads,
            count,
            rows=self.unit_map.rows(),
            kinds=list(self.unit_map.kinds().values()),
            min_per_row=self.config.min_heads_per_layer,
            min_per_kind=self.min_per_kind(count),
        )

    def min_per_kind(self, count: int) -> int:
        """How many of ``count`` heads are of each kind of attention at least."""
        return self.config.min_heads_per_kind or 0

    def summary(self) -> str:
        trained = "kept as they are (pipelined)" if self.freezes_model else "trained too (joint)"
        sites = len(self.unit_map.sites)
        found = [f"{total} {name}" for name, (_, total) in full_mask(self.unit_map).counts().items()]
        kind = "attention layers" if self.units == "heads" else "sites"
        return f"{' and '.join(found)} in {sites} {kind}, the model's own weights are {trained}"

    def keep(self) -> np.ndarray:
        """``bool[N]``: the heads that would stay now."""
        raise NotImplementedError

    @property
    def heads_final(self) -> bool:
        return self.final is not None

    def head_mask(self) -> HeadMask:
        return HeadMask(self.unit_map, self.keep() if self.final is None else self.final)

    def top_k(self, scores: np.ndarray, rounds: Optional[Rounds] = None) -> np.ndarray:
        """``bool[N]``: the heads of highest score (``[N]``) that ``rounds`` choose; default: ``num_of_heads`` of them,
        with the minimum of each group.
        """
        rounds = rounds or self.rounds
        assert rounds is not None  # methods that use it require num_of_heads
        return hard_top_k(scores, rounds)

    def require_count(self) -> None:
        """Raise unless the number of heads to keep was given."""
        if self.config.num_of_heads is None:
            raise HeadPruningError(f"{self.name} needs the number of heads to keep; add --num-of-heads K.")

    def harden(self) -> None:
        self.final = self.keep()
        self.session.gates.set_fixed(self.final)

    def _set_evaluation(self) -> None:
        """Have evaluations see what would stay now."""
        self.session.gates.set_evaluation(self.keep())

    def final_state(self) -> dict[str, np.ndarray]:
        """The entry of :meth:`state_dict` that tells the outcome; empty where it is not fixed yet."""
        return {"final": np.array([] if self.final is None else self.final, dtype=float)}

    def load_final(self, state: dict[str, np.ndarray], evaluation: Callable[[], np.ndarray]) -> None:
        """Restore :meth:`final_state` and set the gates; where nothing is fixed, those of ``evaluation()``.

        Raises:
            HeadPruningError: the outcome keeps another number of heads than this run's options say.
        """
        self.final = HeadMask(self.unit_map, state["final"]).keep if state["final"].size else None
        if self.final is None:
            self.session.gates.set_evaluation(evaluation())
            return
        kept, asked = int(self.final.sum()), None if self.rounds is None else len(self.rounds.supports)
        if asked not in (None, kept):
            raise HeadPruningError(
                f"The checkpoint has settled on {kept} heads, and this run's options give {asked}; resume with the "
                "options that the run was started with, or start anew from its weights."
            )
        self.session.gates.set_fixed(self.final)


class HeadGatePruner(HeadPruner):
    """A method that learns one logit per head.

    The logits are float64 on the host and never enter the host's optimizer. Once per update the gates are drawn,
    and once per update their gradient (one copy of N floats) is mapped to the logits in closed form.
    """

    bert_defaults = {"pruning_lr": 0.5, "gate_adam_beta2": 0.999}
    # Without clipping, gradients of the relaxation and their squares may be as large as numbers are.
    state_shapes = {
        "logits": [Number()],
        "counts": (Whole(), Whole()),
        "final": [FLAG],
        "adam.first": [Number(-math.inf, math.inf)],
        "adam.second": [Number(0, math.inf)],
        "adam.steps": (Whole(),),
    }

    def __init__(self, config: HeadGateConfig) -> None:
        super().__init__(config)
        self.freezes_model = not config.joint_pruning
        self.noise = None  # parity with recorded runs: a function from the step to the N uniforms

    def check_options(self) -> None:
        super().check_options()
        require(self.config, "pruning_lr", lambda value: value > 0, "above 0")
        for option in ("gate_clip_norm", "gate_weight_decay"):
            require(self.config, option, lambda value: value >= 0, "0 or more")
        for option in ("gate_adam_beta1", "gate_adam_beta2"):
            require(self.config, option, lambda value: 0 <= value < 1, "at least 0 and below 1")

    def attach(self, session: SessionView) -> None:
        super().attach(session)
        self.generator = np.random.default_rng([session.seed, 0])
        self.logits = self.initial_logits(self.generator)
        self.adam = GateAdam(
            self.logits.size,
            (self.config.gate_adam_beta1, self.config.gate_adam_beta2),
            weight_decay=self.config.gate_weight_decay,
        )
        self.gradient: Optional[np.ndarray] = None
        self.gradient_norm = 0.0
        self._clipped = self._broken = False
        self.clipped_steps = 0
        self.skipped_steps = 0
        self.drawn = np.ones(self.logits.size)
        self._set_evaluation()

    def initial_logits(self, generator: np.random.Generator) -> np.ndarray:
        """Xavier-uniform over the [sites, heads] matrix."""
        bound = np.sqrt(6.0 / (len(self.unit_map.attention) + self.unit_map.attention[0].heads))
        return generator.uniform(-bound, bound, self.unit_map.num_heads)

    @property
    def learns_gates(self) -> bool:
        return self.final is None

    def draw(self, step: int) -> np.ndarray:
        """The N gates of update ``step``; keeps what :meth:`chain` needs."""
        raise NotImplementedError

    def chain(self, gradient: np.ndarray) -> np.ndarray:
        """dL/dlogits from dL/dgates, for the last draw."""
        raise NotImplementedError

    def penalty(self) -> float:
        """The regulariser that the objective adds once per micro-batch."""
        return 0.0

    def penalty_gradient(self) -> np.ndarray:
        """Its gradient with respect to the logits."""
        return np.zeros_like(self.logits)

    def evaluation_gates(self) -> np.ndarray:
        """The N gates of evaluation."""
        return self.drawn if self.config.sample_in_eval else self.keep()

    def uniforms(self, step: int) -> np.ndarray:
        """N uniforms in [0, 1): the same on every rank and after a resume."""
        if self.noise is not None:
            return np.asarray(self.noise(step), dtype=np.float64).reshape(-1)
        return np.random.default_rng([self.session.seed, 1, step]).random(self.logits.size)

    def before_update(self, step: int) -> None:
        if self.final is not None:
            self.session.gates.set_fixed(self.final)
            return
        self.drawn = self.draw(step)
        self.session.gates.set_training(self.drawn)
        self.gradient = None
        if self.config.sample_in_eval:
            self._set_evaluation()

    def after_backward(self, loss_scale: float, denominator: float, micro_batches: int) -> None:
        if self.final is not None:
            return
        gates = self.session.gates
        packed = np.array([denominator, micro_batches])
        gradient, (denominator, micro_batches) = self.session.collect(gates.gradients, packed)
        with np.errstate(over="ignore", invalid="ignore"):
            gradient = self.chain(gradient / loss_scale) + micro_batches * self.penalty_gradient()
            gradient /= denominator or 1.0
            # Scale before squaring: gradients of the relaxation can exceed 1e154.
            largest = np.abs(gradient).max()
            finite = np.isfinite(largest)
            self.gradient_norm = float(largest * np.linalg.norm(gradient / (largest or 1.0))) if finite else np.inf
        self._broken = not finite
        if self._broken:
            return
        limit = self.config.gate_clip_norm
        self._clipped = bool(limit) and self.gradient_norm > limit
        if self._clipped:
            gradient *= limit / self.gradient_norm
        self.gradient = gradient

    def skip_update(self, step: int) -> None:
        if self._broken:  # found by the host too, which tries again with another loss scale
            self.gradient_norm = 0.0
        self.gradient, self._clipped, self._broken = None, False, False

    def after_step(self, step: int, lr_factor: float) -> None:
        if self._broken:
            self._broken = False
            self.skipped_steps += 1
            logger.warning(
                "the gate gradients are not finite: this gate step is skipped (%d so far)", self.skipped_steps
            )
        if self.gradient is None:
            return
        self.clipped_steps += self._clipped
        self.adam.step(self.logits, self.gradient, self.config.pruning_lr * lr_factor)
        self.gradient = None
        self._set_evaluation()

    def reset_optimizer(self) -> None:
        self.adam = GateAdam(self.logits.size, self.adam.betas, weight_decay=self.adam.weight_decay)
        self.clipped_steps = self.skipped_steps = 0

    def harden(self) -> None:
        super().harden()
        assert self.final is not None
        self.drawn, self.gradient_norm = self.final.astype(np.float64), 0.0  # for the log: nothing is drawn any more

    def _set_evaluation(self) -> None:
        self.session.gates.set_evaluation(self.evaluation_gates())

    def metrics(self) -> dict[str, float]:
        return {
            "gate_norm": self.gradient_norm,
            "gate_clip": 100.0 * self.clipped_steps / max(1, self.adam.steps),
            "gate_skip": float(self.skipped_steps),
            "penalty": self.penalty(),
            "heads_expected": self.expected_heads(),
            "heads_kept": float(self.keep().sum()),
        }

    def expected_heads(self) -> float:
        """The number of open heads that the gates of this update amount to."""
        return float(self.drawn.sum())

    def keep(self) -> np.ndarray:
        return self.top_k(self.logits)

    def state_dict(self) -> dict[str, np.ndarray]:
        counts = np.array([self.clipped_steps, self.skipped_steps], float)
        adam = {f"adam.{name}": value for name, value in self.adam.state_dict().items()}
        return {"logits": self.logits.copy(), "counts": counts, **self.final_state(), **adam}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        if state["logits"].size != self.logits.size:
            raise HeadPruningError(
                f"The checkpoint has gate logits for {state['logits'].size} heads but the model has "
                f"{self.logits.size}; resume with the options that the run was started with."
            )
        self.logits = np.array(state["logits"], dtype=np.float64)
        self.clipped_steps, self.skipped_steps = (int(count) for count in state["counts"])
        self.adam.load_state_dict(
            {name[len("adam.") :]: value for name, value in state.items() if name.startswith("adam.")}
        )
        self.drawn = self.keep().astype(np.float64)  # until the next draw
        self.load_final(state, self.evaluation_gates)
        if self.final is not None:
            self.drawn = self.final.astype(np.float64)
