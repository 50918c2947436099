"""What tensors hold that torchao quantized."""

from typing import Any, Mapping

import torch


def is_quantized(tensor: Any) -> bool:
    """Whether a tensor holds integers in a form of torchao's."""
    return hasattr(tensor, "tensor_data_names")


def parts(tensor: Any) -> dict[str, torch.Tensor]:
    """What of a quantized tensor is stored, by torchao's names: integers, scales, zero points."""
    names = [*tensor.tensor_data_names, *getattr(tensor, "optional_tensor_data_names", ())]
    return {name: part for name in names if (part := getattr(tensor, name)) is not None}


def entries(tensor: torch.Tensor) -> torch.Tensor:
    """What is zero where the tensor is: of a symmetrically quantized one its integers, of others themselves."""
    return parts(tensor)["qdata"] if is_quantized(tensor) else tensor.detach()


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes that a file of the tensor has, but for its header."""
    return sum(part.nbytes for part in parts(tensor).values()) if is_quantized(tensor) else tensor.nbytes


def flattened(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of plain tensors, in which quantized ones are in parts, named as transformers' files name them."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        holder, dot, last = name.rpartition(".")
        if is_quantized(tensor):
            found.update({f"{holder}{dot}_{last}_{part}": value for part, value in parts(tensor).items()})
        else:
            found[name] = tensor
    return found
