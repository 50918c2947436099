"""Walking over many tensors in portions that fit the processor's cache, without copying them together."""

import threading
from typing import Optional, Sequence

import torch

# Elements per portion. On a CPU the temporaries of a portion stay in the cache; on a GPU few launches count more.
CPU_PORTION = 1 << 20
GPU_PORTION = 1 << 25
# A sample of about so many scores tells where a threshold lies to a few thousandths.
SAMPLE = 1 << 19


class Portion:
    """Row ranges of some of the tensors, all on one device, with temporaries of their shapes.

    Attributes:
        slots: (index of the tensor, first row, rows) of each range.
        values: the ranges of the weights.
        state: kind to the ranges of that state.
    """

    def __init__(self, slots: list[tuple[int, int, int]], shapes: list[torch.Size], scratch: dict) -> None:
        self.slots = slots
        self.values: list[torch.Tensor] = []
        self.state: dict[str, list[torch.Tensor]] = {}
        self._shapes, self._scratch = shapes, scratch
        self._views: dict[int, tuple[torch.Tensor, list[torch.Tensor]]] = {}

    @property
    def device(self) -> torch.device:
        """Where all of it lies."""
        return self.values[0].device

    def cut(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """This portion's ranges of tensors of the same shapes."""
        return [
            tensors[index] if length == tensors[index].shape[0] else tensors[index].narrow(0, start, length)
            for index, start, length in self.slots
        ]

    def scratch(self, number: int = 0) -> list[torch.Tensor]:
        """float32 temporaries; the thread's next call with the same ``number``, by any portion, reuses the memory."""
        key = self.device, number, threading.get_ident()
        if number not in self._views or self._views[number][0] is not self._scratch.get(key):
            need = sum(shape.numel() for shape in self._shapes)
            if key not in self._scratch or self._scratch[key].numel() < need:
                self._scratch[key] = torch.empty(need, dtype=torch.float32, device=self.device)
            parts = self._scratch[key][:need].split([shape.numel() for shape in self._shapes])
            self._views[number] = self._scratch[key], [part.view(s) for part, s in zip(parts, self._shapes)]
        return list(self._views[number][1])


def cut_into_portions(tensors: Sequence[torch.Tensor], *, whole: bool = False) -> list[Portion]:
    """Portions that cover the tensors; with ``whole`` one per tensor, uncut. ``values`` and ``state`` are empty."""
    groups: list[tuple[list, list]] = []
    scratch: dict = {}
    room, device = 0, None
    for index, tensor in enumerate(tensors):
        limit = CPU_PORTION if tensor.device.type == "cpu" else GPU_PORTION
        rows, width = tensor.shape[0], tensor[0].numel()
        step = rows if whole else max(1, min(rows, limit // max(1, width)))
        for start in range(0, rows, step):
            length = min(step, rows - start)
            if whole or length * width > room or device != tensor.device:
                groups.append(([], []))
                room, device = limit, tensor.device
            groups[-1][0].append((index, start, length))
            groups[-1][1].append(torch.Size((length, *tensor.shape[1:])))
            room -= length * width
    return [Portion(slots, shapes, scratch) for slots, shapes in groups]


def sample_portion(values: Sequence[torch.Tensor], state: dict[str, list[torch.Tensor]]) -> Optional[Portion]:
    """A portion of evenly spread weights of all tensors; None where memory is not laid out for it."""
    every = [*values, *(tensor for tensors in state.values() for tensor in tensors)]
    if not all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in every):
        return None
    # An odd stride meets all columns of matrices whose width is a power of two times a small number.
    stride = (sum(tensor.numel() for tensor in values) // SAMPLE) | 1
    views = [tensor.view(-1)[::stride] for tensor in values]
    portion = Portion([], [view.shape for view in views], {})
    portion.values = views
    portion.state = {kind: [tensor.view(-1)[::stride] for tensor in tensors] for kind, tensors in state.items()}
    return portion


def product(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor], out: Sequence[torch.Tensor]) -> None:
    """``out = left * right`` in float32, whatever the precision of the factors."""
    if out[0].device.type == "cpu":
        for a, b, x in zip(left, right, out):
            if a.dtype == b.dtype == torch.float32:
                torch.mul(a, b, out=x)
            else:
                x.copy_(a).mul_(b)
    else:
        torch._foreach_copy_(list(out), list(left))
        torch._foreach_mul_(list(out), list(right))
