"""Making every MultiheadAttention call its output projection, so that gates on it fire, and give its probabilities."""

from typing import Any, Callable, Mapping, Optional

import torch
from fairseq.modules import MultiheadAttention
from torch import nn


def additive_masks(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple, Mapping[str, Any]]:
    """Forward pre-hook: turn a boolean attention mask into one that can be added.

    fairseq's own attention path adds the mask; its fused path takes booleans too. The value is finite, so that a row
    with every key masked gives numbers.
    """
    mask: Optional[torch.Tensor] = kwargs.get("attn_mask")
    if mask is None or mask.dtype != torch.bool:
        return args, kwargs
    return args, {**kwargs, "attn_mask": additive(mask, args[0].dtype if args else kwargs["query"].dtype)}


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask (True: not attended to) as numbers to add."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, torch.finfo(dtype).min / 2)


class UnfusedAttention:
    """Switches fairseq's fused attention path off, and back on.

    The fused path hands the output projection's weight to a functional call, past any hook. ``skip_embed_dim_check``
    makes fairseq take its own path, with the same results and the same draws of dropout.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [module for module in model.modules() if isinstance(module, MultiheadAttention)]
        self._before: list[bool] = []
        self._handles: list = []

    def attach(self) -> None:
        """Take fairseq's own path."""
        self._before = [module.skip_embed_dim_check for module in self._modules]
        for module in self._modules:
            module._set_skip_embed_dim_check()
            self._handles.append(module.register_forward_pre_hook(additive_masks, with_kwargs=True))

    def detach(self) -> None:
        """Restore what was before."""
        for module, before in zip(self._modules, self._before):
            module.skip_embed_dim_check = before
        for handle in self._handles:
            handle.remove()
        self._before, self._handles = [], []


def give_probabilities(model: nn.Module, *, in_evaluation: bool = False) -> Callable[[], None]:
    """Have every attention module, in training (or always), give the probabilities of each head.

    fairseq's own path has them anyway; see :class:`UnfusedAttention`. Returns what undoes it.
    """
    modules = [module for module in model.modules() if isinstance(module, MultiheadAttention)]
    ask = _ask_for_weights if in_evaluation else _ask_in_training
    handles = [module.register_forward_pre_hook(ask, with_kwargs=True) for module in modules]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


def _ask_for_weights(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple, Mapping[str, Any]]:
    """Forward pre-hook."""
    return args, {**kwargs, "need_weights": True, "need_head_weights": True}


def _ask_in_training(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple, Mapping[str, Any]]:
    """Forward pre-hook."""
    return _ask_for_weights(module, args, kwargs) if module.training else (args, kwargs)


def probabilities(output: Any) -> Optional[torch.Tensor]:
    """``[B, H, T, S]`` in what an attention module gives, whose weights are ``[H, B, T, S]``."""
    weights = output[1]
    return weights.transpose(0, 1) if weights is not None and weights.dim() == 4 else None
