"""What the host asks of a session's weight pruners: which they are, their masks, and the files these leave."""

import contextlib
from pathlib import Path

import torch
from torch import nn

from head_pruning import PruningSession
from head_pruning.weights import WeightPruner, write_weight_artifacts

from .export import zeroed_heads


def weight_pruners(session: PruningSession) -> list[WeightPruner]:
    """Those of the session's pruners that prune weights."""
    return [pruner for pruner in session.pruners if isinstance(pruner, WeightPruner)]


def weight_masks(session: PruningSession) -> dict[str, torch.Tensor]:
    """Parameter name to ``bool`` mask (true: stays) on the CPU; empty before the first mask."""
    return {name: mask for pruner in weight_pruners(session) for name, mask in pruner.weight_masks().items()}


def save_weight_masks_and_report(folder: "str | Path", model: nn.Module, session: PruningSession) -> None:
    """Add masks, densities and their picture to the folder of a pruned model.

    The numbers are those of the model as it is saved: with the weights of removed heads at zero too.

    Raises:
        HeadPruningError: there is no mask yet.
    """
    pruners, mask = weight_pruners(session), session.head_mask()
    with contextlib.nullcontext() if mask is None else zeroed_heads(model, mask):
        write_weight_artifacts(
            folder,
            weight_masks(session),
            dict(model.named_parameters()),
            method="+".join(pruner.name for pruner in pruners),
            options={name: value for pruner in pruners for name, value in vars(pruner.config).items()},
            head_mask=mask,
        )
