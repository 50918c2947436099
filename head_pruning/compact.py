"""The shape of a model whose heads are removed: applying a recipe to a model of the original shape.

This file imports nothing but torch: a copy of it travels with compact checkpoints, so that they load without the
package. A recipe is JSON::

    {"version": 1, "sites": {"encoder.layer.0.attention": {
        "heads": 12, "kept": [0, 7],
        "tensors": [["encoder.layer.0.attention.self.query.weight", 0, [[1, 64]]], ...],
        "counts": [["encoder.layer.0.attention.self.num_attention_heads", 1], ...],
        "select": [["encoder.layer.0.attention.self", "position_bias", 4, 1, false], ...],
        "empty": ["encoder.layer.0.attention.self", {...}]}}}

``kept`` are the heads that stay, numbered as in the original model. ``tensors``: name, dimension and the blocks that
the dimension is made of; ``[1, width]`` is so many slices of every head, head after head, ``[0, width]`` so many that
all heads share. ``counts``: attributes and
what each head adds to them. ``select``: arguments of a module's forward (name, position or null) whose dimension runs
over the original heads; true: it also runs over the examples, in front. ``empty``: the module that becomes a
:class:`NoHeads` when no head stays, and its options.
"""

from typing import Any, Mapping, Optional, Sequence

import torch
from torch import nn

VERSION = 1
ATTRIBUTE = "_removed_heads"  # a plain attribute of the model: its recipe


class Select:
    """Forward pre-hook: of one argument keep the slices of the heads that stay.

    Args:
        argument: its name.
        position: its position among the positional arguments, or None.
        dim: the dimension of the heads.
        folded: whether examples and heads share that dimension, examples first.
        heads: H of the original.
        kept: the heads that stay.
    """

    def __init__(
        self, argument: str, position: Optional[int], dim: int, folded: bool, heads: int, kept: Sequence[int]
    ) -> None:
        self.argument, self.position, self.dim, self.folded = argument, position, dim, folded
        self.heads, self.kept = heads, list(kept)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if kwargs.get(self.argument) is not None:
            kwargs = {**kwargs, self.argument: self.taken(kwargs[self.argument])}
        elif self.position is not None and len(args) > self.position and args[self.position] is not None:
            args = (*args[: self.position], self.taken(args[self.position]), *args[self.position + 1 :])
        return args, kwargs

    def taken(self, tensor: torch.Tensor) -> torch.Tensor:
        """The slices that stay; what is as wide as one head is shared by all."""
        if not isinstance(tensor, torch.Tensor) or tensor.shape[self.dim] == 1:
            return tensor
        index = torch.tensor(self.kept, device=tensor.device)
        if self.folded:
            whole = tensor.unflatten(self.dim, (-1, self.heads)).index_select(self.dim + 1, index)
            return whole.flatten(self.dim, self.dim + 1)
        return tensor.index_select(self.dim, index)


class NoHeads(nn.Module):
    """What attention without heads is: the output projection's bias, or, inside, nothing for it to read.

    An attention module becomes one by a change of its class; its attributes stay. Options (``_no_heads``):

    - ``out``: name of the output projection within the module; null: it is outside and gets an input of width 0.
    - ``after``: names of modules (dropout) that run on the output projection's output.
    - ``returns``: how many values the module returns (0: the bare tensor); all but the first are None.
    - ``drop``: names of its modules and parameters that are no longer needed.
    - ``cache``: whether it keeps keys and values, so that a cache counts its tokens.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The constant, in the shape of the first tensor given."""
        options: Mapping[str, Any] = self._no_heads
        given = (
            *args,
            *(kwargs[name] for name in ("hidden_states", "query", "x") if name in kwargs),
            *kwargs.values(),
        )
        hidden = next(value for value in given if isinstance(value, torch.Tensor))
        output = hidden.new_zeros(*hidden.shape[:-1], 0)
        if options.get("out"):
            output = self.get_submodule(options["out"])(output)
            for name in options.get("after", ()):
                output = self.get_submodule(name)(output)
        if options.get("cache"):
            count_tokens(self, hidden, kwargs)
        return (output, *[None] * (options["returns"] - 1)) if options["returns"] else output


def count_tokens(module: nn.Module, hidden: torch.Tensor, kwargs: Mapping[str, Any]) -> None:
    """Let a cache count the tokens of a layer that has no keys: positions are read off the length of its entries."""
    cache = kwargs.get("past_key_values", kwargs.get("past_key_value", kwargs.get("layer_past")))
    layer = getattr(module, "layer_idx", None)
    if cache is not None and layer is not None and hasattr(cache, "update"):
        nothing = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
        cache.update(nothing, nothing, layer)


