"""The shape of a model whose heads are removed. Everything here imports nothing but torch.

The code of these modules travels with every compact checkpoint, as one file, so that they load without the package.
"""

from .hooks import HOOK_ATTRIBUTE, HOOKS, mixes_positions
from .no_heads import NoHeads, bias_maker
from .recipe import ATTRIBUTE, READABLE, VERSION, apply_recipe
from .slices import held_heads, held_queries, slices, stays, was

__all__ = [
    "ATTRIBUTE",
    "HOOKS",
    "HOOK_ATTRIBUTE",
    "NoHeads",
    "READABLE",
    "VERSION",
    "apply_recipe",
    "bias_maker",
    "held_heads",
    "held_queries",
    "mixes_positions",
    "slices",
    "stays",
    "was",
]
