"""Folders of quantized models, which ``from_pretrained`` loads where torchao is installed."""

import contextlib
from typing import Any, Iterator

from torch import nn
from transformers import PreTrainedModel

from head_pruning import PruningSession
from head_pruning.quantization.engine.linears import base_config, quantized_linears


@contextlib.contextmanager
def stored_form(model: nn.Module, session: PruningSession) -> Iterator[None]:
    """Inside the block ``save_pretrained`` writes the outcome of a session: of a quantized model its integers.

    Args:
        model: the session's.
        session: hardened.
    """
    with session.stored(), _told_quantized(model):
        yield


@contextlib.contextmanager
def _told_quantized(model: nn.Module) -> Iterator[None]:
    """Inside the block transformers knows of a model's quantized layers."""
    layers = quantized_linears(model)
    if not layers or not isinstance(model, PreTrainedModel):
        yield
        return
    from transformers import TorchAoConfig
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

    others = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in layers]
    told: Any = TorchAoConfig(base_config(), modules_to_not_convert=others)
    model.config.quantization_config = told
    model.hf_quantizer = TorchAoHfQuantizer(told, pre_quantized=True)
    try:
        yield
    finally:
        del model.config.quantization_config, model.hf_quantizer


@contextlib.contextmanager
def only_evaluated(model: nn.Module) -> Iterator[None]:
    """Inside the block a Trainer may be built on a quantized model, which it refuses, also where it will not train."""
    marked = vars(model).pop("is_quantized", None)
    try:
        yield
    finally:
        if marked is not None:
            model.is_quantized = marked
