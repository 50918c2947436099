"""Which parts of a transformer to keep: gates, importance, pruners. Knows no training framework."""

from typing import TYPE_CHECKING

from .lazy import exports

if TYPE_CHECKING:
    from .choosing import choose_method, choose_methods
    from .errors import HeadPruningError, UnfiredSiteError
    from .masks import HeadMask, full_mask
    from .pruner import Pruner
    from .registry import build_pruner, methods, register_pruner
    from .session import PruningSession
    from .unit_map import AttentionSite, ExpertSite, FeedForwardSite, UnitMap

__version__ = "0.1.0"

__all__ = [
    "AttentionSite",
    "ExpertSite",
    "FeedForwardSite",
    "HeadMask",
    "HeadPruningError",
    "Pruner",
    "PruningSession",
    "UnfiredSiteError",
    "UnitMap",
    "build_pruner",
    "choose_method",
    "choose_methods",
    "full_mask",
    "methods",
    "register_pruner",
]
__getattr__ = exports(
    __name__,
    {
        "AttentionSite": "unit_map",
        "ExpertSite": "unit_map",
        "FeedForwardSite": "unit_map",
        "HeadMask": "masks",
        "HeadPruningError": "errors",
        "Pruner": "pruner",
        "PruningSession": "session",
        "UnfiredSiteError": "errors",
        "UnitMap": "unit_map",
        "build_pruner": "registry",
        "choose_method": "choosing",
        "choose_methods": "choosing",
        "full_mask": "masks",
        "methods": "registry",
        "register_pruner": "registry",
    },
)
