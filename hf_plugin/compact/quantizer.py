"""Compact models load with ``AutoModel*.from_pretrained``, as quantized ones do, once this file is imported.

transformers looks the ``quant_method`` of a checkpoint's config up in its quantizers; ours is called ``head_pruning``.
It gives the model its smaller shape before the weights are read. Nothing of the loaded model is quantized.
"""

import copy
import functools
import sys
from typing import Any, Callable, Mapping, Optional, cast

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from head_pruning import HeadPruningError
from head_pruning.quantization.engine.linears import quantized_linears
from head_pruning.surgery.remaining import recipe_of

METHOD = "head_pruning"


@register_quantization_config(METHOD)
class HeadPruningConfig(QuantizationConfigMixin):
    """What ``config.json`` says of removed heads.

    Args:
        recipe: see :mod:`head_pruning.compact`.
    """

    def __init__(self, recipe: Optional[Mapping[str, Any]] = None, **unused: Any) -> None:
        self.quant_method = METHOD
        self.recipe = recipe


@register_quantizer(METHOD)
class HeadPruningQuantizer(HfQuantizer):
    """Cuts a model on the meta device to the shape of the checkpoint, and leaves no trace of quantization."""

    requires_calibration = False
    is_trainable = True
    is_qat_trainable = True
    is_compileable = True

    def is_serializable(self, *args: Any, **options: Any) -> bool:
        """Whether the loaded model can be saved: yes."""
        return True

    def validate_environment(self, *args: Any, **options: Any) -> None:
        """Raises HeadPruningError when the config was given by hand, to cut a dense checkpoint while it loads."""
        if not self.pre_quantized:
            raise HeadPruningError(
                "Heads cannot be removed while a checkpoint loads; load it, and remove them with "
                "head_pruning.surgery.remove_heads."
            )

    def _process_model_before_weight_loading(self, model: nn.Module, **options: Any) -> None:
        remove_heads(model, self.quantization_config.recipe)

    def _process_model_after_weight_loading(self, model: nn.Module, **options: Any) -> None:
        from transformers import PreTrainedModel

        self.remove_quantization_config(model)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                vars(module.config).pop("_is_quantized", None)
        mark_compact(model)


def mark_compact(model: nn.Module) -> None:
    """Let ``save_pretrained`` and ``push_to_hub`` of a model whose heads are removed write a folder that loads.

    The model's class becomes a subclass of what it was, of the same name, see
    :mod:`hf_plugin.compact.model_classes`. Nothing happens to models that are not of transformers or have all of
    their heads.
    """
    from transformers import PreTrainedModel

    from .model_classes import compact_class, take_recipe

    if not isinstance(model, PreTrainedModel):
        return
    take_recipe(model.config)
    if recipe_of(model) is None:
        return
    model.__class__ = compact_class(type(model))
    # transformers looks up by the class's name which modules' outputs are hidden states and attentions.
    for home in ("transformers.utils.output_capturing", "transformers.utils.generic"):
        registry = getattr(sys.modules.get(home), "_CAN_RECORD_REGISTRY", None)
        if registry is not None:
            dict.__setitem__(registry, str(type(model)), model._can_record_outputs)


def dense_twin(model: nn.Module) -> nn.Module:
    """A compact model's original, without weights (on the meta device)."""
    base = getattr(type(model), "dense_class", type(model))
    with torch.device("meta"):
        return base(copy.deepcopy(model.config))


def remove_heads(model: nn.Module, recipe: Any) -> None:
    """Cut a model on its way to the shape that ``recipe`` says. Raises HeadPruningError if it is not its own."""
    from .model_classes import remove

    try:
        remove(cast(Any, model), recipe)
    except ValueError as error:
        raise HeadPruningError(str(error)) from error


def _cut_before(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of compact models that are quantized, too, the config keeps the recipe beside what their quantizer reads."""

    @functools.wraps(original)
    def preprocess_model(self: HfQuantizer, model: Any, *args: Any, **options: Any) -> Any:
        from .model_classes import RECIPE, take_recipe

        if hasattr(model.config, RECIPE) and not isinstance(self, HeadPruningQuantizer):
            remove_heads(model, take_recipe(model.config))
        return original(self, model, *args, **options)

    return preprocess_model


def _mark_after(original: Callable[..., Any]) -> Callable[..., Any]:
    """And they are saved as what they are."""

    @functools.wraps(original)
    def postprocess_model(self: HfQuantizer, model: Any, *args: Any, **options: Any) -> Any:
        result = original(self, model, *args, **options)
        mark_compact(model)
        _keep_in_parts(model)
        return result

    return postprocess_model


def _keep_in_parts(model: Any) -> None:
    """Let a model with 8-bit weights be saved once more.

    transformers undoes the conversions of loading when it saves, and raises at torchao's, which has no way back; but
    torchao's tensors are in parts again by then.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions and quantized_linears(model):
        from transformers.integrations.torchao import TorchAoDeserialize

        def joins(conversion: Any) -> bool:
            return any(isinstance(each, TorchAoDeserialize) for each in getattr(conversion, "operations", ()))

        model._weight_conversions = [each for each in conversions if not joins(each)]


# No quantizer but ours knows of recipes, and transformers calls no other place between building and loading a model.
HfQuantizer.preprocess_model = _cut_before(HfQuantizer.preprocess_model)
HfQuantizer.postprocess_model = _mark_after(HfQuantizer.postprocess_model)
