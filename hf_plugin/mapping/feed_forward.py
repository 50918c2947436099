"""The feed-forward blocks of a model."""

from typing import Callable, Iterator, Sequence

from torch import nn

from head_pruning import AttentionSite, FeedForwardSite
from head_pruning.compact.hooks import is_silent

from .layouts import FEED_FORWARD_LAYOUTS, features, find_parts, first_fit, parse_layout, widths
from .module_tree import Tree

LAYOUTS = tuple(parse_layout(line) for line in FEED_FORWARD_LAYOUTS)


def feed_forward_outputs(module: nn.Module) -> set[str]:
    """Names, relative to ``module``, of what would be the output projection of a feed-forward block there."""
    return {parts["out"] for layout in LAYOUTS if (parts := find_parts(module, layout))}


def _layer(tree: Tree, name: str, attention_layers: set[str]) -> str:
    """The host layer of a block: the one that attention sites name, if it lies in one or beside one."""
    around = (outer for outer, _ in tree.path(name) if outer in attention_layers)
    layer = next(around, None)
    return layer or _parallel_layer(tree, tree.host_layer(name), attention_layers)


def _parallel_layer(tree: Tree, layer: str, attention_layers: set[str]) -> str:
    """XLM keeps the attention modules of all layers in one list and the blocks in another: the same index in both."""
    holder, _, index = layer.rpartition(".")
    parent = holder.rpartition(".")[0]
    if layer in attention_layers or not index.isdigit() or not {holder, parent} <= tree.modules.keys():
        return layer
    count = len(list(tree.modules[holder].children()))
    for other, siblings in tree.modules[parent].named_children():
        beside = f"{parent}.{other}".lstrip(".")
        names = [f"{beside}.{child}" for child, _ in siblings.named_children()]
        if beside != holder and len(names) == count and attention_layers.issuperset(names):
            return f"{beside}.{index}"
    return layer


def _gates(tree: Tree, first: nn.Module, last: nn.Module) -> Iterator[str]:
    """The projections beside the first one that are as wide: what they make is multiplied with its units."""
    name = tree.name_of(first)
    holder = tree.modules[name.removesuffix(".linear").rpartition(".")[0]]
    for child in holder.children():
        child = child._modules.get("linear", child) if features(child) is None else child
        if features(child) == features(first) and child is not first and child is not last:
            yield tree.name_of(child)


def feed_forward_sites(
    tree: Tree, attention: Sequence[AttentionSite], keep: Callable[[str], bool]
) -> tuple[tuple[FeedForwardSite, ...], tuple[str, ...]]:
    """The blocks that lie in an attention site's layer or in a list of modules, in the order of the modules; and the
    layers of those whose units were all removed.

    ``in_proj`` is as wide as the block, or twice as wide where it also makes the gates of the units; other projections
    of its widths beside it make them too. What has no known layout, e.g. experts, is left out.
    """
    layers = {site.layer for site in attention if site.layer}
    taken: set[int] = set()
    sites, emptied = [], []
    for name, module in tree.modules.items():
        parts = first_fit(module, LAYOUTS)
        if parts is None or not keep(name):
            continue
        first, last = (module.get_submodule(parts[role]) for role in ("in", "out"))
        if is_silent(last):
            emptied.append(_layer(tree, name, layers))
            continue
        width = widths(last)[0]
        layer = _layer(tree, name, layers)
        in_list = any(outer.rpartition(".")[2].isdigit() for outer, _ in tree.path(name))
        if widths(first)[1] not in (width, 2 * width) or id(last) in taken or not (layer in layers or in_list):
            continue
        taken.add(id(last))
        holds_attention = any(site.name == name or site.name.startswith(f"{name}.") for site in attention)
        sites.append(
            FeedForwardSite(
                name=f"{name}.ffn" if holds_attention else name,
                layer=layer,
                width=width,
                in_proj=tree.name_of(first),
                out_proj=tree.name_of(last),
                gates=tuple(_gates(tree, first, last)),
            )
        )
    return tuple(sites), tuple(emptied)
