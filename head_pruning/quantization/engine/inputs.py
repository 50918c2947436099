"""Fake quantization of what goes into a linear layer."""

from __future__ import annotations

import math
from typing import Optional

import torch
from torch import nn

#: Of a new value in the moving averages of a range, as in the published code.
AVERAGING = 0.01
LEVELS = 255  # the largest of uint8


class QuantizedInput(nn.Module):
    """Fake quantization of a layer's inputs, and the moving average of their range (Zafrir et al. 2019, section 3).

    The average moves while the layer trains. It is what a runtime without ranges of its own computes with. Its
    buffers go where the layer goes, and are not in any state dict: pruners keep their state themselves.

    Args:
        per_token: quantizes each token by its own range; None: all of them by the average.

    Attributes:
        enabled: whether inputs are quantized, and the average moves.
        seen: whether there is an average yet; before, it quantizes nothing.
    """

    low: torch.Tensor
    high: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    on: torch.Tensor
    off: torch.Tensor

    def __init__(self, per_token: Optional[nn.Module] = None) -> None:
        super().__init__()
        self.per_token = per_token
        self.enabled = self.seen = False
        start = {
            "low": torch.tensor(math.inf),
            "high": torch.tensor(-math.inf),
            "scale": torch.zeros(1),
            "zero_point": torch.zeros(1, dtype=torch.int32),
            "off": torch.zeros(1, dtype=torch.int64),
            "on": torch.ones(1, dtype=torch.int64),
        }
        for name, value in start.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` as 8 bits can tell it; the gradient passes where they reach (straight-through)."""
        if not self.enabled:
            return x
        observe = self.training and not _computed_again()
        if observe:
            self.seen = True
        if self.per_token is None:
            return self._averaged(x, self.on if observe else self.off).to(x.dtype) if self.seen else x
        if observe:
            with torch.no_grad():
                self._averaged(x, self.on)
        return self.per_token(x)

    def _averaged(self, x: torch.Tensor, observe: torch.Tensor) -> torch.Tensor:
        state = (self.low, self.high, self.scale, self.zero_point)
        return torch.fused_moving_avg_obs_fake_quant(
            x.float(), observe, self.on, *state, AVERAGING, 0, LEVELS, -1, False, False
        )

    def state(self) -> list[float]:
        """Range, scale and zero point; zeros before the first input. Waits for the device."""
        found = torch.stack([self.low, self.high, self.scale[0], self.zero_point[0].float()]).tolist()
        return found if math.isfinite(found[0]) else [0.0] * 4

    @torch.no_grad()
    def load(self, state: list[float]) -> None:
        """Restore :meth:`state`."""
        self.seen = bool(state[2])
        low, high, scale, zero_point = state if self.seen else (math.inf, -math.inf, 0.0, 0.0)
        for buffer, value in ((self.low, low), (self.high, high), (self.scale, scale), (self.zero_point, zero_point)):
            buffer.fill_(value)


def _computed_again() -> bool:
    """Whether this is the second time, within the backward pass, of what gradient checkpointing did not keep."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
