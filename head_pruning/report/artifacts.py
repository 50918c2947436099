"""The two files that every pruned model leaves: pruning.json and masks.safetensors."""

import platform
from pathlib import Path
from typing import Any, Mapping, Optional

import numpy as np
import safetensors
import torch

from ..artifacts import MASKS_FILE, REPORT_FILE, write_json
from ..unit_map import HeadMask


def write_artifacts(
    folder: "str | Path",
    mask: HeadMask,
    *,
    method: str,
    options: Mapping[str, Any],
    history: Optional[list] = None,
    versions: Optional[Mapping[str, str]] = None,
    parameters: Optional[tuple[int, int]] = None,
    compact_parameters: Optional[int] = None,
) -> None:
    """Write masks.safetensors and pruning.json into ``folder``, atomically.

    Args:
        folder: where to.
        mask: the heads that stay.
        method: registered name of the pruner.
        options: its options.
        history: one entry per scored state.
        versions: versions of the host's libraries.
        parameters: parameters of the dense model, and how many of them are not zero once the heads are zeroed.
        compact_parameters: parameters of the model that is left when its heads are cut out.
    """
    from .. import __version__

    folder = Path(folder)
    mask.save(folder / MASKS_FILE)
    sparsity: dict[str, Any] = {"heads_removed": 1.0 - mask.kept / mask.keep.size}
    if parameters is not None:
        sparsity["parameters"], sparsity["nonzero_parameters"] = parameters
        sparsity["zeros_of_all_parameters"] = 1.0 - parameters[1] / parameters[0]
    if compact_parameters is not None:
        sparsity["compact_parameters"] = compact_parameters
    write_json(
        folder / REPORT_FILE,
        {
            "method": method,
            "options": dict(options),
            "heads_kept": mask.kept,
            "heads_total": mask.keep.size,
            "kept_heads_by_site": mask.kept_heads(),
            "sparsity": sparsity,
            "history": history or [],
            "versions": {
                "head_pruning": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": np.__version__,
                "safetensors": safetensors.__version__,
                **(versions or {}),
            },
        },
    )
