"""Heads and units by the size of their weights: those of the smallest mean squares go, before training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..pruner import SessionView
from ..registry import register_pruner
from .base import BudgetConfig, HeadPruner
from .fixed_heads import RankedPruner


@dataclass
class UnitMagnitudeConfig(BudgetConfig):
    """Options of heads and units by magnitude."""


class UnitMagnitudePruner(RankedPruner):
    """Keeps the heads and units with the largest mean squared weights and trains the model with only them.

    A mean, since a head has many times the weights of a feed-forward unit, and costs as many times as much.
    """

    name = "unit_magnitude"
    needs_trained_model = True

    def attach(self, session: SessionView) -> None:
        if session.weights_come_later:
            HeadPruner.attach(self, session)
            self.first(np.zeros(self.unit_map.num_heads))  # whether the budget buys anything: told before training
            self.kept, self._settled = np.ones(self.unit_map.num_heads, dtype=bool), False
        else:
            super().attach(session)
            self._settled = True

    def chosen(self) -> np.ndarray:
        from ..surgery.per_unit import mean_squares  # executes torch, which listing methods does not need

        return self.first(mean_squares(self.session.model, self.unit_map))

    def before_update(self, step: int) -> None:
        if not self._settled:
            self.kept, self._settled = self.chosen(), True
            self.harden()
        super().before_update(step)

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        super().load_state_dict(state)
        self._settled = True

    def goes_on(self, kept: np.ndarray) -> bool:
        # The weights were others at the start, and so may be the number that a budget of MACs bought.
        return not self._settled or self.config.keep_macs is not None or kept.sum() == self.kept.sum()


register_pruner(
    name="unit_magnitude",
    config=UnitMagnitudeConfig,
    pruner=UnitMagnitudePruner,
    example={"num_of_heads": 4},
)
