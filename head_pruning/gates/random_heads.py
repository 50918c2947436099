"""K random heads, fixed from the start: the baseline that any method must beat."""

from dataclasses import dataclass, field
from typing import Optional

import numpy as np

from ..errors import HeadPruningError
from ..registry import register_pruner
from .pruner import HeadCountConfig, HeadPruner
from .subset import hard_top_k


@dataclass
class RandomConfig(HeadCountConfig):
    """Options of the random baseline."""

    random_heads_seed: Optional[int] = field(
        default=None, metadata={"help": "seed of the draw of random heads; default: the seed of training"}
    )


class RandomPruner(HeadPruner):
    """Draws K heads once and trains the model with only them."""

    name = "random"

    def attach(self, session) -> None:
        if self.config.num_of_heads is None:
            raise HeadPruningError("random needs the number of heads to keep; add --num-of-heads K.")
        super().attach(session)
        seed = session.seed if self.config.random_heads_seed is None else self.config.random_heads_seed
        self.kept = hard_top_k(np.random.default_rng([seed, 2]).random(self.unit_map.num_heads), self.rounds)
        self.harden()

    def keep(self) -> np.ndarray:
        return self.kept

    def before_update(self, step: int) -> None:
        self.session.gates.set_fixed(self.kept)

    def metrics(self) -> dict[str, float]:
        return {"heads_kept": float(self.kept.sum())}

    def state_dict(self) -> dict[str, np.ndarray]:
        return {"kept": self.kept.astype(float)}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        if state["kept"].size != self.kept.size:
            raise HeadPruningError(
                f"The checkpoint has {state['kept'].size} heads but the model has {self.kept.size}; "
                "resume with the model that the run was started with."
            )
        self.kept = state["kept"].astype(bool)
        self.harden()


register_pruner(name="random", config=RandomConfig, pruner=RandomPruner)
