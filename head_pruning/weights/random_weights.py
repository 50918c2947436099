"""Random masks on PLATON's schedule: the baseline that any score must beat."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Optional

import torch

from ..registry import register_pruner
from .cubic import EXAMPLE, CubicConfig, CubicPruner
from .engine.portions import Portion
from .engine.targets import Target

# Weights drawn at once, where there is one threshold over all. Runs that were stored on a CPU go on with the draws of
# this number.
_DRAWN = 1 << 20


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
        scores = portion.scratch()
        for (index, start, length), x in zip(portion.slots, scores):
            target = self.storage.active[index]
            first = self.storage.ranks.first(target.parameter) + start
            rows = self._rows(target.parameter)
            for block in range(first // rows * rows, first + length, rows):
                drawn = self._draw(target, block)
                begin, end = max(first, block), min(first + length, block + len(drawn))
                x[begin - first : end - first] = drawn[begin - block : end - block]
        return scores

    def _rows(self, parameter: torch.Tensor) -> int:
        """How many rows are drawn at once, however the tensor is cut into portions."""
        rows, width = parameter.shape[0], parameter.shape[1:].numel()
        return max(1, rows if self.selection.scope != "global" else min(rows, _DRAWN // max(1, width)))

    def _draw(self, target: Target, first: int) -> torch.Tensor:
        """The rows from ``first`` on that are drawn at once."""
        seed = self.session.seed if self.config.random_weights_seed is None else self.config.random_weights_seed
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {target.name} {first}".encode()))
        shape = target.parameter.shape
        number = min(self._rows(target.parameter), shape[0] - first)
        return torch.rand((number, *shape[1:]), generator=generator, dtype=torch.float32)


register_pruner(name="random_weights", config=RandomWeightsConfig, pruner=RandomWeightsPruner, example=EXAMPLE)
