"""Neural wirings: magnitude masks, and gradients that pass straight through them (Wortsman et al. 2019)."""

from __future__ import annotations

from ..errors import HeadPruningError
from ..registry import register_pruner
from .gradual_magnitude import EXAMPLE, GradualConfig, GradualMagnitudePruner


class NeuralWiringPruner(GradualMagnitudePruner):
    """Prunes as gradual_magnitude does, but trains pruned weights on as if they were there."""

    name = "neural_wiring"
    straight_through = True

    def check_options(self) -> None:
        super().check_options()
        if self.policy != "retained":
            raise HeadPruningError(
                f"--mask-policy {self.policy} trains no pruned weights on, which neural_wiring is about; drop it, or "
                "choose gradual_magnitude."
            )


register_pruner(name="neural_wiring", config=GradualConfig, pruner=NeuralWiringPruner, example=EXAMPLE)
