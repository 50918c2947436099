"""Head gates: where they sit, and the methods that learn them."""

from .bank import GateBank, HeadGate
from .subset import SoftTopK, gumbel, hard_top_k, plan_rounds

__all__ = ["GateBank", "HeadGate", "SoftTopK", "gumbel", "hard_top_k", "plan_rounds"]
