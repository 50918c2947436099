"""Experts whose matrices are parameters of one module: which these are, and how they are laid out."""

from typing import Callable, Optional, Sequence

import torch
from torch import nn

from head_pruning import AttentionSite, ExpertSite

from .layouts import EXPERT_LAYOUTS, features, parse_layout
from .module_tree import Tree

LAYOUTS = tuple(parse_layout(line) for line in EXPERT_LAYOUTS)


def expert_sites(
    tree: Tree, attention: Sequence[AttentionSite], keep: Callable[[str], bool]
) -> tuple[ExpertSite, ...]:
    """The modules that hold the matrices of several experts as tensors, in the order of the modules."""
    hidden = {site.layer: features(tree.modules[site.out_proj]) for site in attention}
    sites = []
    for name, module in tree.modules.items():
        own = {leaf: tensor for leaf, tensor in module.named_parameters(recurse=False) if tensor.is_floating_point()}
        matrices = {leaf: tensor for leaf, tensor in own.items() if tensor.dim() == 3 and not leaf.endswith("bias")}
        pair = next((found for layout in LAYOUTS if (found := _find(matrices, layout))), None)
        if pair is None or not keep(name):
            continue
        layer = next((outer for outer, _ in tree.path(name) if outer in hidden), None) or tree.host_layer(name)
        widths = hidden.get(layer)
        alike = [leaf for leaf, tensor in matrices.items() if len(tensor) == len(matrices[pair["in"]])]
        biases = [leaf for leaf in own if any(leaf == f"{matrix}_bias" for matrix in alike)]
        sites.append(
            ExpertSite(
                name=name,
                layer=layer,
                weights=tuple(f"{name}.{leaf}" for leaf in alike),
                biases=tuple(f"{name}.{leaf}" for leaf in biases),
                transposed=_transposed(module, matrices[pair["in"]], matrices[pair["out"]], widths and widths[1]),
            )
        )
    return tuple(sites)


def _find(matrices: dict[str, torch.Tensor], layout: dict[str, tuple[str, ...]]) -> Optional[dict[str, str]]:
    found = {}
    for role, names in layout.items():
        there = [name for name in names if name in matrices]
        if not there:
            return None
        found[role] = there[0]
    return found


def _transposed(module: nn.Module, first: torch.Tensor, last: torch.Tensor, hidden: Optional[int]) -> Optional[bool]:
    """Whether each matrix is ``[in, out]``: what the class says, or else the only one of the two that the sizes of the
    model, ``hidden``, and of the units, which ``first`` makes alone or with their gates, allow.
    """
    told = getattr(module, "is_transposed", None)
    if isinstance(told, bool):
        return told
    possible = []
    for transposed in (False, True):
        (outputs, inputs), (back, units) = (
            reversed(tensor.shape[1:]) if transposed else tensor.shape[1:] for tensor in (first, last)
        )
        if inputs == back and outputs in (units, 2 * units) and hidden in (inputs, None):
            possible.append(transposed)
    return possible[0] if len(possible) == 1 else None
