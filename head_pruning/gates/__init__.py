"""Head gates: where they sit, and the methods that learn them."""

from typing import TYPE_CHECKING

from ..lazy import exports

if TYPE_CHECKING:
    from .engine.bank import GateBank, HeadGate
    from .engine.top_k import SoftTopK, gumbel, hard_top_k, plan_rounds

__all__ = ["GateBank", "HeadGate", "SoftTopK", "gumbel", "hard_top_k", "plan_rounds"]
__getattr__ = exports(
    __name__,
    {
        **dict.fromkeys(("GateBank", "HeadGate"), "engine.bank"),
        **dict.fromkeys(("SoftTopK", "gumbel", "hard_top_k", "plan_rounds"), "engine.top_k"),
    },
)
