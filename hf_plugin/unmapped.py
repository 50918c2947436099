"""What to tell someone whose model has an attention module that cannot be mapped."""

import re
from dataclasses import dataclass
from typing import NoReturn, Sequence

from torch import nn

from head_pruning import HeadPruningError

from .layouts import features
from .tree import Tree

SHOWN = 4


@dataclass(frozen=True)
class Unmapped:
    """An attention module that cannot be mapped, and why."""

    name: str
    reason: str


def _out_proj(module: nn.Module) -> str:
    """The best guess: the last projection that is called so, or the last one."""
    inside = [name for name, child in module.named_modules() if name and features(child) is not None]
    called_out = [name for name in inside if re.match(r"o(_|$)|.*out", name.rpartition(".")[2])]
    return (called_out or inside or ["OUT_PROJ"])[-1]


def _line(tree: Tree, name: str) -> str:
    layer = tree.host_layer(name)
    return (
        f'    AttentionSite(name="{name}", kind="{tree.kind(name, layer)}", layer="{layer}", heads=HEADS, '
        f'head_dim=HEAD_DIM, out_proj="{name}.{_out_proj(tree.modules[name])}"),'
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
        "projection out_proj reads) and pass them as sites=, or leave it out with ignore=, a regular expression of "
        "module names.\n\n"
        "from head_pruning import AttentionSite\n"
        "sites = [\n" + "\n".join(lines) + "\n]\n"
        "unit_map(model, sites=sites)"
    )
