"""Hard-concrete L0 gates of Voita et al. 2019, "Analyzing Multi-Head Self-Attention" (section 5)."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any, Mapping, Optional

import numpy as np

from ..errors import HeadPruningError
from ..registry import register_pruner
from .base import HeadGateConfig, HeadGatePruner
from .engine.top_k import hard_top_k

logger = logging.getLogger(__name__)

TEMPERATURE = 0.33
STRETCH = (-0.1, 1.1)
EPSILON = 1e-6
# P(gate > 0) = sigmoid(log_a - TEMPERATURE * log(-STRETCH[0] / STRETCH[1]))
_OPEN_SHIFT = TEMPERATURE * math.log(-STRETCH[0] / STRETCH[1])


def sigmoid(x: np.ndarray) -> np.ndarray:
    """The logistic function, without overflow."""
    return 0.5 * (np.tanh(0.5 * x) + 1.0)


def sample_gates(log_a: np.ndarray, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Training gates and their derivative with respect to ``log_a``, elementwise.

    Args:
        log_a: logits, any shape.
        uniforms: noise in [0, 1), same shape.
    """
    noise = (1.0 - 2.0 * EPSILON) * uniforms + EPSILON
    s = sigmoid((np.log(noise) - np.log1p(-noise) + log_a) / TEMPERATURE)
    stretched = s * (STRETCH[1] - STRETCH[0]) + STRETCH[0]
    slope = s * (1.0 - s) / TEMPERATURE * (STRETCH[1] - STRETCH[0])
    return np.clip(stretched, 0.0, 1.0), np.where((stretched >= 0.0) & (stretched <= 1.0), slope, 0.0)


def expected_gates(log_a: np.ndarray) -> np.ndarray:
    """Evaluation gates: the stretched, clipped sigmoid without noise or temperature."""
    return np.clip(sigmoid(log_a) * (STRETCH[1] - STRETCH[0]) + STRETCH[0], 0.0, 1.0)


def open_probability(log_a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """P(gate > 0) and its derivative with respect to ``log_a``."""
    p = sigmoid(log_a - _OPEN_SHIFT)
    inside = (p >= EPSILON) & (p <= 1.0 - EPSILON)
    return np.clip(p, EPSILON, 1.0 - EPSILON), np.where(inside, p * (1.0 - p), 0.0)


@dataclass
class VoitaConfig(HeadGateConfig):
    """Options of the L0 gates."""

    l0_penalty: Optional[float] = field(
        default=None, metadata={"help": "weight of the expected number of open gates; more means fewer heads"}
    )
    l0_pipelined: bool = field(
        default=False,
        metadata={
            "help": "train only the gates of the L0 penalty (the published fairseq recipe always trains jointly)"
        },
    )


class VoitaPruner(HeadGatePruner):
    """Stochastic gates with an L0 penalty; the number of heads follows from the penalty, or is cut to K if given."""

    name = "voita"
    bert_defaults = {**HeadGatePruner.bert_defaults, "pruning_lr": 0.1}

    def __init__(self, config: VoitaConfig) -> None:
        super().__init__(config)
        self.freezes_model = config.l0_pipelined
        self._told = False

    @classmethod
    def bert_options(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """In the published BERT scripts the L0 gates too are trained with the model only when that is asked for."""
        if options.get("l0_pipelined") and options.get("joint_pruning"):
            raise HeadPruningError("joint_pruning and l0_pipelined contradict each other; give one of them.")
        return {"l0_pipelined": not options.get("joint_pruning"), **super().bert_options(options)}

    def check_options(self) -> None:
        if self.config.l0_penalty is None or not 0 <= self.config.l0_penalty < np.inf:
            raise HeadPruningError("voita needs a penalty of 0 or more; add --l0-penalty LAMBDA.")
        super().check_options()

    def initial_logits(self, generator: np.random.Generator) -> np.ndarray:
        """Xavier-uniform per attention layer, fan-in H and fan-out 1."""
        bounds = np.concatenate(
            [np.full(site.heads, np.sqrt(6.0 / (site.heads + 1))) for site in self.unit_map.attention]
        )
        return generator.uniform(-1.0, 1.0, self.unit_map.num_heads) * bounds

    def draw(self, step: int) -> np.ndarray:
        gates, self.slope = sample_gates(self.logits, self.uniforms(step))
        return gates

    def chain(self, gradient: np.ndarray) -> np.ndarray:
        return np.asarray(gradient, dtype=np.float64) * self.slope

    def after_step(self, step: int, lr_factor: float) -> None:
        super().after_step(step, lr_factor)
        if not (self._told or (self.logits > 0.0).any() or self.keep().any()):
            self._told = True
            logger.warning(
                "all heads are closed after %d updates, and no attention is left; lower --l0-penalty, or keep some "
                "heads with --num-of-heads, --min-heads-per-layer or --min-heads-per-kind",
                step + 1,
            )

    def penalty(self) -> float:
        return self.config.l0_penalty * float(open_probability(self.logits)[0].sum())

    def penalty_gradient(self) -> np.ndarray:
        return self.config.l0_penalty * open_probability(self.logits)[1]

    def keep(self) -> np.ndarray:
        if self.rounds is not None:
            return hard_top_k(self.logits, self.rounds)
        keep = self.logits > 0.0
        # The minima hold here too: the highest logits of a group that has too few.
        for groups, least in (
            (self.unit_map.rows(), self.config.min_heads_per_layer),
            (self.unit_map.kinds().values(), self.config.min_heads_per_kind or 0),
        ):
            for group in groups:
                closed = group[~keep[group]]
                missing = max(0, least - (len(group) - len(closed)))
                keep[closed[np.argsort(-self.logits[closed], kind="stable")[:missing]]] = True
        return keep

    def expected_heads(self) -> float:
        return float(open_probability(self.logits)[0].sum())

    def evaluation_gates(self) -> np.ndarray:
        return expected_gates(self.logits) if self.config.sample_in_eval else self.keep()


register_pruner(
    name="voita",
    config=VoitaConfig,
    pruner=VoitaPruner,
    selected_by=lambda options: options.l0_penalty is not None,
    example={"l0_penalty": 1.0},
)
