"""Eager attention for methods that look at attention probabilities."""

import inspect
from typing import Any, Callable

from torch import nn
from transformers import PreTrainedModel

from head_pruning import UnitMap

_FLAG = "output_attentions"


def switch_to_eager(model: nn.Module) -> Callable[[], None]:
    """Have every model of transformers in ``model`` compute its attention eagerly; returns what switches it back.

    Other implementations never hold the probabilities. Which one a model has is in its config, which its modules
    share, and its masks are built for it: so it is switched for the whole model.
    """
    outermost: list[tuple[PreTrainedModel, Any]] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and id(module) not in inside:
            inside.update(id(inner) for inner in module.modules())
            before = {name: getattr(module.config, name) for name in getattr(module.config, "sub_configs", {})}
            before = {name: found._attn_implementation for name, found in before.items() if found is not None}
            outermost.append((module, {"": module.config._attn_implementation, **before}))
            module.set_attn_implementation("eager")

    def switch_back() -> None:
        for module, before in outermost:
            module.set_attn_implementation(before)

    return switch_back


def ask_for_probabilities(model: nn.Module, unit_map: UnitMap) -> Callable[[], None]:
    """Have attention modules give their probabilities that do so only when they are told to (DeBERTa, MPNet).

    Their callers are not told, so what the model gives stays as it is. Returns what takes it back.
    """
    modules = [model.get_submodule(site.name) for site in unit_map.attention]
    asked = [module for module in modules if _FLAG in inspect.signature(module.forward).parameters]
    handles = [module.register_forward_pre_hook(_ask, with_kwargs=True) for module in asked]

    def take_back() -> None:
        for handle in handles:
            handle.remove()

    return take_back


def _ask(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    place = list(inspect.signature(module.forward).parameters).index(_FLAG)
    if place < len(args):
        return (*args[:place], True, *args[place + 1 :]), kwargs
    return args, {**kwargs, _FLAG: True}
