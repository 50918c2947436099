"""The shape of a model whose heads are removed: applying a recipe to a model of the original shape.

A recipe is JSON::

    {"version": 2, "unit_map": {...}, "sites": {"encoder.layer.0.attention": {
        "heads": 12, "kept": [0, 7],
        "tensors": [["encoder.layer.0.attention.self.query.weight", 0, [[1, 64]]], ...],
        "counts": [["encoder.layer.0.attention.self.num_attention_heads", 1], ...],
        "hooks": [["select", "encoder.layer.0.attention.self", {"argument": "position_bias", ...}], ...],
        "empty": ["encoder.layer.0.attention.self", {...}]}}}

``kept`` are the heads that stay, numbered as in the original model, whose sites ``unit_map`` lists. ``tensors``: name,
dimension and the blocks that the dimension is made of; ``[1, width]`` is so many slices of every head, head after
head, ``[1, width, first, end]`` of the heads from ``first`` to before ``end`` only, ``[0, width]`` so many that all
heads share; ``[2, width]`` is so many slices of every query head, where query heads share keys (``per_group`` of them
each). ``counts``: attributes and what each head adds to them, or with ``"queries"`` each query head; a last
``config.`` is the module's own view of its configuration. ``hooks``: see :data:`HOOKS`. ``empty``: what is left when
no head stays: a module that becomes :class:`NoHeads` and its options; without options, the output projection of a site
that keeps the head ``dummy`` then, whose output counts as zero. ``queries``, where heads are groups that lost single
query heads: the query heads that stay; ``expanded``: keys and values are repeated, one for each of them.
"""

import copy
from typing import Any, Mapping, Optional

import torch
from torch import nn

from .hooks import HOOK_ATTRIBUTE, HOOKS, Arrange
from .no_heads import ConfigView, NoHeads, of_this_version
from .shapes import conform
from .slices import held_heads, held_queries, stays, was

VERSION = 2
# The versions of recipes. In the first no module that makes a position bias can lose all heads, and no projection with
# heads stays whole.
READABLE = (1, 2)
ATTRIBUTE = "_removed_heads"  # a plain attribute of the model: its recipe


def apply_recipe(model: nn.Module, recipe: Mapping[str, Any], before: Optional[Mapping[str, Any]] = None) -> nn.Module:
    """Cut a model's tensors in place, on any device ("meta" too).

    Args:
        model: of the original shape, or of the shape that ``before`` gave it.
        recipe: the heads that stay, see the top of the file.
        before: the recipe that was applied earlier; its kept heads are what the tensors hold.

    Raises:
        ValueError: the recipe is of another version, or names a module or sizes that the model does not have.
    """
    if recipe.get("version") not in READABLE:
        known = " or ".join(map(str, READABLE))
        raise ValueError(f"the recipe of removed heads is of version {recipe.get('version')}, not {known}")
    if before is None:
        for unit in recipe["unit_map"]["attention"]:
            _check_width(model.get_submodule(unit["out_proj"]), unit)
    done: dict[tuple, tuple] = {}
    for name, site in recipe["sites"].items():
        earlier = before["sites"].get(name) if before is not None else None
        if earlier == site:
            continue
        if earlier is not None and earlier.get("expanded"):
            raise ValueError(f"nothing more can be cut out of {name}, whose keys and values are repeated")
        for tensor, dim, blocks in site["tensors"]:
            _check_size(model, tensor, dim, was(site, earlier, blocks))
            _cut(model, tensor, dim, stays(site, earlier, blocks), done)
        _adapt(model, site)
    setattr(model, ATTRIBUTE, copy.deepcopy(dict(recipe)))
    return model


def input_width(layer: Any) -> Any:
    """How many numbers a layer reads (Linear and Conv1D); None where it does not say."""
    return layer.weight.shape[0] if hasattr(layer, "nf") else getattr(layer, "in_features", None)


def _check_width(out: Any, unit: Mapping[str, Any]) -> None:
    """Raise ValueError unless an output projection reads what a site's heads make."""
    width = input_width(out)
    if width not in (None, unit["heads"] * unit["head_dim"]):
        raise ValueError(
            f"{unit['out_proj']} reads {width} slices where the recipe expects {unit['heads']} heads of "
            f"{unit['head_dim']}"
        )


