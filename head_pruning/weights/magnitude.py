"""Pruning by magnitude, on PLATON's schedule."""

from __future__ import annotations

import torch

from ..registry import register_pruner
from .base import WeightPruner
from .cubic import EXAMPLE, CubicConfig, CubicPruner
from .engine.portions import Portion


class MagnitudeScores(WeightPruner):
    """Scores weights by their magnitude."""

    def scores(self, portion: Portion) -> list[torch.Tensor]:
        scores = portion.scratch()
        for value, x in zip(portion.values, scores):
            x.copy_(value).abs_()
        return scores


class MagnitudePruner(MagnitudeScores, CubicPruner):
    """Prunes the weights of smallest magnitude on PLATON's schedule."""

    name = "magnitude"


register_pruner(name="magnitude", config=CubicConfig, pruner=MagnitudePruner, example=EXAMPLE)
