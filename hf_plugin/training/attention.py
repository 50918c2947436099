"""Eager attention for methods that look at attention probabilities."""

from typing import Any, Callable

from torch import nn
from transformers import PreTrainedModel


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
