"""The sites of a transformers model, found by how its attention modules name their projections."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Callable, Iterator, NoReturn, Optional, Sequence

from torch import nn

from head_pruning import AttentionSite, HeadPruningError, UnitMap
from head_pruning.surgery.remaining import recipe_of, site_now
from head_pruning.unit_map import ATTENTION_KINDS

from ..compact.quantizer import mark_compact
from .experts import expert_sites
from .feed_forward import feed_forward_outputs, feed_forward_sites
from .head_counts import count_heads
from .head_plans import plan_site
from .layouts import ATTENTION_LAYOUTS, features, find_parts, first_fit, parse_layout
from .module_tree import Tree

LAYOUTS = tuple(parse_layout(line) for line in ATTENTION_LAYOUTS)

# Norms in an attention module that do not sit between the heads and the output projection: those of queries, keys and
# values, and those of the module's input or output.
HARMLESS_NORM = re.compile(
    r"(^|[._])(q|k|v|qk|kv|query|key|value|queries|keys)([._]|$)"
    r"|(^|\.)(LayerNorm|layer_norm|layernorm[12]|ln|pre_norm|self_attn_layer_norm)$"
)


def unit_map(model: nn.Module, *, sites: Sequence[AttentionSite] = (), ignore: Optional[str] = None) -> UnitMap:
    """Map a transformers model: its attention modules, feed-forward blocks and layers.

    Attention is found by projection layout (:data:`hf_plugin.mapping.layouts.ATTENTION_LAYOUTS`), whatever the model's
    class. Rows are in the order of the published code: encoder self-attention, decoder cross-attention, decoder
    self-attention, each by layer; the attention of a decoder-only model is decoder self-attention, and one sequence
    attending to another counts as cross-attention. Under grouped-query attention a head is a key/value group with all
    its query heads. A module that a model uses several times is one site. Modules whose heads were all removed for
    good are left out.

    Args:
        model: the model, bare or with a task head, also wrapped by PEFT.
        sites: attention sites described by hand, for modules that cannot be mapped; they replace what is found there.
        ignore: regular expression; modules whose dotted name it matches anywhere are left out.

    Raises:
        HeadPruningError: an attention module cannot be mapped (the text holds the lines that describe it), a given
            site does not fit the model, or there is no attention.
    """
    tree = Tree(model)
    keep = _keep(tree, ignore)
    sites = [_with_projections(tree, site) for site in sites]
    for site in sites:
        _check_site(tree, site)
    by_hand = [site.name for site in sites]
    compact = list(_compact_sites(tree))
    sites = [*sites, *(site for site in compact if site.heads and keep(site.name) and site.name not in by_hand)]
    given = [*by_hand, *(site.name for site in compact)]
    found: list[AttentionSite] = []
    unmapped: list[Unmapped] = []
    for name, parts in _candidates(tree):
        if keep(name) and not any(_nested(name, other) for other in given):
            mapped = _site(tree, name, parts)
            if isinstance(mapped, Unmapped):
                unmapped.append(mapped)
            else:
                found.append(mapped)
    covered = [*given, *(site.name for site in found), *(each.name for each in unmapped)]
    for name in _attention_modules(tree):
        if keep(name) and not any(_nested(name, other) for other in covered):
            unmapped.append(Unmapped(name, _unknown(tree.modules[name])))
    if unmapped:
        raise_unmapped(tree, unmapped)
    order = {name: position for position, name in enumerate(tree.modules)}
    attention = sorted([*found, *sites], key=lambda site: (ATTENTION_KINDS.index(site.kind), order[site.name]))
    (feed_forward, emptied), experts = feed_forward_sites(tree, attention, keep), expert_sites(tree, attention, keep)
    named = {site.layer for sites in (attention, compact, feed_forward, experts) for site in sites}
    layers = filter(keep, named)
    ordered = tuple(sorted(layers, key=order.__getitem__))
    return UnitMap(
        tuple(attention),
        feed_forward,
        ordered,
        experts=experts,
        emptied=emptied,
        planner=plan_site,
        adapt=mark_compact,
    )


def _compact_sites(tree: Tree) -> Iterator[AttentionSite]:
    """The sites that heads were removed from, as they are now; without heads where none is left."""
    for holder, module in tree.modules.items():
        recipe = recipe_of(module)
        if recipe is not None:
            prefix = f"{holder}." if holder else ""
            for site in UnitMap.from_dict(recipe["unit_map"]).attention:
                entry = recipe["sites"].get(site.name)
                if entry is not None and prefix + site.name in tree.modules:
                    names = {name: prefix + getattr(site, name) for name in ("name", "layer", "out_proj")}
                    projections = tuple(prefix + name for name in site.projections)
                    yield dataclasses.replace(site_now(site, entry), **names, projections=projections)


def _keep(tree: Tree, ignore: Optional[str]) -> Callable[[str], bool]:
    if ignore is None:
        return lambda name: True
    try:
        pattern = re.compile(ignore)
    except re.error as error:
        raise HeadPruningError(f"ignore={ignore!r} is not a regular expression ({error}); correct it.") from error
    if not any(pattern.search(name) for name in tree.modules):
        raise HeadPruningError(f"ignore={ignore!r} matches no module of the model; correct it.")
    return lambda name: not pattern.search(name)


def _nested(name: str, other: str) -> bool:
    """Whether one of the two modules is the other or lies in it."""
    return name == other or name.startswith(f"{other}.") or other.startswith(f"{name}.")


def _with_projections(tree: Tree, site: AttentionSite) -> AttentionSite:
    """A site given by hand, with the projections of its module's layout where it names none."""
    module = tree.modules.get(site.name)
    if site.projections or module is None:
        return site
    for parts in filter(None, (find_parts(module, layout) for layout in LAYOUTS)):
        names = {role: tree.name_of(module.get_submodule(part)) for role, part in parts.items()}
        if names.pop("out") == site.out_proj:
            return dataclasses.replace(site, projections=tuple(names.values()))
    return site


