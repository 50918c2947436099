"""What every pruning.json says."""

import platform
from pathlib import Path
from typing import Any, Mapping, Optional

import numpy as np
import safetensors
import torch

from ..compact.shapes import Number, Whole
from ..files import read_json
from ..masks import HeadMask

_COUNTS = {str: Whole()}
_WEIGHTS = {
    "method?": str,
    "options?": dict,
    "weights_kept?": Whole(),
    "weights_total?": Whole(),
    "density?": Number(0),
    "weights_of_dense?": Whole(),
    "density_of_dense?": Number(0),
    "kept_by_tensor?": {str: (Whole(), Whole())},
    "removed_with_heads?": _COUNTS,
    "left_dense?": _COUNTS,
}
#: What a pruning.json is; other entries are not read back.
REPORT = {
    "method?": str,
    "options?": dict,
    "history?": [dict],
    "sparsity?": dict,
    "versions?": dict,
    "weights?": _WEIGHTS,
    "kept_heads_by_site?": {str: [Whole()]},
}


def read_report(path: "str | Path") -> dict[str, Any]:
    """What a run's pruning.json says; empty where there is none. Raises HeadPruningError when it is damaged."""
    if not Path(path).is_file():
        return {}
    return read_json(path, REPORT, cure="move it away, or take the one that was saved with the model")


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
