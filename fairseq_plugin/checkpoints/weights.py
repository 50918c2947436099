"""Weight pruners in fairseq: where they are refused, and what they remove of a checkpoint."""

from typing import Any, Mapping

import torch

from head_pruning import HeadPruningError, PruningSession

from .stored import PruningState

# Ranks whose weights differ until they are averaged.
_AVERAGED = ("slowmo", "slow_mo")


def refuse_hosts(session: PruningSession, options: Any) -> None:
    """Raise HeadPruningError where ranks do not hold the same whole weights and gradients at every update.

    Pruners of heads, whose gates are their own, mind only sharded models, which no checkpoint here is made of.
    """
    backend = str(getattr(options, "ddp_backend", ""))
    if backend == "fully_sharded":
        raise HeadPruningError(
            "Models are not pruned with --ddp-backend fully_sharded: no rank holds whole weights there; use "
            "--ddp-backend pytorch_ddp or legacy_ddp."
        )
    alone = not session.steers_host and not session.changes_loss
    if alone and len(session.of_kind("heads")) == len(session.pruners):
        return
    if backend in _AVERAGED or getattr(options, "use_bmuf", False):
        named = f"--ddp-backend {backend}" if backend in _AVERAGED else "--use-bmuf"
        raise HeadPruningError(
            f"Weights are not pruned with {named}, nor models distilled: ranks do not hold the same whole weights at "
            "every update there; use --ddp-backend pytorch_ddp or legacy_ddp, or prune heads only."
        )


def zero_weights(weights: dict, masks: Mapping[str, torch.Tensor]) -> None:
    """Zero, in place, what the masks remove of a model state dict."""
    for name, mask in masks.items():
        weights[name].masked_fill_(~mask.to(weights[name].device), 0)


def mask_weights(checkpoint: dict) -> None:
    """Zero, in place, what a whole checkpoint's own masks remove of its model: between two masks all are there.

    Raises:
        HeadPruningError: its masks are damaged, or not those of its weights.
    """
    zero_weights(checkpoint["model"], PruningState.of(checkpoint).weight_masks(checkpoint["model"]))


def finish(session: PruningSession) -> None:
    """Training is over: fix the masks, at the final density also where the schedule has not ended.

    Without pruned heads, masks of a schedule that has ended stay as they are, and a longer run can go on.
    """
    with_heads = session.head_mask() is not None
    wanting = [pruner for pruner in session.of_kind("weights") if with_heads or not pruner.at_target()]
    session.tell_unfinished()
    for pruner in wanting:
        pruner.harden()