def _check_size(model: nn.Module, name: str, dim: int, width: int) -> None:
    """Raise ValueError unless a tensor has so many slices: nothing is made of a size that only the recipe claims."""
    found = get_tensor(model, name).shape[dim]
    if found != width:
        raise ValueError(f"{name} has {found} slices where the recipe expects {width}")


def get_tensor(model: nn.Module, name: str) -> torch.Tensor:
    """The parameter or buffer of this dotted name."""
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


def _cut(model: nn.Module, name: str, dim: int, index: list[int], done: dict[tuple, tuple]) -> None:
    path, _, leaf = name.rpartition(".")
    owner, tensor = model.get_submodule(path), get_tensor(model, name)
    if index == list(range(tensor.shape[dim])):
        return
    key = (id(tensor), dim, tuple(index))
    if key not in done:  # tied weights stay tied
        new = tensor.detach().index_select(dim, torch.tensor(index, dtype=torch.long, device=tensor.device))
        if isinstance(tensor, nn.Parameter):
            new = nn.Parameter(new, requires_grad=tensor.requires_grad)
        done[key] = (new, tensor)
    setattr(owner, leaf, done[key][0])
    _sizes(owner)


def _sizes(owner: Any) -> None:
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


def _adapt(model: nn.Module, site: Mapping[str, Any]) -> None:
    """Everything about a site but its tensors: attributes, hooks, and its module when it has no heads."""
    held = held_heads(site)
    hooks = site["hooks"] if held else ()
    if held and not site["kept"]:
        hooks = [*hooks, ["silence", site["empty"][0], {}]]
    heads = len(held)
    for kind, name, options in hooks:
        hook = _hook(model.get_submodule(name), kind, options)
        hook.heads, hook.kept = site["heads"], list(held)
        if isinstance(hook, Arrange):
            heads = hook.padded()
    queries = held_queries(site)
    if site.get("expanded"):
        heads = len(queries)
    for name, each, *of in site["counts"]:
        path, _, leaf = name.rpartition(".")
        value = each * (len(queries) if of == ["queries"] else heads)
        if of == ["per_group"]:
            value = len(queries) // heads if heads else each
        if path.rpartition(".")[2] == "config":
            module: Any = model.get_submodule(path.rpartition(".")[0])
            if not isinstance(module.config, ConfigView):
                module.config = ConfigView(module.config)
            owner: Any = module.config
        else:
            owner = model.get_submodule(path)
        if hasattr(owner, leaf):  # else this version of the host counts by another
            if type(getattr(owner, leaf)) is not int:
                raise ValueError(f"{name} is no count")
            setattr(owner, leaf, value)
    if not held:
        _remove_hooks(model, site)
        _empty(model, *site["empty"])


def _hook(module: nn.Module, kind: str, options: Mapping[str, Any]) -> Any:
    """The module's hook of this kind, attached when it has none yet."""
    hooks = module.__dict__.setdefault(HOOK_ATTRIBUTE, {})
    key = f"{kind} {options.get('argument', '')}"
    if key not in hooks:
        made: Any = HOOKS[kind]
        hook = made(**conform(options, made.shape, f"the options of {kind}"))
        hooks[key] = (hook, hook.attach(module))
    return hooks[key][0]


def _remove_hooks(model: nn.Module, site: Mapping[str, Any]) -> None:
    for _, name, _ in site["hooks"]:
        for _, handles in model.get_submodule(name).__dict__.pop(HOOK_ATTRIBUTE, {}).values():
            for handle in handles:
                handle.remove()


def _empty(model: nn.Module, name: str, options: Mapping[str, Any]) -> None:
    """Make the module of a site without heads a :class:`NoHeads`, without its projections."""
    module: Any = model.get_submodule(name)
    for gone in options["drop"]:
        parent, _, leaf = gone.rpartition(".")
        owner = module.get_submodule(parent)
        if not any(leaf in known for known in (owner._modules, owner._parameters, owner._buffers)):
            raise ValueError(f"{name} has no module or parameter {gone}")
        setattr(owner, leaf, None)
    module.__dict__.pop("forward", None)  # older transformers leave one there when they have recorded outputs
    module._no_heads, module._no_heads_class = of_this_version(type(module), options), type(module)
    module._is_hf_initialized = True  # its class's initialisation would look for what is gone
    module.__class__ = NoHeads
