"""Removing heads of fairseq models for good: which tensors belong to a head, and attention with fewer heads.

A compact model holds no gates and no hooks. What was cut is its recipe (see :mod:`head_pruning.compact`), which its
state dict carries, so that a freshly built model takes its shape when it loads one.
"""

import json
from typing import Any, Mapping, Optional

import torch
from fairseq.modules import MultiheadAttention
from fairseq.modules.sparse_multihead_attention import SparseMultiheadAttention
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from head_pruning import FeedForwardSite, HeadPruningError
from head_pruning.compact import check_recipe
from head_pruning.compact.recipe import apply_recipe
from head_pruning.files import parse_json
from head_pruning.surgery.plans import SitePlan, unit_plan
from head_pruning.surgery.remaining import recipe_of
from head_pruning.unit_map import Site

from .attention import additive, uniform_weights

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class CompactAttention(MultiheadAttention):
    """Attention whose heads are narrower, together, than the model.

    A MultiheadAttention becomes one by a change of its class. Decoding step by step, and whoever asks for attention
    weights, takes fairseq's own path. The rest cannot take torch's fused function, which derives the heads' width from
    the model's, and calls scaled_dot_product_attention itself.
    """

    def forward(
        self,
        query: torch.Tensor,
        key: Optional[torch.Tensor],
        value: Optional[torch.Tensor],
        key_padding_mask: Optional[torch.Tensor] = None,
        incremental_state: Optional[dict] = None,
        need_weights: bool = True,
        static_kv: bool = False,
        attn_mask: Optional[torch.Tensor] = None,
        before_softmax: bool = False,
        need_head_weights: bool = False,
    ) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """As the base class: ``[T, B, C]`` and the weights, averaged over the heads that are left, or None."""
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = additive(attn_mask, query.dtype)
        if (
            incremental_state is not None
            or need_weights
            or need_head_weights
            or before_softmax
            or key is None
            or self.add_zero_attn
            or self.onnx_trace
        ):
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                incremental_state,
                need_weights,
                static_kv,
                attn_mask,
                before_softmax,
                need_head_weights,
            )
        return self._fused(query, key, value, key_padding_mask, attn_mask), None

    def _fused(self, query, key, value, key_padding_mask, attn_mask) -> torch.Tensor:
        length, batch, _ = query.shape
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if self.bias_k is not None:
            k, v, key_padding_mask, attn_mask = self._add_bias(k, v, key_padding_mask, attn_mask, batch)
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).permute(1, 2, 0, 3) for x in (q, k, v))
        mask = None if attn_mask is None else attn_mask.to(q.dtype)
        if key_padding_mask is not None:
            padding = key_padding_mask.to(torch.bool)[:, None, None, :]
            mask = ~padding if mask is None else mask.masked_fill(padding, float("-inf"))
        drops = self.training or self.dropout_module.apply_during_inference
        output = scaled_dot_product_attention(q, k, v, mask, self.dropout_module.p if drops else 0.0)
        return self.out_proj(output.permute(2, 0, 1, 3).reshape(length, batch, self.embed_dim))


class NoHeads(MultiheadAttention):
    """Attention without heads: the output projection's bias, at every position, whatever the input.

    It keeps nothing while decoding. Asked for attention weights (the last decoder layer always is), it gives every
    source token that is no padding the same.
    """

    def forward(
        self,
        query: torch.Tensor,
        key: Optional[torch.Tensor] = None,
        value: Optional[torch.Tensor] = None,
        key_padding_mask: Optional[torch.Tensor] = None,
        incremental_state: Optional[dict] = None,
        need_weights: bool = True,
        static_kv: bool = False,
        attn_mask: Optional[torch.Tensor] = None,
        before_softmax: bool = False,
        need_head_weights: bool = False,
    ) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """As the base class: the constant as ``[T, B, C]``, and uniform weights or None."""
        bias = self.out_proj.bias
        if bias is None:
            output = torch.zeros_like(query)
        else:
            bias = bias if torch.is_grad_enabled() else bias.detach()  # a view of a parameter would claim a gradient
            output = bias.expand(*query.shape[:2], -1)
        if not (need_weights or need_head_weights) or key is None:
            return output, None
        weights = uniform_weights(query, (query.shape[1], query.shape[0], key.shape[0]), key_padding_mask)
        return output, weights if need_head_weights else weights[0]

    def reorder_incremental_state(self, incremental_state: Optional[dict], new_order: torch.Tensor) -> Optional[dict]:
        """Nothing was kept."""
        return incremental_state


