"""Head masks of the published DSP code: ``mask{K}.pt``, a matrix of zeros and ones."""

from __future__ import annotations

from pathlib import Path

import torch

from .errors import HeadPruningError
from .masks import HeadMask
from .pickled import load_pickled
from .unit_map import UnitMap


def read_old_mask(path: "str | Path", unit_map: UnitMap) -> HeadMask:
    """Read a mask that the published DSP code wrote.

    Its rows are a BERT's layers, or a fairseq translation model's encoder self-attention, decoder cross-attention and
    decoder self-attention layers; its columns are heads. Nothing but a tensor is unpickled.

    Args:
        path: the file.
        unit_map: the sites of the model that the mask is for, one per row.

    Raises:
        HeadPruningError: the file is missing, holds something else, or is the mask of another architecture.
    """
    values = load_pickled(path, problem="is no head mask of the published code", cure="give a file such as mask12.pt")
    other = f"{path} does not hold a matrix of zeros and ones; give a mask of the published code, such as mask12.pt."
    if (
        not isinstance(values, torch.Tensor)
        or values.layout is not torch.strided
        or values.is_quantized
        or values.is_complex()
    ):
        raise HeadPruningError(other)
    heads = {site.heads for site in unit_map.attention}
    shape = (len(unit_map.attention), *heads)
    if tuple(values.shape) != shape:
        raise HeadPruningError(
            f"{path} holds a mask of the shape {list(values.shape)}, but the model's sites and heads are "
            f"{list(shape)}; give the model that the mask was made for."
        )
    keep = values.detach().to(torch.float64)
    if not ((keep == 0) | (keep == 1)).all():
        raise HeadPruningError(other)
    return HeadMask(unit_map, keep.numpy())
