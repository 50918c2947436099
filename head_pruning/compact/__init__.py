"""The shape of a model whose heads are removed. Everything here imports nothing but torch.

The code of these modules travels with every compact checkpoint, as one file, so that they load without the package.
"""

from typing import TYPE_CHECKING

from ..lazy import exports

if TYPE_CHECKING:
    from .checks import check_recipe
    from .hooks import HOOK_ATTRIBUTE, HOOKS, mixes_positions
    from .no_heads import NoHeads, bias_maker
    from .recipe import ATTRIBUTE, READABLE, VERSION, apply_recipe
    from .slices import held_heads, held_queries, stays, was

__all__ = [
    "ATTRIBUTE",
    "HOOKS",
    "HOOK_ATTRIBUTE",
    "NoHeads",
    "READABLE",
    "VERSION",
    "apply_recipe",
    "bias_maker",
    "check_recipe",
    "held_heads",
    "held_queries",
    "mixes_positions",
    "stays",
    "was",
]
__getattr__ = exports(
    __name__,
    {
        "ATTRIBUTE": "recipe",
        "HOOKS": "hooks",
        "HOOK_ATTRIBUTE": "hooks",
        "NoHeads": "no_heads",
        "READABLE": "recipe",
        "VERSION": "recipe",
        "apply_recipe": "recipe",
        "bias_maker": "no_heads",
        "check_recipe": "checks",
        "held_heads": "slices",
        "held_queries": "slices",
        "mixes_positions": "hooks",
        "stays": "slices",
        "was": "slices",
    },
)
