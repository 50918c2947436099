"""STE: straight-through top-K, the second estimator of Li et al. 2021 (section 3.4)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..registry import register_pruner
from .base import HeadGateConfig, HeadGatePruner, UnitsConfig
from .falling_count import CountConfig, FallingCount


@dataclass
class STEConfig(CountConfig, UnitsConfig, HeadGateConfig):
    """Options of the straight-through estimator."""

    use_ste: bool = field(default=False, metadata={"help": "use the straight-through estimator instead of Gumbel"})


class STEPruner(FallingCount, HeadGatePruner):
    """The forward pass keeps the K highest logits; the backward pass hands every logit its gate's gradient."""

    name = "ste"
    schedule_option = "count_schedule"
    state_shapes = {**HeadGatePruner.state_shapes, **FallingCount.state_shapes}

    def check_options(self) -> None:
        self.require_count()
        super().check_options()

    def draw(self, step: int) -> np.ndarray:
        return self.top_k(self.logits, self.open_rounds(step)).astype(np.float64)

    def chain(self, gradient: np.ndarray) -> np.ndarray:
        return np.asarray(gradient, dtype=np.float64)


register_pruner(
    name="ste",
    config=STEConfig,
    pruner=STEPruner,
    selected_by=lambda options: options.use_ste,
    example={"num_of_heads": 4, "joint_pruning": True, "use_ste": True},
)
