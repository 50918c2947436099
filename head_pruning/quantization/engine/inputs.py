"""Fake quantization of what goes into a linear layer."""

from __future__ import annotations

import math
from typing import Any, Callable, Optional, Sequence

import torch
from torch import nn

#: Of a new value in the moving averages of a range, as in the published code.
AVERAGING = 0.01
LEVELS = 255  # the largest of uint8


class QuantizedInput(nn.Module):
    """Fake quantization of a layer's inputs, and the moving average of their range (Zafrir et al. 2019, section 3).

    The average moves while the layer trains, in each forward; between :func:`begin_update` and :func:`end_update` it
    moves once: each micro-batch is quantized by the average that it alone would move, and the one that stays was moved
    by the range of all of them. It is what a runtime without ranges of its own computes with. Its buffers go where the
    layer goes, in float32 also where that is made half precision, and are not in any state dict: pruners keep their
    state themselves.

    Args:
        per_token: quantizes each token by its own range; None: all of them by the average.

    Attributes:
        enabled: whether inputs are quantized, and the average moves.
        seen: whether there is an average yet; before, it quantizes nothing.
        seen_before: whether there was one as the update began.
        moved: whether a micro-batch of this update moved the average; None: between updates.
        several: whether more than one did.
    """

    low: torch.Tensor
    high: torch.Tensor
    start_low: torch.Tensor
    start_high: torch.Tensor
    least: torch.Tensor
    most: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    on: torch.Tensor
    off: torch.Tensor

    def __init__(self, per_token: Optional[nn.Module] = None) -> None:
        super().__init__()
        self.per_token = per_token
        self.enabled = self.seen = self.seen_before = self.several = False
        self.moved: Optional[bool] = None
        start = {
            "low": torch.tensor(math.inf),
            "high": torch.tensor(-math.inf),
            "start_low": torch.tensor(math.inf),  # as the update began
            "start_high": torch.tensor(-math.inf),
            "least": torch.tensor(math.inf),  # of the micro-batches before this one
            "most": torch.tensor(-math.inf),
            "scale": torch.zeros(1),
            "zero_point": torch.zeros(1, dtype=torch.int32),
            "off": torch.zeros(1, dtype=torch.int64),
            "on": torch.ones(1, dtype=torch.int64),
        }
        for name, value in start.items():
            self.register_buffer(name, value, persistent=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedInput:
        """Follow the layer to a device, not to a type of numbers."""

        def moved(buffer: torch.Tensor) -> torch.Tensor:
            found = fn(buffer)
            return found if found.dtype == buffer.dtype else buffer.to(found.device)

        return super()._apply(moved, recurse)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` as 8 bits can tell it; the gradient passes where they reach (straight-through)."""
        if not self.enabled:
            return x
        observe = self.training and not _computed_again()
        if observe:
            self.seen = True
            self._count()
        if self.per_token is None:
            return self._averaged(x, self.on if observe else self.off).to(x.dtype) if self.seen else x
        if observe:
            with torch.no_grad():
                self._averaged(x, self.on)
        return self.per_token(x)

    def _count(self) -> None:
        """Another micro-batch of an update moves the average from where the update began, too."""
        if self.moved:
            self.several = True
            self._gather()
            self.low.copy_(self.start_low)
            self.high.copy_(self.start_high)
        if self.moved is not None:
            self.moved = True

    def _gather(self) -> None:
        self.least.copy_(torch.minimum(self.least, self.low))
        self.most.copy_(torch.maximum(self.most, self.high))

    def _averaged(self, x: torch.Tensor, observe: torch.Tensor) -> torch.Tensor:
        return self._fused(x.float(), observe, AVERAGING)

    def _fused(self, x: torch.Tensor, observe: torch.Tensor, averaging: float) -> torch.Tensor:
        state = (self.low, self.high, self.scale, self.zero_point)
        return torch.fused_moving_avg_obs_fake_quant(
            x, observe, self.on, *state, averaging, 0, LEVELS, -1, False, False
        )

    def _take(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Go on from this range, unless it is that of no micro-batch, or of one that overflowed."""
        low, high = low.to(self.low.device), high.to(self.high.device)
        known = low.isfinite() & high.isfinite()
        self._settle(torch.where(known, low, self.start_low), torch.where(known, high, self.start_high))

    def _settle(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """The update is over, and this is the range."""
        self._close()
        self.low.copy_(low)
        self.high.copy_(high)
        if self.seen:
            self._fused(self.low.new_zeros(1), self.on, 0.0)  # scale and zero point follow; the range moves by nothing

    def _close(self) -> None:
        self.moved, self.several = None, False
        self.least.fill_(math.inf)
        self.most.fill_(-math.inf)

    def _undo(self) -> None:
        self.seen = self.seen_before
        self._settle(self.start_low, self.start_high)
        if not self.seen:
            self.scale.zero_()
            self.zero_point.zero_()

    def state(self) -> list[float]:
        """Range, scale and zero point; zeros before the first input. Waits for the device."""
        found = torch.stack([self.low, self.high, self.scale[0], self.zero_point[0].float()]).tolist()
        return found if math.isfinite(found[0]) else [0.0] * 4

    @torch.no_grad()
    def load(self, state: list[float]) -> None:
        """Restore :meth:`state`; zeros: be as before the first input. An update that goes on is over."""
        self._close()
        self.seen = bool(state[2])
        low, high, scale, zero_point = state if self.seen else (math.inf, -math.inf, 0.0, 0.0)
        for buffer, value in ((self.low, low), (self.high, high), (self.scale, scale), (self.zero_point, zero_point)):
            buffer.fill_(value)


@torch.no_grad()
def begin_update(inputs: Sequence[QuantizedInput]) -> None:
    """Until :func:`end_update` forwards are micro-batches of one update."""
    if any(each.moved for each in inputs):  # an update that came to no end
        undo_update(inputs)
    torch._foreach_copy_([each.start_low for each in inputs], [each.low for each in inputs])
    torch._foreach_copy_([each.start_high for each in inputs], [each.high for each in inputs])
    for each in inputs:
        each.moved, each.seen_before = False, each.seen


@torch.no_grad()
def end_update(inputs: Sequence[QuantizedInput], over_ranks: Optional[Callable[[torch.Tensor], Any]] = None) -> None:
    """Move the averages by the range of all micro-batches of the update, also of other ranks; nothing is waited for.

    Averages move the further the farther a value is away, so the outermost of the averages that single micro-batches
    moved is the one that all of them together move. One micro-batch of one rank has done it already.

    Args:
        inputs: in the same order on all ranks.
        over_ranks: takes the greatest of each value over the ranks, in place.
    """
    several = over_ranks is not None or any(each.several for each in inputs)
    if several:
        for each in inputs:
            if each.moved:
                each._gather()
        place = inputs[0].low.device
        found = torch.stack([value.to(place) for each in inputs for value in (-each.least, each.most)])
        if over_ranks is not None:
            over_ranks(found)
        for each, (low, high) in zip(inputs, found.unflatten(0, (-1, 2)).unbind()):
            each._take(-low, high)
    for each in inputs:
        each.moved, each.several = None, False


@torch.no_grad()
def undo_update(inputs: Sequence[QuantizedInput]) -> None:
    """Be as :func:`begin_update` found them, also after :func:`end_update`; nothing is waited for."""
    for each in inputs:
        each._undo()


def _computed_again() -> bool:
    """Whether this is the second time, within the backward pass, of what gradient checkpointing did not keep."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