def _check_site(tree: Tree, site: AttentionSite) -> None:
    for name in (site.name, site.layer, site.out_proj, *site.projections):
        if name not in tree.modules:
            raise HeadPruningError(f"The model has no module {name}, which the site {site.name} names; correct it.")
    if site.kind not in ATTENTION_KINDS:
        raise HeadPruningError(
            f"The site {site.name} is of the kind {site.kind}; the kinds are {', '.join(ATTENTION_KINDS)}."
        )
    widths = features(tree.modules[site.out_proj])
    if widths is not None and widths[0] != site.heads * site.head_dim:
        raise HeadPruningError(
            f"The site {site.name} has {site.heads} heads of {site.head_dim}, but {site.out_proj} reads "
            f"{widths[0]} features; correct heads or head_dim."
        )


def _candidates(tree: Tree) -> list[tuple[str, dict[str, nn.Module]]]:
    """Name and projections of each module that fits a layout; a projection belongs to the innermost of them."""
    found: list[tuple[str, dict[str, nn.Module]]] = []
    for name, module in tree.modules.items():
        relative = first_fit(module, LAYOUTS)
        if relative is not None and relative["out"] not in feed_forward_outputs(module):
            found.append((name, {role: module.get_submodule(dotted) for role, dotted in relative.items()}))
    taken: set[int] = set()
    innermost: list[tuple[str, dict[str, nn.Module]]] = []
    for candidate in sorted(found, key=lambda candidate: -candidate[0].count(".")):
        ids = {id(part) for part in candidate[1].values()}
        if not ids & taken:
            taken |= ids
            innermost.append(candidate)
    return innermost


