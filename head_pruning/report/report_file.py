"""What every pruning.json says."""

import platform
from typing import Any, Mapping, Optional

import numpy as np
import safetensors
import torch

from ..masks import HeadMask


def run_report(
    *,
    method: str,
    options: Mapping[str, Any],
    sparsity: Mapping[str, Any],
    history: Optional[list] = None,
    versions: Optional[Mapping[str, str]] = None,
) -> dict[str, Any]:
    """What every pruning.json says, whatever was pruned; heads and weights add entries of their own.

    Args:
        method: registered names of the pruners, joined by ``+``.
        options: their options.
        sparsity: what is gone of the whole model.
        history: one entry per scored state.
        versions: versions of the host's libraries.
    """
    from .. import __version__

    return {
        "method": method,
        "options": dict(options),
        "sparsity": dict(sparsity),
        "history": history or [],
        "versions": {
            "head_pruning": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "safetensors": safetensors.__version__,
            **(versions or {}),
        },
    }


def counts_told(mask: HeadMask) -> dict[str, int]:
    """``heads_kept`` and ``heads_total``, and the same of units where they are numbered."""
    of = mask.counts().items()
    return {f"{name}_{what}": count for name, pair in of for what, count in zip(("kept", "total"), pair)}


def zeros_in_all(parameters: int, nonzero: int) -> dict[str, Any]:
    """The part of ``sparsity`` that counts a whole model's parameters, and those of them that are not zero."""
    return {
        "parameters": parameters,
        "nonzero_parameters": nonzero,
        "zeros_of_all_parameters": 1.0 - nonzero / max(1, parameters),
    }