def slices(blocks: Sequence[Sequence[int]], heads: int, kept: Sequence[int]) -> torch.Tensor:
    """Indices of what stays of a dimension that is made of ``blocks`` for ``heads`` heads."""
    found, start = [], 0
    for per_head, width in blocks:
        if not per_head:
            found.append(torch.arange(start, start + width))
            start += width
            continue
        rows = torch.arange(start, start + heads * width).view(heads, width)
        found.append(rows[list(kept)].flatten())
        start += heads * width
    return torch.cat(found) if found else torch.empty(0, dtype=torch.long)


def apply_recipe(model: nn.Module, recipe: Mapping[str, Any], before: Optional[Mapping[str, Any]] = None) -> nn.Module:
    """Cut a model's tensors in place, on any device ("meta" too).

    Args:
        model: of the original shape, or of the shape that ``before`` gave it.
        recipe: the heads that stay, see the top of the file.
        before: the recipe that was applied earlier; its kept heads are what the tensors hold.

    Raises:
        ValueError: the recipe is of another version, or names a module or sizes that the model does not have.
    """
    if recipe.get("version") != VERSION:
        raise ValueError(f"the recipe of removed heads is of version {recipe.get('version')}, not {VERSION}")
    cut: set[int] = set()
    for name, site in recipe["sites"].items():
        held = list(range(site["heads"]))
        if before is not None and name in before["sites"]:
            held = before["sites"][name]["kept"]
        if held == site["kept"]:
            if before is None:
                _adapt(model, site)
            continue
        position = {head: i for i, head in enumerate(held)}
        index = [position[head] for head in site["kept"]]
        for tensor, dim, blocks in site["tensors"]:
            _cut(model, tensor, dim, slices(blocks, len(held), index), _width(blocks, len(held)), cut)
        _adapt(model, site)
        if not site["kept"]:
            _silence(model, *site["empty"])
    setattr(model, ATTRIBUTE, recipe)
    return model


def _width(blocks: Sequence[Sequence[int]], heads: int) -> int:
    return sum(width * (heads if per_head else 1) for per_head, width in blocks)


def _cut(model: nn.Module, name: str, dim: int, index: torch.Tensor, width: int, cut: set[int]) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    tensor = getattr(owner, leaf)
    if id(tensor) in cut:  # shared with another site, and already cut
        return
    if tensor.shape[dim] != width:
        raise ValueError(f"{name} has {tensor.shape[dim]} slices where the recipe expects {width}")
    if tensor.is_meta:
        index = index.to("meta")
    new = tensor.detach().index_select(dim, index.to(tensor.device))
    if isinstance(tensor, nn.Parameter):
        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
    setattr(owner, leaf, new)
    cut.add(id(new))
    _sizes(owner)


def _sizes(owner: nn.Module) -> None:
    """Let a projection's attributes tell the size of its weight."""
    weight = getattr(owner, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return
    if hasattr(owner, "nf"):  # GPT-2's Conv1D
        owner.nf = weight.shape[1]
        if hasattr(owner, "nx"):
            owner.nx = weight.shape[0]
    elif hasattr(owner, "in_features"):
        owner.out_features, owner.in_features = weight.shape
    elif isinstance(owner, nn.Embedding):
        owner.embedding_dim = weight.shape[1]


def _silence(model: nn.Module, name: str, options: Mapping[str, Any]) -> None:
    """Make the module of a site without heads a :class:`NoHeads`, without its projections."""
    module = model.get_submodule(name)
    for gone in options["drop"]:
        parent, _, leaf = gone.rpartition(".")
        setattr(module.get_submodule(parent), leaf, None)
    module._no_heads = options
    module.__class__ = NoHeads


def _adapt(model: nn.Module, site: Mapping[str, Any]) -> None:
    """Set the attributes that count heads, and select from the arguments that have one slice per head."""
    for name, each in site.get("counts", ()):
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, each * len(site["kept"]))
    for name, argument, position, dim, folded in site.get("select", ()):
        module = model.get_submodule(name)
        hooks = module.__dict__.setdefault("_selects", {})
        if argument in hooks:
            hooks[argument].kept = list(site["kept"])
        else:
            hooks[argument] = Select(argument, position, dim, folded, site["heads"], site["kept"])
            module.register_forward_pre_hook(hooks[argument], with_kwargs=True)
