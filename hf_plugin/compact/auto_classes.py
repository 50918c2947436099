"""``AutoModel*.from_config`` of a compact model's config gives a compact model with new weights, once this is loaded.

transformers would build the dense model, without a word, as it does of the config of any quantized one.
"""

import copy
import functools
from typing import Any, Callable

from transformers.models.auto import auto_factory, modeling_auto

from head_pruning.surgery.remaining import recipe_of


def _cutting(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def from_config(cls: type, config: Any, **options: Any) -> Any:
        from .model_classes import take_recipe
        from .quantizer import mark_compact, remove_heads

        recipe = take_recipe(copy.deepcopy(config))
        if recipe is None:
            return original(cls, config, **options)
        model = original(cls, copy.deepcopy(config), **options)
        if recipe_of(model) is None:  # remote code has cut it already
            take_recipe(model.config)
            remove_heads(model, recipe)
            mark_compact(model)
        return model

    return from_config


for _auto in vars(modeling_auto).values():  # each has a function of its own
    if isinstance(_auto, type) and issubclass(_auto, auto_factory._BaseAutoModelClass):
        _auto.from_config = classmethod(_cutting(_auto.from_config.__func__))  # type: ignore[attr-defined]
