"""Which tensors of a model are pruned: by the unit map's sites, or by patterns of parameter names."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Iterator, Optional

import torch

from ...errors import HeadPruningError
from ...unit_map import UnitMap

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """One pruned parameter: its dotted name in the model, and itself."""

    name: str
    parameter: torch.nn.Parameter


def weight_targets(
    model: torch.nn.Module,
    unit_map: Optional[UnitMap],
    *,
    include: Optional[str] = None,
    exclude: Optional[str] = None,
    biases: bool = True,
) -> list[Target]:
    """The parameters to prune, in the model's order, each once.

    Without ``include`` these are the projections of the unit map's sites: query, key, value and output of each
    attention, both projections of each feed-forward block. On BERT with ``biases`` that is what the published PLATON
    selects by name (85 017 600 scalars of BERT-base). Weights of normalisations and embeddings are never among them,
    also not by a pattern, and also not where another module shares them (a tied output layer).

    Args:
        model: the model.
        unit_map: its sites; None where ``include`` is given.
        include: regular expression searched in parameter names; replaces the choice by sites.
        exclude: regular expression of names to leave out.
        biases: also the biases (one-dimensional parameters) of the chosen modules.

    Raises:
        HeadPruningError: nothing is left to prune, a pattern is no regular expression, or a parameter is sharded.
    """
    wanted, unwanted = name_pattern(include, "--weights-include"), name_pattern(exclude, "--weights-exclude")
    if wanted is None and unit_map is None:
        raise HeadPruningError("Without a unit map the weights to prune must be named; add --weights-include.")
    protected = {id(parameter) for module in model.modules() if _is_protected(module) for parameter in _own(module)}
    prefixes = () if unit_map is None or wanted is not None else tuple(f"{name}." for name in _projections(unit_map))
    chosen, frozen = [], []
    for name, parameter in model.named_parameters():
        if not (wanted.search(name) if wanted is not None else name.startswith(prefixes)):
            continue
        if (unwanted is not None and unwanted.search(name)) or id(parameter) in protected:
            continue
        if not parameter.is_floating_point() or parameter.dim() < (1 if biases else 2):
            continue
        if not parameter.requires_grad:
            frozen.append(name)
            continue
        require_whole(name, parameter)
        chosen.append(Target(name, parameter))
    if frozen:
        logger.warning("%d frozen parameters are not pruned: %s", len(frozen), shortened(frozen))
    if not chosen:
        raise HeadPruningError(
            "No trainable weight is left to prune; correct --weights-include and --weights-exclude, or unfreeze the "
            "model."
        )
    return chosen


def require_whole(name: str, parameter: torch.Tensor) -> None:
    """Raise HeadPruningError for a parameter of which this process holds a part only."""
    if parameter.numel() == 0 or hasattr(parameter, "placements") or hasattr(parameter, "ds_id"):
        raise HeadPruningError(
            f"{name} is sharded or empty in this process; prune weights with plain data parallelism (DDP) instead of "
            "FSDP or DeepSpeed ZeRO-3."
        )


def shortened(names: list[str]) -> str:
    """At most four of the names, for a message."""
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def name_pattern(text: Optional[str], flag: str) -> Optional[re.Pattern]:
    """The regular expression that ``flag`` gave, if any. Raises HeadPruningError when it is none."""
    try:
        return re.compile(text) if text else None
    except re.error as error:
        raise HeadPruningError(f"{flag} {text!r} is no regular expression ({error}); correct it.") from error


def _projections(unit_map: UnitMap) -> Iterator[str]:
    for site in unit_map.attention:
        yield from (*site.projections, site.out_proj)
    for block in unit_map.feed_forward:
        yield from (block.in_proj, block.out_proj)


def _is_protected(module: torch.nn.Module) -> bool:
    return isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag)) or "norm" in type(module).__name__.lower()


def _own(module: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    return module.parameters(recurse=False)
