"""The two files that every pruned model leaves: pruning.json and masks.safetensors."""

from pathlib import Path
from typing import Any, Mapping, Optional

from ..files import MASKS_FILE, REPORT_FILE, write_json
from ..masks import HeadMask
from .report_file import counts_told, run_report, zeros_in_all


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
    folder = Path(folder)
    mask.save(folder / MASKS_FILE)
    counts = mask.counts()
    sparsity: dict[str, Any] = {f"{name}_removed": 1.0 - kept / total for name, (kept, total) in counts.items()}
    if parameters is not None:
        sparsity |= zeros_in_all(*parameters)
    if compact_parameters is not None:
        sparsity["compact_parameters"] = compact_parameters
    report = run_report(method=method, options=options, sparsity=sparsity, history=history, versions=versions)
    write_json(folder / REPORT_FILE, {**report, **counts_told(mask), "kept_heads_by_site": mask.kept_heads()})
