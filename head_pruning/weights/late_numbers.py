"""Two numbers of the last mask, read without waiting for the device."""

import math

import torch


class LateNumbers:
    """The threshold and the number of kept weights, as of the last mask whose numbers have arrived.

    Args:
        device: where :meth:`write` gets them from.
        last: what :meth:`read` gives before anything has arrived.
    """

    def __init__(self, device: torch.device, last: tuple[float, float] = (math.nan, math.nan)) -> None:
        self.last, self.device = last, device
        self._cuda = device.type == "cuda"
        self._host = torch.empty(2, dtype=torch.float64, pin_memory=self._cuda)
        self._event = None

    def write(self, threshold: torch.Tensor, kept: torch.Tensor) -> None:
        """Send two 0-dimensional tensors on their way."""
        self.read()
        self._host.copy_(torch.stack([threshold.double(), kept.double()]), non_blocking=True)
        if self._cuda:
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self.last = tuple(self._host.tolist())

    def read(self) -> tuple[float, float]:
        """The threshold and the number of kept weights."""
        if self._event is not None and self._event.query():
            self.last, self._event = tuple(self._host.tolist()), None
        return self.last