def _site(tree: Tree, name: str, parts: dict[str, nn.Module]) -> "AttentionSite | Unmapped":
    norm = _norm_before_out(tree, name)
    if norm is not None:
        return Unmapped(name, f"its norm {norm} may sit between the heads and the output projection")
    names = {role: tree.name_of(part) for role, part in parts.items()}
    holders = dict.fromkeys([name, *(part.rpartition(".")[0] for part in names.values())])
    layer = tree.host_layer(name)
    kind = tree.kind(name, layer)
    modules, half = [tree.modules[holder] for holder in holders], kind.partition("_")[0]
    try:
        heads, head_dim = count_heads(modules, tree.config_of(name), parts, half)
    except ValueError as error:
        return Unmapped(name, str(error))
    out_proj = names.pop("out")
    return AttentionSite(name, kind, layer, heads, head_dim, out_proj, tuple(names.values()))


def _norm_before_out(tree: Tree, name: str) -> Optional[str]:
    for inner, module in tree.modules[name].named_modules():
        is_norm = "Norm" in type(module).__name__ and not any(features(child) for child in module.modules())
        if inner and is_norm and not HARMLESS_NORM.search(inner):
            return inner
    return None


def _attention_modules(tree: Tree) -> Iterator[str]:
    """Names of the innermost modules that are attention by their class's name and have a weight matrix."""
    named = [name for name, module in tree.modules.items() if "Attention" in type(module).__name__ and _learns(module)]
    return (name for name in named if not any(other.startswith(f"{name}.") for other in named))


def _learns(module: nn.Module) -> bool:
    return any(
        weight.ndim > 1
        for inner in module.modules()
        if not isinstance(inner, nn.Embedding)
        for weight in inner.parameters(recurse=False)
    )


def _unknown(module: nn.Module) -> str:
    if isinstance(module, nn.MultiheadAttention):
        return "nn.MultiheadAttention never calls its output projection, so a gate there would not run"
    return "its projections have names of no known layout"


SHOWN = 4


@dataclass(frozen=True)
class Unmapped:
    """An attention module that cannot be mapped, and why."""

    name: str
    reason: str


def _parts(module: nn.Module) -> tuple[str, list[str]]:
    """The best guess of the output projection, the last that is called so or the last one, and of the others."""
    known = first_fit(module, LAYOUTS)
    if known is not None:
        return known["out"], [part for role, part in known.items() if role != "out"]
    inside = [name for name, child in module.named_modules() if name and features(child) is not None]
    called_out = [name for name in inside if re.match(r"o(_|$)|.*out", name.rpartition(".")[2])]
    out = (called_out or inside or ["OUT_PROJ"])[-1]
    return out, [name for name in inside if name != out]


def _line(tree: Tree, name: str) -> str:
    layer = tree.host_layer(name)
    out, others = _parts(tree.modules[name])
    listed = "".join(f'"{name}.{other}", ' for other in others).rstrip()
    projections = f", projections=({listed})" if listed else ""
    return (
        f'    AttentionSite(name="{name}", kind="{tree.kind(name, layer)}", layer="{layer}", heads=HEADS, '
        f'head_dim=HEAD_DIM, out_proj="{name}.{out}"{projections}),'
    )


def raise_unmapped(tree: Tree, unmapped: Sequence[Unmapped]) -> NoReturn:
    """Raise HeadPruningError that names the modules and holds the lines which describe them."""
    first = unmapped[0]
    more = f" (and {len(unmapped) - 1} more)" if len(unmapped) > 1 else ""
    lines = [_line(tree, each.name) for each in unmapped[:SHOWN]]
    if len(unmapped) > SHOWN:
        lines.append(f"    # ... and one line for each of {', '.join(each.name for each in unmapped[SHOWN:])}")
    raise HeadPruningError(
        f"The attention module {first.name} ({type(tree.modules[first.name]).__name__}){more} cannot be mapped: "
        f"{first.reason}; describe it with the lines below (HEADS * HEAD_DIM is the width of what its output "
        "projection out_proj reads; projections are those of query, key and value) and pass them as sites=, or leave "
        "it out with ignore=, a regular expression of module names.\n\n"
        "from head_pruning import AttentionSite\n"
        "sites = [\n" + "\n".join(lines) + "\n]\n"
        "unit_map(model, sites=sites)"
    )
