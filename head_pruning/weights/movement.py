"""Movement pruning: weights that training pulls towards zero go first (Sanh et al. 2020)."""

from __future__ import annotations

import torch

from ..registry import register_pruner
from .cubic import EXAMPLE, CubicConfig, CubicPruner
from .engine.portions import Portion, product


class MovementPruner(CubicPruner):
    """Prunes the weights of lowest accumulated minus weight * gradient, on PLATON's schedule."""

    name = "movement"
    needs_gradient = True
    signed = True
    kinds = ("movement",)

    def track(self, t: int, portion: Portion, gradients: list[torch.Tensor]) -> None:
        newest = portion.scratch()
        product(portion.values, gradients, out=newest)
        torch._foreach_sub_(portion.state["movement"], newest)

    def scores(self, portion: Portion) -> list[torch.Tensor]:
        scores = portion.scratch()
        torch._foreach_copy_(scores, portion.state["movement"])
        return scores


register_pruner(name="movement", config=CubicConfig, pruner=MovementPruner, example=EXAMPLE)
