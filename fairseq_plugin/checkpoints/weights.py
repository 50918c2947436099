"""Weight pruners in fairseq: where they are refused, and what they remove of a checkpoint."""

import logging
from typing import Any, Mapping, Optional

import torch

from head_pruning import HeadPruningError, PruningSession
from head_pruning.weights import WeightPruner

logger = logging.getLogger(__name__)

_UNTESTED = ("fully_sharded", "slowmo", "slow_mo")


def weight_pruners(session: Optional[PruningSession]) -> list[WeightPruner]:
    """Those of the session's pruners that prune weights."""
    return [pruner for pruner in (session.pruners if session else ()) if isinstance(pruner, WeightPruner)]


def weight_masks(session: PruningSession) -> dict[str, torch.Tensor]:
    """Parameter name to ``bool`` mask (true: stays) on the CPU; empty before the first mask."""
    return {name: mask for pruner in weight_pruners(session) for name, mask in pruner.weight_masks().items()}


def refuse_hosts(options: Any) -> None:
    """Raise HeadPruningError where ranks do not hold the same whole weights and gradients at every update."""
    backend = str(getattr(options, "ddp_backend", ""))
    if backend in _UNTESTED or getattr(options, "use_bmuf", False):
        named = f"--ddp-backend {backend}" if backend in _UNTESTED else "--use-bmuf"
        raise HeadPruningError(
            f"Weights are not pruned with {named}, where ranks do not hold the same whole weights at every update; "
            "use --ddp-backend pytorch_ddp or legacy_ddp, or prune heads only."
        )


def zero_weights(weights: dict, masks: Mapping[str, torch.Tensor]) -> None:
    """Zero, in place, what the masks remove of a model state dict."""
    for name, mask in masks.items():
        weights[name].masked_fill_(~mask.to(weights[name].device), 0)


def finish(session: PruningSession) -> None:
    """Training is over: where the schedule is not, mask the model at the final density."""
    for pruner in weight_pruners(session):
        if not pruner.at_target():
            logger.warning(
                "training ended before the schedule of %s did: the model was never trained with exactly the weights "
                "that are kept",
                pruner.name,
            )
            pruner.harden()
