"""Exact K-subsets: hard samples of the conditional Bernoulli, whose covariance is the gradient (SIMPLE)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..registry import register_pruner
from .base import HeadGateConfig, HeadGatePruner, UnitsConfig
from .engine.conditional_bernoulli import ConditionalBernoulli
from .falling_count import CountConfig
from .own_fall import OwnFall


@dataclass
class SubsetConfig(CountConfig, UnitsConfig, HeadGateConfig):
    """Options of exact subsets."""


class SubsetPruner(OwnFall, HeadGatePruner):
    """Draws exactly as many heads as are open, hard, with the exact gradient of the mean; settles on K early.

    p(z) is proportional to exp(logits.z) over the masks z of K(t) heads (Ahmed et al. 2023, section 4): training runs
    with a draw z, the logits get Cov(z) dL/dz. There is no temperature. Where groups have a minimum, it is drawn
    first, group after group, and the others from what is left; each draw then has the gradient that it has given the
    ones before. When K(t) has come down to K, the K highest logits stay, and the model trains on with them. By default
    it falls over the first 0.4 of training, 0.9 where the model is not trained; where training begins from nothing
    over the first 0.1, and every kind of attention keeps a head if K allows (:class:`OwnFall`).
    """

    name = "subset"
    inherits = False
    trained_fall = "0:0.4"
    learns_gates = OwnFall.learns_gates  # no longer than it chooses
    state_shapes = {**HeadGatePruner.state_shapes, **OwnFall.state_shapes}

    def check_options(self) -> None:
        self.require_count()
        super().check_options()

    def initial_logits(self, generator: np.random.Generator) -> np.ndarray:
        return np.zeros(self.unit_map.num_heads)

    def before_update(self, step: int) -> None:
        self.move_to(step)
        if self.final is None and self.fallen(step):
            self.stay()
        super().before_update(step)

    def draw(self, step: int) -> np.ndarray:
        generator = np.random.default_rng([self.session.seed, 1, step])
        taken, self._stages = ~self.alive, []
        for support, count in self.open_rounds(step).stages():
            where = np.flatnonzero(~taken) if support is None else support[~taken[support]]
            stage = ConditionalBernoulli(self.logits[where], count)
            self._stages.append((where, stage))
            taken[where[stage.sample(generator)]] = True
        return (taken & self.alive).astype(np.float64)

    def chain(self, gradient: np.ndarray) -> np.ndarray:
        chained = np.zeros_like(gradient)
        if sum(stage.keep for _, stage in self._stages) == self.alive.sum():
            return chained  # all are open, in whichever order they were drawn
        for where, stage in self._stages:
            chained[where] += stage.covariance_times(gradient[where])
        return chained


register_pruner(
    name="subset",
    config=SubsetConfig,
    pruner=SubsetPruner,
    example={"num_of_heads": 4, "joint_pruning": True, "count_schedule": "0:0.5"},
)