def plan_site(model: nn.Module, site: Site) -> SitePlan:
    """What belongs to the heads of one MultiheadAttention, or to the units of one feed-forward block.

    ``model`` may also be a tree of modules that hold nothing but the tensors of a checkpoint.
    """
    if isinstance(site, FeedForwardSite):
        return unit_plan(model, site)
    module = model.get_submodule(site.name)
    rows: tuple[tuple[int, int], ...] = ((1, site.head_dim),)
    tensors = [(f"{site.out_proj}.weight", 1, rows)]
    for part in _PROJECTIONS:
        projection = module.get_submodule(part)
        tensors.append((f"{site.name}.{part}.weight", 0, rows))
        if getattr(projection, "bias", None) is not None:
            tensors.append((f"{site.name}.{part}.bias", 0, rows))
    extra = [name for name in ("bias_k", "bias_v") if getattr(module, name, None) is not None]
    tensors += [(f"{site.name}.{name}", 2, rows) for name in extra]
    return SitePlan(
        tuple(tensors),
        counts=((f"{site.name}.num_heads", 1), (f"{site.name}.embed_dim", site.head_dim)),
        empty=(site.name, {"drop": [*_PROJECTIONS, "out_proj.weight", *extra]}),
        refuse=_refusal(module),
    )


def _refusal(module: nn.Module) -> str:
    if not isinstance(module, MultiheadAttention):
        return ""
    if type(module) not in (MultiheadAttention, SparseMultiheadAttention, CompactAttention):
        return f"its class {type(module).__name__} may lay out its heads otherwise"
    return "it runs on xFormers" if module.use_xformers else ""


def adapt(model: nn.Module) -> None:
    """Give the cut attention modules of a model the class that computes with the heads they have left."""
    recipe = recipe_of(model)
    attention = [site["name"] for site in recipe["unit_map"]["attention"]] if recipe else []
    for name in attention:
        if recipe is None or name not in recipe["sites"]:
            continue
        module: Any = model.get_submodule(name)
        module.skip_embed_dim_check = True
        if module.q_proj is None:
            module.num_heads = module.embed_dim = 0
            module.__class__ = NoHeads
        elif type(module) is MultiheadAttention:
            module.__class__ = CompactAttention


def take_shape(model: nn.Module, recipe: Optional[Mapping[str, Any]]) -> None:
    """Cut a freshly built model, or one with more heads, to the shape of a checkpoint with this recipe.

    Raises:
        HeadPruningError: the model has fewer heads than the checkpoint, or is of another architecture.
    """
    mine = recipe_of(model)
    if recipe == mine:
        return
    wanted = {} if recipe is None else recipe["sites"]
    for name, site in ({} if mine is None else mine["sites"]).items():
        if not set(wanted[name]["kept"] if name in wanted else range(site["heads"])) <= set(site["kept"]):
            raise HeadPruningError(
                f"The model has fewer heads in {name} than the checkpoint, which cannot be put back; load it into a "
                "newly built model."
            )
    if recipe is None:  # neither has fewer heads than it was built with
        return
    try:
        with torch.no_grad():
            apply_recipe(model, recipe, mine)
        adapt(model)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise HeadPruningError(
            f"The compact checkpoint belongs to another architecture ({error}); use the model it was made for."
        ) from error


def encode(recipe: Mapping[str, Any]) -> torch.Tensor:
    """A recipe as a tensor of its bytes."""
    return torch.tensor(list(json.dumps(recipe).encode()), dtype=torch.int32)


def decode(tensor: torch.Tensor) -> dict:
    """What :func:`encode` was given. Raises ValueError when it is damaged."""
    return dict(check_recipe(parse_json(bytes(tensor.tolist()), dict)))
