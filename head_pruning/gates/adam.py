"""Adam for the few gate logits, in float64 numpy: no device work and no tie to the host's optimizer."""

from __future__ import annotations

import numpy as np


class GateAdam:
    """Adam with decoupled weight decay (Kingma and Ba 2015; epsilon added before bias correction, as fairseq does).

    Args:
        size: number of logits.
        betas: decay rates of the two moments.
        epsilon: added to the root of the second moment.
        weight_decay: each step first multiplies the logits by ``1 - weight_decay * lr``.
    """

    def __init__(
        self, size: int, betas: tuple[float, float], epsilon: float = 1e-8, weight_decay: float = 0.0
    ) -> None:
        self.betas = betas
        self.epsilon = epsilon
        self.weight_decay = weight_decay
        self.steps = 0
        self.first = np.zeros(size)
        self.second = np.zeros(size)

    def step(self, logits: np.ndarray, gradient: np.ndarray, lr: float) -> None:
        """Move ``logits`` in place by one step."""
        beta1, beta2 = self.betas
        self.steps += 1
        self.first *= beta1
        self.first += (1.0 - beta1) * gradient
        self.second *= beta2
        self.second += (1.0 - beta2) * gradient * gradient
        size = lr * np.sqrt(1.0 - beta2**self.steps) / (1.0 - beta1**self.steps)
        if self.weight_decay:
            logits *= 1.0 - self.weight_decay * lr
        logits -= size * self.first / (np.sqrt(self.second) + self.epsilon)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Moments and step count."""
        return {"first": self.first.copy(), "second": self.second.copy(), "steps": np.array([float(self.steps)])}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Restore :meth:`state_dict`. Raises ValueError when it is of another number of logits."""
        first, second = (np.array(state[name], dtype=np.float64) for name in ("first", "second"))
        if first.shape != self.first.shape or second.shape != self.second.shape:
            raise ValueError(f"moments of shape {first.shape} for {self.first.size} logits")
        self.first, self.second = first, second
        self.steps = int(state["steps"][0])
