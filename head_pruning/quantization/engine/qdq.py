"""Quantized layers as the operators that runtimes look for: quantize, dequantize, multiply (QDQ)."""

from typing import Mapping, Sequence

import torch
import torch.ao.quantization.fx._decomposed  # noqa: F401 (registers torch.ops.quantized_decomposed)
from torch import nn

from ...errors import HeadPruningError
from .inputs import LEVELS
from .linears import quantized_linears, replace
from .tensors import parts


class QdqLinear(nn.Module):
    """A linear layer of integers, whose inputs are quantized by one range, as fixed when it was trained.

    torch computes it in floats; ``torch.onnx.export`` makes QuantizeLinear and DequantizeLinear of it.

    Args:
        layer: a layer of torchao's int8 weights, one symmetric scale per output.
        scale: of its inputs.
        zero_point: the uint8 that stands for 0.
    """

    def __init__(self, layer: nn.Linear, scale: float, zero_point: int) -> None:
        super().__init__()
        held = parts(layer.weight)
        self.input_scale, self.input_zero_point = scale, zero_point
        # [inputs, outputs], so that the product needs no transposition, which would hide the integers from runtimes.
        self.register_buffer("integers", held["qdata"].t().contiguous())
        self.register_buffer("scales", held["scale"].flatten())
        self.register_buffer("zeros", torch.zeros_like(held["scale"].flatten(), dtype=torch.int8))
        self.bias = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As ``nn.Linear``."""
        ops = torch.ops.quantized_decomposed
        form = (self.input_scale, self.input_zero_point, 0, LEVELS, torch.uint8)
        x = ops.dequantize_per_tensor(ops.quantize_per_tensor(x, *form), *form)
        weight = ops.dequantize_per_channel(self.integers, self.scales, self.zeros, 1, -128, 127, torch.int8)
        product = x @ weight
        return product if self.bias is None else product + self.bias


def to_qdq(model: nn.Module, inputs: Mapping[str, Sequence[float]]) -> int:
    """Put :class:`QdqLinear` in the place of a model's quantized layers; returns their number.

    Args:
        model: with int8 layers.
        inputs: layer name to scale and zero point of its inputs (:func:`~.files.read_ranges`).

    Raises:
        HeadPruningError: no layer holds integers, or a layer had no inputs in training.
    """
    layers = quantized_linears(model)
    if not layers:
        raise HeadPruningError("The model holds no 8-bit weights; train it with --do-quantization first.")
    unknown = next((name for name in layers if name not in inputs), None)
    if unknown is not None:
        raise HeadPruningError(
            f"The range of the inputs of {unknown} is not known, as it had none in training; leave it out there with "
            "--not-to-quantize."
        )
    for name, layer in layers.items():
        scale, zero_point = inputs[name]
        replace(model, name, QdqLinear(layer, float(scale), int(zero_point)))
    return len(layers)


def dequantize(model: nn.Module) -> None:
    """Give quantized layers float weights again, of the same values; their inputs are not rounded any more."""
    for layer in quantized_linears(model).values():
        layer.weight = nn.Parameter(layer.weight.dequantize(), requires_grad=False)
