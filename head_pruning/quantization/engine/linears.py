"""Linear layers in torchao's forms: fake-quantized to train, int8 to store."""

from __future__ import annotations

import contextlib
import re
from typing import Any, Iterator, Mapping, Optional, Sequence

import torch
from torch import nn

from ...errors import HeadPruningError
from .inputs import QuantizedInput
from .tensors import is_quantized

NEEDS_TORCHAO = "torchao is needed for this; install it: pip install 'head-pruning[int8]'."
CURE_OF_INTEGERS = (
    "which can be evaluated, but not trained or pruned; start from the model in floats that they were made from, and "
    "quantize that in training (--do-quantization)."
)
_NUMBERS = (torch.float32, torch.bfloat16, torch.float16)  # that torchao fake-quantizes
# Hooks of a module, which go with its name and not with the object in its place.
_HOOKS = [name for name in vars(nn.Module()) if name.endswith(("_hooks", "_hooks_with_kwargs", "_always_called"))]


def base_config() -> Any:
    """torchao's scheme: a symmetric int8 scale per output channel, inputs per token, asymmetric.

    Raises:
        HeadPruningError: torchao is not installed.
    """
    try:
        from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerAxis
    except ImportError as error:
        raise HeadPruningError(NEEDS_TORCHAO) from error
    return Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0))


def quantized_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers of the model whose weights hold integers."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return {name: module for name, module in found if is_quantized(module.weight)}


def refuse_integers(model: nn.Module) -> None:
    """Raise HeadPruningError if the model is stored with 8-bit weights, which nothing can train or mask."""
    found = next(iter(quantized_linears(model)), None)
    if found is not None:
        raise HeadPruningError(f"The model's weights are 8-bit integers ({found}.weight), {CURE_OF_INTEGERS}")


def is_fake_quantized(model: nn.Module) -> bool:
    """Whether the model is in training to be quantized."""
    return any(hasattr(module, "weight_fake_quantizer") for module in model.modules())


def find_linears(model: nn.Module, leave: Optional[str]) -> dict[str, nn.Linear]:
    """The linear layers to quantize: not those with shared weights or none, nor subclasses, which compute otherwise.

    A layer that stands in two places shares its weights with itself; torchao refuses those of a single input.

    Args:
        model: the model.
        leave: regular expression of names to leave out.

    Raises:
        HeadPruningError: the weights of one are of a type that cannot be quantized in training.
    """
    owners: dict[int, int] = {}
    standing = (child for module in model.modules() for child in module._modules.values() if child is not None)
    for module in (model, *standing):
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and type(module.weight.data) is torch.Tensor
        and module.weight.numel()
        and module.weight.shape[-1] > 1
        and owners[id(module.weight)] == 1
        and not (leave and re.search(leave, name))
    }
    for name, layer in found.items():
        if layer.weight.dtype not in _NUMBERS:
            raise HeadPruningError(
                f"The weights of {name} are {str(layer.weight.dtype).removeprefix('torch.')}, which cannot be trained "
                "for 8 bits; convert the model first (model.float()), or leave the layer out with --not-to-quantize."
            )
    return found


def prepare(model: nn.Module, names: Sequence[str], *, averaged: bool) -> None:
    """Put fake-quantized layers in the place of those named; they have the same parameters and hooks.

    Args:
        model: the model.
        names: of layers of :func:`find_linears`.
        averaged: whether inputs are quantized by the moving average of their range; else each token by its own.
    """
    _swap(model, names, "prepare")
    for name in names:
        layer: Any = model.get_submodule(name)
        per_token = None if averaged else layer.activation_fake_quantizer
        layer.activation_fake_quantizer = QuantizedInput(per_token).to(layer.weight.device).train(layer.training)


@contextlib.contextmanager
def stored(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Inside the block the weights of the fake-quantized layers are int8."""
    layers = {name: model.get_submodule(name) for name in names}
    _swap(model, names, "convert")
    try:
        yield
    finally:
        put_back(model, layers)


def put_back(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Set submodules by name; each stays in training or evaluation as the one that it replaces."""
    for name, layer in layers.items():
        replace(model, name, layer)


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of another, whose hooks and mode it takes over."""
    holder, _, last = name.rpartition(".")
    old = model.get_submodule(name)
    _take_over(layer, old)
    setattr(model.get_submodule(holder), last, layer)


def _take_over(layer: nn.Module, old: nn.Module) -> None:
    for hooks in _HOOKS:
        setattr(layer, hooks, getattr(old, hooks))  # the same dictionary, so that handles go on to work
    layer.train(old.training)


def _swap(model: nn.Module, names: Sequence[str], step: str) -> None:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    before, wanted = {name: model.get_submodule(name) for name in names}, set(names)
    places = {parameter.device for parameter in model.parameters()}
    drawn_on = [place for place in places if place.type == "cuda"]
    with torch.random.fork_rng(devices=drawn_on):  # new layers are drawn before they get their weights
        quantize_(model, QATConfig(base_config(), step=step), filter_fn=lambda module, name: name in wanted)
    for name, old in before.items():
        _take_over(model.get_submodule(name), old)
