"""Files of pruned weights: masks of one bit per weight, a compressed model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Mapping, Optional, Sequence

import numpy as np
import torch

from ..compact.shapes import Whole
from ..errors import HeadPruningError, one_line
from ..files import atomic_path, parse_json, read_safetensors, sort_metadata
from ..masks import HeadMask
from ..schedules import count_of

COMPRESSED_FILE = "model.compressed.safetensors"
_MASK, _VALUES = "mask.", "values."
_SHAPES = {str: [Whole()]}  # parameter name to the shape of its tensor
_INTEGERS = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}  # bytes of a value to the integer of its size


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """A boolean tensor as ``uint8[ceil(n / 8)]`` on the CPU, row-major, the first weight in the highest bit."""
    return torch.from_numpy(np.packbits(mask.detach().cpu().contiguous().numpy().reshape(-1)))


def unpack_mask(packed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The inverse of :func:`pack_mask`. Raises HeadPruningError when the number of bits does not fit the shape."""
    number = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.numel() != (number + 7) // 8:
        raise HeadPruningError(
            f"A packed mask of {packed.numel()} bytes does not fit a tensor of shape {list(shape)}; use masks made "
            "for this model."
        )
    bits = np.unpackbits(packed.cpu().numpy().reshape(-1), count=number)
    return torch.from_numpy(bits.view(np.bool_)).view(*shape)


def save_weight_masks(
    path: "str | Path", masks: Mapping[str, torch.Tensor], head_mask: Optional[HeadMask] = None
) -> None:
    """Write masks, packed, to a safetensors file, atomically; a head mask goes into the same file.

    ``HeadMask.load`` reads the head mask of such a file, :func:`load_weight_masks` the others.
    """
    from safetensors.torch import save_file

    tensors = {f"weights.{name}": pack_mask(mask) for name, mask in masks.items()}
    metadata = {"weight_shapes": json.dumps({name: list(mask.shape) for name, mask in masks.items()})}
    if head_mask is not None:
        for name, keep in head_mask.by_site().items():
            tensors[f"heads.{name}"] = torch.tensor(keep, dtype=torch.uint8)
        metadata["unit_map"] = json.dumps(head_mask.unit_map.to_dict())
    with atomic_path(path) as temporary:
        save_file(tensors, str(temporary), metadata)
        sort_metadata(temporary)


def load_weight_masks(path: "str | Path") -> dict[str, torch.Tensor]:
    """Parameter name to boolean mask. Raises HeadPruningError when the file is missing, damaged or of another kind."""
    tensors, metadata = read_safetensors(path, "pt")
    try:
        shapes = parse_json(metadata["weight_shapes"], _SHAPES)
        return {name: unpack_mask(tensors[f"weights.{name}"], shape) for name, shape in shapes.items()}
    except (KeyError, ValueError) as error:
        raise HeadPruningError(
            f"{path} holds no weight masks ({one_line(error)}); use those of a pruned model."
        ) from error


def save_compressed(path: "str | Path", state: Mapping[str, torch.Tensor], *, min_sparsity: float = 0.25) -> None:
    """Write tensors to a safetensors file without their zeros, atomically.

    A tensor of floats or int8 with at least ``min_sparsity`` zeros becomes a packed mask and its other values, in
    row-major order: at 10 % density 0.131 of its float32 size, 0.225 of its int8 size. Other tensors are written as
    they are. Nothing is rounded: :func:`load_compressed` gives the same bits.
    """
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    shapes: dict[str, list[int]] = {}
    written: dict[tuple, str] = {}
    aliases: dict[str, str] = {}
    storages: set[int] = set()
    for name, tensor in state.items():
        memory = tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if tensor.numel() and memory in written:  # one tensor under two names, such as a tied output layer
            aliases[name] = written[memory]
            continue
        written[memory] = name
        tensor = tensor.detach().cpu().contiguous()
        bits = (
            tensor.view(getattr(torch, _INTEGERS[tensor.element_size()]))
            if (tensor.is_floating_point() or tensor.dtype is torch.int8) and tensor.dim()
            else None
        )
        keep = None if bits is None else bits != 0  # of the bits: -0.0 is a value
        if keep is None or int(torch.count_nonzero(keep)) > count_of(1.0 - min_sparsity, keep.numel()):
            storage = tensor.untyped_storage().data_ptr()
            tensors[name] = tensor.clone() if storage in storages else tensor  # safetensors refuses what overlaps
            storages.add(storage)
        else:
            shapes[name] = list(tensor.shape)
            tensors[_MASK + name] = pack_mask(keep)
            tensors[_VALUES + name] = tensor[keep]
    metadata = {"compressed": json.dumps(shapes), "aliases": json.dumps(aliases), "format": "pt"}
    with atomic_path(path) as temporary:
        save_file(tensors, str(temporary), metadata)
        sort_metadata(temporary)


def load_compressed(path: "str | Path") -> dict[str, torch.Tensor]:
    """The dense tensors of a file of :func:`save_compressed`. Raises HeadPruningError when it is none."""
    tensors, metadata = read_safetensors(path, "pt")
    try:
        shapes = parse_json(metadata["compressed"], _SHAPES)
        aliases = parse_json(metadata["aliases"], {str: str})
        state = {
            name: _expanded(tensors.pop(_MASK + name), tensors.pop(_VALUES + name), shapes[name]) for name in shapes
        }
        state.update(tensors)
        state.update({name: state[other] for name, other in aliases.items()})
    except (KeyError, ValueError) as error:
        raise HeadPruningError(
            f"{path} is no compressed model ({one_line(error)}); export the model again."
        ) from error
    return state


def _expanded(packed: torch.Tensor, values: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A dense tensor, of its packed mask and the values there. Raises ValueError unless they fit each other."""
    keep = unpack_mask(packed, shape)
    if values.dim() != 1 or len(values) != int(torch.count_nonzero(keep)):
        raise ValueError(f"{list(values.shape)} values for a mask of {int(torch.count_nonzero(keep))}")
    dense = torch.zeros(tuple(shape), dtype=values.dtype)
    dense[keep] = values
    return dense
