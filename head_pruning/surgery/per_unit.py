"""Sums over the weights that belong to each head or feed-forward unit alone."""

from typing import Callable

import numpy as np
import torch
from torch import nn

from ..masks import full_mask
from ..schedules import count_of
from ..unit_map import AttentionSite, UnitMap
from .zeros import owned_parts


def per_unit(model: nn.Module, unit_map: UnitMap, of: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
    """``float64[N]``: for each head or unit the sum of ``of`` over the numbers that belong to it alone.

    Args:
        model: the model.
        unit_map: its sites.
        of: gives a number for each of a tensor's, in its shape.
    """
    found = np.zeros(unit_map.num_heads)
    for site, where in unit_map.slices():
        for tensor, dim, owner in owned_parts(model, unit_map, site):
            if isinstance(tensor, nn.Parameter):
                with torch.no_grad():
                    values = of(tensor).double().transpose(0, dim).reshape(len(owner), -1).sum(1).cpu().numpy()
                found[where] += np.bincount(owner[owner >= 0], values[owner >= 0], minlength=site.heads)
    return found


def mean_squares(model: nn.Module, unit_map: UnitMap) -> np.ndarray:
    """``float64[N]``: the mean of the squares of the numbers that belong to each head or unit alone."""
    squares = per_unit(model, unit_map, lambda tensor: tensor.double().square())
    return squares / np.maximum(per_unit(model, unit_map, torch.ones_like), 1.0)


def unit_macs(model: nn.Module, unit_map: UnitMap, length: int) -> np.ndarray:
    """``float64[N]``: the multiply-accumulates that each head or unit costs, per token.

    Those are its weights in the projections, and for a head its scores and sums over ``length`` tokens.
    """
    names = [name for site in unit_map.sites for name in (site.out_proj, *site.projections)]
    matrices = {id(each) for name in names for each in model.get_submodule(name).parameters() if each.ndim == 2}
    macs = per_unit(model, unit_map, lambda tensor: torch.full_like(tensor, float(id(tensor) in matrices)))
    for site, where in unit_map.slices():
        if isinstance(site, AttentionSite):
            macs[where] += 2.0 * length * site.head_dim
    return macs


def of_each_kind(unit_map: UnitMap, scores: np.ndarray, share: float) -> np.ndarray:
    """``bool[N]``: the ``share`` of the heads, and of the units where these are numbered, with the highest ``scores``
    (``[N]``), ties by the lower index; rounded down.
    """
    keep, start = np.zeros(scores.size, dtype=bool), 0
    for _, total in full_mask(unit_map).counts().values():
        order = np.argsort(-scores[start : start + total], kind="stable")
        keep[start + order[: count_of(share, total)]] = True
        start += total
    return keep


def affordable(scores: np.ndarray, costs: np.ndarray, budget: float) -> np.ndarray:
    """``bool[N]``: what stays of a ranking within a budget: never above it, and no more than one unit's cost below.

    Args:
        scores: ``[N]``; the highest come first, ties by the lower index. One that no longer fits is passed over.
        costs: ``[N]``, above 0.
        budget: what may be spent.
    """
    keep, left = np.zeros(scores.size, dtype=bool), budget * (1 + 1e-12)
    for index in np.argsort(-scores, kind="stable"):
        if costs[index] <= left:
            keep[index] = True
            left -= costs[index]
    return keep
