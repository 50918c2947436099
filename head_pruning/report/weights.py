"""What is reported of pruned weights: densities as table and picture, and their part of pruning.json."""

import json
from pathlib import Path
from typing import Any, Mapping, Optional

import torch

from ..errors import HeadPruningError
from ..files import MASKS_FILE, REPORT_FILE, atomic_path, write_json
from ..masks import HeadMask
from ..weights.files import save_weight_masks
from .report_file import run_report, zeros_in_all
from .tables import text_table

DENSITY_PICTURE = "weight_density.png"


def densities(masks: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, int]]:
    """Parameter name to (weights that stay, weights)."""
    return {name: (int(torch.count_nonzero(mask)), mask.numel()) for name, mask in masks.items()}


def density_table(masks: Mapping[str, torch.Tensor]) -> str:
    """One line per tensor: weights that stay, weights, percent; and all together."""
    rows = [(name, kept, total, 100.0 * kept / total) for name, (kept, total) in densities(masks).items()]
    kept, total = sum(row[1] for row in rows), sum(row[2] for row in rows)
    return text_table(("tensor", "kept", "of", "percent"), [*rows, ("all", kept, total, 100.0 * kept / max(1, total))])


def plot_densities(masks: Mapping[str, torch.Tensor], path: "str | Path") -> None:
    """Draw the remaining ratio of each tensor as a bar, and that of all together as a line, to a PNG."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    counted = densities(masks)
    figure = Figure(figsize=(7.5, 1.2 + 0.2 * len(counted)), layout="constrained")
    panel = figure.subplots()
    panel.barh(list(counted), [100.0 * kept / total for kept, total in counted.values()], color="#3b6fb6", height=0.7)
    overall = 100.0 * sum(kept for kept, _ in counted.values()) / max(1, sum(total for _, total in counted.values()))
    panel.axvline(overall, color="#888888", linestyle=":", label=f"all: {overall:.2f} %")
    panel.set(xlabel="weights that stay, percent", ylim=(len(counted) - 0.4, -0.6))
    panel.tick_params(axis="y", labelsize=7, length=0)
    panel.legend(fontsize=8, frameon=False)
    with atomic_path(Path(path).with_suffix(".png")) as temporary:
        figure.savefig(temporary, dpi=150, metadata={"Software": None})


def weight_report(
    masks: Mapping[str, torch.Tensor],
    parameters: Mapping[str, torch.Tensor],
    *,
    method: str,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """What pruning.json says of pruned weights, under ``weights``.

    Args:
        masks: parameter name to mask, of all tensors under control.
        parameters: all parameters of the model by name, masked.
        method: registered name of the pruner.
        options: its options.
    """
    counted = densities(masks)
    kept, total = (sum(pair[i] for pair in counted.values()) for i in (0, 1))
    every = sum(tensor.numel() for tensor in parameters.values())
    nonzero = sum(int(torch.count_nonzero(tensor.detach())) for tensor in parameters.values())
    return {
        "method": method,
        "options": dict(options),
        "weights_kept": kept,
        "weights_total": total,
        "density": kept / max(1, total),
        **zeros_in_all(every, nonzero),
        "kept_by_tensor": {name: list(pair) for name, pair in counted.items()},
    }


def write_weight_artifacts(
    folder: "str | Path",
    masks: Mapping[str, torch.Tensor],
    parameters: Mapping[str, torch.Tensor],
    *,
    method: str,
    options: Mapping[str, Any],
    head_mask: Optional[HeadMask] = None,
    history: Optional[list] = None,
    versions: Optional[Mapping[str, str]] = None,
) -> None:
    """Write pruning.json, masks.safetensors, and the densities as table and picture, weight_density.txt and .png.

    Where heads are pruned too, call it after ``head_pruning.report.artifacts.write_artifacts``, with the same head
    mask: pruning.json gains ``weights``, masks.safetensors the masks.

    Args:
        folder: where to.
        masks: parameter name to mask, of all tensors under control.
        parameters: all parameters of the model by name, masked.
        method: registered name of the pruner.
        options: its options.
        head_mask: the heads that stay; None if none were pruned.
        history: one entry per scored state; not read where heads are pruned too.
        versions: versions of the host's libraries; likewise.

    Raises:
        HeadPruningError: there is no mask.
    """
    if not masks:
        raise HeadPruningError("There is no weight mask yet; call session.harden() first.")
    folder = Path(folder)
    save_weight_masks(folder / MASKS_FILE, masks, head_mask)
    known = folder / REPORT_FILE
    weights = weight_report(masks, parameters, method=method, options=options)
    if head_mask is not None and known.is_file():
        report = json.loads(known.read_text(encoding="utf-8"))
    else:
        sparsity = zeros_in_all(weights["parameters"], weights["nonzero_parameters"])
        report = run_report(method=method, options=options, sparsity=sparsity, history=history, versions=versions)
    write_json(known, {**report, "weights": weights})
    with atomic_path(folder / "weight_density.txt") as temporary:
        temporary.write_text(density_table(masks) + "\n", encoding="utf-8")
    plot_densities(masks, folder / DENSITY_PICTURE)
