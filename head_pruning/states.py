"""What comes out of a checkpoint's pruning state: finite numbers in their range, or a sentence on what is not."""

from __future__ import annotations

from typing import Any, Mapping

import numpy as np
import torch

from .compact.shapes import LARGEST, conform
from .errors import HeadPruningError, one_line

_CURE = "resume from another checkpoint, or start from the model alone"


def checked_entry(name: str, value: Any, shape: Any = None) -> np.ndarray:
    """An entry of a session's state as float64.

    Args:
        name: of the entry.
        value: an array, or what becomes one.
        shape: what it must be (:mod:`head_pruning.compact.shapes`); None: finite numbers, as many as there are.

    Raises:
        HeadPruningError: it is something else.
    """
    try:
        array = np.asarray(value, dtype=np.float64)
        if shape is not None:
            if array.ndim != 1:
                raise ValueError(f"it has the shape {list(array.shape)}")
            conform([int(x) if x.is_integer() else x for x in array.tolist()], shape, "it")
        elif not (np.abs(array) <= LARGEST).all():
            raise ValueError(f"it has numbers that are not finite, or above {LARGEST:g}")
    except (TypeError, ValueError, OverflowError) as error:
        raise HeadPruningError(
            f"The checkpoint's pruning state is damaged: {name} cannot be ({one_line(error):.200}); {_CURE}."
        ) from error
    return array


def check_tensors(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise HeadPruningError, naming it, where a tensor of a pruning state has numbers that cannot be."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided or tensor.is_complex():
            reason = "it is no plain tensor"
        elif tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            reason = f"it claims the shape {list(tensor.shape)} without the numbers"
        elif tensor.is_floating_point() and tensor.numel():
            low, high = torch.aminmax(tensor.detach())
            if low >= -LARGEST and high <= LARGEST or not (tensor.dim() or low.isnan()):
                continue  # neither holds of NaN; a threshold may be infinite
            reason = f"it has numbers that are not finite, or above {LARGEST:g}"
        else:
            continue
        raise HeadPruningError(f"The checkpoint's pruning state is damaged: {name} cannot be ({reason}); {_CURE}.")
