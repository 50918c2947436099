"""How much of each tensor is removed where it is not the same ratio of all."""

from __future__ import annotations

import math
import re
from typing import Mapping, Optional, Sequence

from ...compact.shapes import Number
from ...errors import HeadPruningError, one_line
from ...files import parse_json
from .targets import name_pattern

STRATEGIES = ("uniform", "er", "erk")


def erdos_renyi(shapes: Mapping[str, Sequence[int]], sparsity: float, *, kernels: bool) -> dict[str, float]:
    """The removed ratio of each tensor under Erdos-Renyi allocation (Mocanu et al. 2018; Evci et al. 2020).

    The density of a tensor is proportional to the sum of its dimensions over their product; the factor is such that
    ``sparsity`` of all weights are removed. Tensors whose density would exceed 1 stay dense, the densest first.

    Args:
        shapes: by name, of two dimensions or more.
        sparsity: removed ratio of all weights together, 0 to below 1.
        kernels: count the dimensions of convolutions' kernels too (ERK); else outputs and inputs alone (ER).
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    dims = {name: shape if kernels else shape[:2] for name, shape in shapes.items()}
    raw = {name: sum(dim) / math.prod(dim) for name, dim in dims.items()}
    left = set(shapes)
    wanted = (1.0 - sparsity) * sum(sizes.values())
    while left:
        dense = sum(size for name, size in sizes.items() if name not in left)
        factor = (wanted - dense) / sum(raw[name] * sizes[name] for name in left)
        densest = max(raw[name] for name in left)
        if densest * factor <= 1.0:
            break
        left = {name for name in left if raw[name] < densest}
    return {name: 1.0 - factor * raw[name] if name in left else 0.0 for name in shapes}


def parse_map(text: Optional[str]) -> dict[re.Pattern, float]:
    """A ``weight_sparsity_map``: patterns of names and removed ratios. Raises HeadPruningError when it is none."""
    try:
        known = parse_json(text, {str: Number(0, 1)}) if text else {}
    except ValueError as error:
        raise HeadPruningError(
            f"--weight-sparsity-map is no JSON of patterns and removed ratios ({one_line(error):.200}); write it like "
            '{"layer\\\\.0\\\\.": 0.5}.'
        ) from error
    found = {}
    for pattern, sparsity in known.items():
        compiled = name_pattern(pattern, "--weight-sparsity-map has")
        if compiled is None:
            raise HeadPruningError("--weight-sparsity-map has an empty pattern; name tensors.")
        found[compiled] = sparsity
    return found


def mapped(names: Sequence[str], chosen: Mapping[re.Pattern, float], sparsity: float) -> dict[str, float]:
    """The removed ratio of each tensor: that of the pattern that its name fits, else ``sparsity``.

    Raises:
        HeadPruningError: a name fits several patterns, or a pattern no name.
    """
    found, used = {}, set()
    for name in names:
        fits = [pattern for pattern in chosen if pattern.search(name)]
        if len(fits) > 1:
            raise HeadPruningError(
                f"{name} fits {fits[0].pattern!r} and {fits[1].pattern!r} of --weight-sparsity-map; let one fit."
            )
        found[name] = chosen[fits[0]] if fits else sparsity
        used.update(fits)
    idle = [pattern.pattern for pattern in chosen if pattern not in used]
    if idle:
        raise HeadPruningError(f"{idle[0]!r} of --weight-sparsity-map fits no pruned tensor; correct it.")
    return found
