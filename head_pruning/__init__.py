"""Which parts of a transformer to keep: gates, importance, pruners. Knows no training framework."""

from .choosing import choose_method, choose_methods
from .errors import HeadPruningError, UnfiredSiteError
from .masks import HeadMask, full_mask
from .pruner import Pruner
from .registry import build_pruner, methods, register_pruner
from .session import PruningSession
from .unit_map import AttentionSite, FeedForwardSite, UnitMap

__version__ = "0.1.0"

__all__ = [
    "AttentionSite",
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
