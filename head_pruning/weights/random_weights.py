"""Random masks on PLATON's schedule: the baseline that any score must beat."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Optional

import torch

from ..registry import register_pruner
from .cubic import EXAMPLE, CubicConfig, CubicPruner
from .engine.portions import Portion


@dataclass
class RandomWeightsConfig(CubicConfig):
    """Options of random masks."""

    random_weights_seed: Optional[int] = field(
        default=None, metadata={"help": "seed of the random masks of weights; default: the seed of training"}
    )


class RandomWeightsPruner(CubicPruner):
    """Prunes weights in a random order, fixed from the start."""

    name = "random_weights"

    def scores_moved(self, t: int) -> bool:
        return False

    def scores(self, portion: Portion) -> list[torch.Tensor]:
        """Drawn anew each time, always the same: from the seed, the parameter's name and the place in it."""
        seed = self.session.seed if self.config.random_weights_seed is None else self.config.random_weights_seed
        scores = portion.scratch()
        for (index, start, _), x in zip(portion.slots, scores):
            target = self.storage.active[index]
            first = self.storage.ranks.first(target.parameter) + start
            key = zlib.crc32(f"{seed} {target.name} {first}".encode())
            x.copy_(torch.rand(x.shape, generator=torch.Generator().manual_seed(key)))
        return scores


register_pruner(name="random_weights", config=RandomWeightsConfig, pruner=RandomWeightsPruner, example=EXAMPLE)
