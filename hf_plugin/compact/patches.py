"""What transformers has no place to plug in for: each patch is one function, :func:`install` puts them on, once."""

import copy
import functools
from typing import Any, Callable

from transformers import PreTrainedConfig
from transformers.models.auto import auto_factory, modeling_auto
from transformers.quantizers.base import HfQuantizer

from head_pruning import HeadPruningError
from head_pruning.surgery.remaining import recipe_of


def install(mark_compact: Callable[[Any], None]) -> None:
    """Patch transformers; a second call does nothing.

    Args:
        mark_compact: gives a model that was cut the class of compact models.
    """
    if getattr(HfQuantizer.preprocess_model, "cuts_heads", False):
        return
    _cut_before_quantizing()
    _mark_after_quantizing(mark_compact)
    _cut_what_configs_make(mark_compact)


def _cut_before_quantizing() -> None:
    """Compact models that are quantized, too: their config keeps the recipe beside what the quantizer reads."""
    original = HfQuantizer.preprocess_model

    @functools.wraps(original)
    def preprocess_model(self: HfQuantizer, model: Any, *args: Any, **options: Any) -> Any:
        from .model_classes import METHOD, RECIPE, take_recipe

        if hasattr(model.config, RECIPE) and self.quantization_config.quant_method != METHOD:  # ours cuts by itself
            remove_heads(model, take_recipe(model.config))
        return original(self, model, *args, **options)

    preprocess_model.cuts_heads = True
    HfQuantizer.preprocess_model = preprocess_model


def _mark_after_quantizing(mark_compact: Callable[[Any], None]) -> None:
    """And they are saved as what they are."""
    original = HfQuantizer.postprocess_model

    @functools.wraps(original)
    def postprocess_model(self: HfQuantizer, model: Any, *args: Any, **options: Any) -> Any:
        result = original(self, model, *args, **options)
        mark_compact(model)
        return result

    HfQuantizer.postprocess_model = postprocess_model


def _cut_what_configs_make(mark_compact: Callable[[Any], None]) -> None:
    """``AutoModel*.from_config`` of a compact model's config gives a compact model, with new weights."""
    for auto in vars(modeling_auto).values():  # each has a function of its own
        if isinstance(auto, type) and issubclass(auto, auto_factory._BaseAutoModelClass):
            auto.from_config = classmethod(_cutting(auto.from_config.__func__, mark_compact))


def _cutting(original: Callable, mark_compact: Callable[[Any], None]) -> Callable:
    @functools.wraps(original)
    def from_config(cls: type, config: Any, **options: Any) -> Any:
        from .model_classes import take_recipe

        recipe = take_recipe(copy.deepcopy(config)) if isinstance(config, PreTrainedConfig) else None
        if recipe is None:
            return original(cls, config, **options)
        model = original(cls, copy.deepcopy(config), **options)
        if recipe_of(model) is None:  # remote code has cut it already
            take_recipe(model.config)
            remove_heads(model, recipe)
            mark_compact(model)
        return model

    return from_config


def remove_heads(model: Any, recipe: Any) -> None:
    """Cut a model on its way to the shape that ``recipe`` says. Raises HeadPruningError if that does not fit."""
    from .model_classes import remove

    try:
        remove(model, recipe)
    except ValueError as error:
        raise HeadPruningError(str(error)) from error
