"""Making every MultiheadAttention call its output projection, so that gates on it fire, and give its probabilities."""

from typing import Any, Callable, Mapping, Optional

import numpy as np
import torch
from fairseq.modules import MultiheadAttention
from torch import nn

from head_pruning import HeadMask


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


def uniform_weights(like: torch.Tensor, sizes: tuple[int, int, int], padding: Optional[torch.Tensor]) -> torch.Tensor:
    """What attention without heads gives for its weights: every key that is no padding has the same.

    Args:
        like: a tensor of the weights' type, on their device.
        sizes: batch, queries and keys.
        padding: ``[B, S]``, true for padding.

    Returns:
        ``[1, B, T, S]``, as of one head.
    """
    batch, length, keys = sizes
    weights = like.new_ones(batch, keys)
    if padding is not None:
        weights.masked_fill_(padding.to(torch.bool), 0)
    return (weights / weights.sum(1, keepdim=True))[None, :, None].repeat(1, 1, length, 1)


class KeptHeadsShown:
    """Has a model under a fixed mask give the attention weights that it would give with its other heads cut out.

    fairseq's alignments (``--print-alignment``, ``--replace-unk``) are means of them over all heads of the last layer.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handles: list = []
        #: The names of the modules that have no head left.
        self.blind: set[str] = set()

    def attach(self, mask: HeadMask) -> None:
        """Watch every module that has lost heads."""
        self.blind = {name for name, keep in mask.by_site().items() if not any(keep)}
        for name, keep in mask.by_site().items():
            if not all(keep):
                module = self._model.get_submodule(name)
                kept = _Kept(np.flatnonzero(keep).tolist())
                self._handles.append(module.register_forward_pre_hook(kept.ask, with_kwargs=True))
                self._handles.append(module.register_forward_hook(kept.give, with_kwargs=True))

    def detach(self) -> None:
        """Watch no more."""
        self.blind = set()
        while self._handles:
            self._handles.pop().remove()


class _Kept:
    """Hooks of one module; ``heads`` are those that stay."""

    def __init__(self, heads: list[int]) -> None:
        self.heads = torch.tensor(heads, dtype=torch.int64)

    def ask(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Ask for the weights of each head; ``need_weights`` then tells whether they were asked for by head."""
        by_head, wanted = bool(kwargs.get("need_head_weights")), bool(kwargs.get("need_weights", True))
        if not (by_head or wanted) or kwargs.get("before_softmax"):
            return args, kwargs
        return args, {**kwargs, "need_head_weights": True, "need_weights": by_head}

    def give(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any], output: Any) -> Any:
        """Leave the removed heads out of ``[H, B, T, S]``."""
        if not kwargs.get("need_head_weights") or kwargs.get("before_softmax") or output[1] is None:
            return output
        weights = output[1]
        self.heads = self.heads.to(weights.device)
        if len(self.heads):
            weights = weights.index_select(0, self.heads)
        else:
            weights = uniform_weights(weights, tuple(weights.shape[1:]), kwargs.get("key_padding_mask"))
        return output[0], weights if kwargs.get("need_weights") else weights.mean(0)
