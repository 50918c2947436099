"""The masks of sparse progressive distillation (Huang et al. 2022): the smallest weights of each tensor, for good."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any, Optional

import numpy as np
import torch

from ..compact.shapes import STEP
from ..errors import HeadPruningError
from ..options import require
from ..pruner import SessionView
from ..registry import register_pruner
from .base import TargetConfig
from .magnitude import MagnitudeScores

logger = logging.getLogger(__name__)

# Masks in the phase of pruning, as in the published code.
_MASKS = 12
# What the product of a number of weights and a density may lack of a whole number by rounding alone.
_ROUNDING = 1e-6


@dataclass
class PhaseConfig:
    """Options of everything that follows SPD's two phases of training."""

    num_prune_epochs: Optional[float] = field(
        default=None,
        metadata={"help": "epochs in which the masks grow, the first phase of training; default: half of training"},
    )
    published_schedule: bool = field(
        default=False,
        metadata={
            "help": "as the published code: the replacing rate may never reach 1, the last mask may be missed, the "
            "learning rate of each phase falls to 0 in 30 epochs, the optimizer keeps its averages in the second"
        },
    )

    def check(self) -> None:
        """Raise HeadPruningError for impossible values."""
        if self.num_prune_epochs is not None:
            require(self, "num_prune_epochs", lambda value: value > 0, "a number of epochs above 0")


def pruning_updates(config: PhaseConfig, total: Optional[int], per_epoch: Optional[float], name: str) -> int:
    """The number of updates in the first phase.

    It ends before the last update of training, unless the published schedule is asked for.

    Args:
        config: the options.
        total: updates in training.
        per_epoch: updates in an epoch.
        name: of the method that asks.

    Raises:
        HeadPruningError: the lengths are not known.
    """
    if not total:
        raise HeadPruningError(
            f"{name} needs the length of training, which is not known here; limit training by updates or epochs."
        )
    if config.num_prune_epochs is None:
        return max(1, total // 2)
    if not per_epoch:
        raise HeadPruningError(
            f"--num-prune-epochs {config.num_prune_epochs:g} needs the number of updates in an epoch, which is not "
            "known here; leave it out, and the first half of training is the phase of pruning."
        )
    if config.published_schedule:
        return max(1, int(int(per_epoch) * config.num_prune_epochs))
    return max(1, min(round(per_epoch * config.num_prune_epochs), total - 1))


@dataclass
class SpdMagnitudeConfig(TargetConfig, PhaseConfig):
    """Options of SPD's masks."""

    sparsity: float = field(default=0.0, metadata={"help": "ratio of the weights of each tensor removed, 0 to 1"})
    mask_frequency: Optional[int] = field(
        default=None,
        metadata={"help": "updates from one of SPD's masks to the next; default: a twelfth of the phase of pruning"},
    )


class SpdMagnitudePruner(MagnitudeScores):
    """Prunes the smallest weights of each tensor, a few more at each mask; pruned ones never come back.

    The sparsity rises cubically over a dozen masks (Zhu and Gupta 2017). Biases stay dense.
    """

    name = "spd_magnitude"
    default_selection, default_policy = "tensor", "nested"
    schedule_option = "num_prune_epochs"
    state_shapes = {**MagnitudeScores.state_shapes, "schedule": (STEP,)}

    def check_options(self) -> None:
        super().check_options()
        self.config.check()
        require(self.config, "sparsity", lambda value: 0 <= value <= 1, "a removed ratio from 0 to 1")
        if self.config.sparsity == 0:
            raise HeadPruningError("--sparsity is 0, so nothing would be pruned; give a ratio such as 0.9.")
        if self.config.mask_frequency is not None:
            require(self.config, "mask_frequency", lambda value: value >= 1, "1 or more updates")

    def attach(self, session: SessionView) -> None:
        self.length = -1
        super().attach(session)

    def plan(self) -> None:
        config, session = self.config, self.session
        if self.length < 0:
            self.length = pruning_updates(config, session.total_steps, session.steps_per_epoch, self.name)
            wanted = round((config.num_prune_epochs or 0) * (session.steps_per_epoch or 0))
            if wanted > self.length and not config.published_schedule:
                logger.warning(
                    "the phase of pruning takes %d updates but training has %d: the target is reached by update %d; "
                    "lower --num-prune-epochs",
                    wanted,
                    session.total_steps,
                    self.length,
                )
        self.every = config.mask_frequency or max(1, self.length // _MASKS)
        # The published code loses the last mask where the frequency divides the length of the phase.
        self.masks = max(1, self.length // self.every)

    def _number(self, t: int) -> float:
        """How many masks are drawn by update ``t``."""
        last = self.length - 1 if self.config.published_schedule else max(self.length, self.every)
        return min(t, last) // self.every

    def density_at(self, t: int) -> float:
        final = self.config.sparsity
        # Written as the published code has it: a weight more or less hangs on the rounding.
        return 1.0 - (final + (0.0 - final) * (1.0 - min(1.0, self._number(t) / self.masks)) ** 3)

    def due(self, t: int) -> bool:
        return self._number(t) > self._number(t - 1)

    def final_at(self, t: int) -> bool:
        return self._number(t) >= self.masks

    def final_density(self) -> float:
        return 1.0 - self.config.sparsity

    def count_removed(self, density: float, number: int) -> int:
        """As many stay as the density says, as the published code counts them."""
        slack = 0.0 if self.config.published_schedule else _ROUNDING
        return number - int(number * density + slack)

    def threshold(self, name: str, score: torch.Tensor, k: int) -> torch.Tensor:
        """The smallest score that stays when ``k`` go; those that equal it stay too."""
        if k >= self.storage.sizes[name]:
            return torch.full((), math.inf, device=score.device)
        return self.storage.kth_smallest(score, k + 1)

    def state_dict(self) -> dict[str, np.ndarray]:
        # A resumed run keeps the schedule that it was started with.
        return {**super().state_dict(), "schedule": np.array([float(self.length)])}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        super().load_state_dict(state)
        self.length = int(state["schedule"][0])


def _asked_for(options: Any) -> bool:
    return options.sparsity > 0


register_pruner(
    name="spd_magnitude",
    config=SpdMagnitudeConfig,
    pruner=SpdMagnitudePruner,
    selected_by=_asked_for,
    example={"sparsity": 0.8, "mask_frequency": 2},
)
