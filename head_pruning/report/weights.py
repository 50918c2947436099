"""What is reported of pruned weights: densities as table and picture, and their part of pruning.json."""

from pathlib import Path
from typing import Any, Iterable, Mapping, NamedTuple, Optional

import torch

from ..errors import HeadPruningError
from ..files import MASKS_FILE, REPORT_FILE, atomic_path, write_json
from ..masks import HeadMask
from ..quantization.engine.tensors import entries
from ..session import PruningSession
from ..surgery.zeros import removed_counts
from ..weights.files import save_weight_masks
from .plots import save_figure
from .report_file import read_report, run_report, zeros_in_all
from .tables import text_table

DENSITY_PICTURE = "weight_density.png"


class WeightCount(NamedTuple):
    """Of pruned tensors: weights that are not zero, weights of heads and blocks that are left, and weights of the
    dense model, removed heads included.
    """

    kept: int
    left: int
    dense: int

    def told(self) -> dict[str, Any]:
        """The entries of a report; those of the dense model only where heads are gone."""
        numbers = {"weights_kept": self.kept, "weights_total": self.left, "density": self.kept / max(1, self.left)}
        if self.dense != self.left:
            numbers |= {"weights_of_dense": self.dense, "density_of_dense": self.kept / max(1, self.dense)}
        return numbers

    def __str__(self) -> str:
        words = f"{self.kept:,} of {self.left:,} weights"
        if self.dense == self.left:
            return words
        share, whole = (self.kept / max(1, number) for number in (self.left, self.dense))
        return f"{words} of what is left ({share:.2%}), {whole:.2%} of the dense model's {self.dense:,}"


def count_weights(
    names: Iterable[str],
    parameters: Mapping[str, torch.Tensor],
    *,
    removed: Mapping[str, int] = {},
    dense: Mapping[str, int] = {},
) -> dict[str, WeightCount]:
    """Count the weights of pruned tensors.

    Args:
        names: of the tensors.
        parameters: the model's tensors by name, masked, removed heads zeroed or cut out.
        removed: by name, how many of a tensor's weights belong to removed heads, which are zero.
        dense: by name, how many weights a tensor had before heads were cut out of it, or with it.
    """
    found = {}
    for name in dict.fromkeys([*names, *dense]):
        tensor = parameters.get(name)
        kept, size = (0, 0) if tensor is None else (int(torch.count_nonzero(entries(tensor))), tensor.numel())
        found[name] = WeightCount(kept, size - removed.get(name, 0), dense.get(name, size))
    return found


def sum_counts(counts: Mapping[str, WeightCount]) -> WeightCount:
    """All tensors together."""
    return WeightCount(*(sum(count[i] for count in counts.values()) for i in range(3)))


def session_counts(session: PruningSession) -> dict[str, WeightCount]:
    """Of the tensors that a session's pruners have masked: what its outcome has, were it fixed now."""
    masks, mask = session.weight_masks(), session.head_mask()
    removed = {} if mask is None else removed_counts(session.model, mask)
    with session.stored():
        parameters = dict(session.model.named_parameters())
        tensors = {name: entries(parameters[name]) * keep.to(parameters[name].device) for name, keep in masks.items()}
    return count_weights(masks, tensors, removed=removed)


def _counts_of_masks(masks: Mapping[str, torch.Tensor]) -> dict[str, WeightCount]:
    return count_weights(masks, masks)


def density_table(masks: Mapping[str, torch.Tensor], counts: Optional[Mapping[str, WeightCount]] = None) -> str:
    """One line per tensor: weights that stay, weights, percent; and all together.

    Where heads are gone, the first three are of what is left, and two more columns of the dense model.

    Args:
        masks: the masks, which are counted where ``counts`` is not given.
        counts: see :func:`count_weights`.
    """
    counts = dict(counts or _counts_of_masks(masks))
    total = sum_counts(counts)
    rows = [(name, c.kept, c.left, _percent(c.kept, c.left)) for name, c in {**counts, "all": total}.items()]
    if total.dense == total.left:
        return text_table(("tensor", "kept", "of", "percent"), rows)
    more = [(c.dense, _percent(c.kept, c.dense)) for c in (*counts.values(), total)]
    wide = [(*row, *extra) for row, extra in zip(rows, more)]
    return text_table(("tensor", "kept", "of", "percent", "of dense", "percent"), wide)


def _percent(part: int, whole: int) -> float:
    return 100.0 * part / max(1, whole)


def plot_densities(counts: Mapping[str, WeightCount], path: "str | Path") -> None:
    """Draw the remaining ratio of each tensor as a bar, and that of all together as a line."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(7.5, 1.2 + 0.2 * len(counts)), layout="constrained")
    panel = figure.subplots()
    bars = [_percent(count.kept, count.left) for count in counts.values()]
    panel.barh(list(counts), bars, color="#3b6fb6", height=0.7)
    total = sum_counts(counts)
    overall = _percent(total.kept, total.left)
    panel.axvline(overall, color="#888888", linestyle=":", label=f"all: {overall:.2f} %")
    panel.set(xlabel="weights that stay, percent", ylim=(len(counts) - 0.4, -0.6))
    panel.tick_params(axis="y", labelsize=7, length=0)
    panel.legend(fontsize=8, frameon=False)
    save_figure(figure, path)


def weight_report(
    counts: Mapping[str, WeightCount],
    parameters: Mapping[str, torch.Tensor],
    *,
    method: str,
    options: Mapping[str, Any],
    left_dense: Mapping[str, int] = {},
) -> dict[str, Any]:
    """What pruning.json says of pruned weights, under ``weights``.

    Args:
        counts: of all tensors under control, see :func:`count_weights`.
        parameters: all parameters of the model by name, masked.
        method: registered name of the pruner.
        options: its options.
        left_dense: names and sizes of the matrices that were not pruned.
    """
    every = sum(tensor.numel() for tensor in parameters.values())
    nonzero = sum(int(torch.count_nonzero(entries(tensor))) for tensor in parameters.values())
    gone = {name: count.dense - count.left for name, count in counts.items() if count.dense != count.left}
    return {
        "method": method,
        "options": dict(options),
        **sum_counts(counts).told(),
        **zeros_in_all(every, nonzero),
        "kept_by_tensor": {name: [count.kept, count.left] for name, count in counts.items()},
        **({"removed_with_heads": gone} if gone else {}),
        **({"left_dense": dict(left_dense)} if left_dense else {}),
    }


def write_weight_artifacts(
    folder: "str | Path",
    masks: Mapping[str, torch.Tensor],
    parameters: Mapping[str, torch.Tensor],
    *,
    method: str,
    options: Mapping[str, Any],
    head_mask: Optional[HeadMask] = None,
    counts: Optional[Mapping[str, WeightCount]] = None,
    left_dense: Mapping[str, int] = {},
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
        counts: of the tensors under control; default: all of their weights count, see :func:`count_weights`.
        left_dense: names and sizes of the matrices that were not pruned.
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
    counts = counts or count_weights(masks, parameters)
    weights = weight_report(counts, parameters, method=method, options=options, left_dense=left_dense)
    if head_mask is not None and known.is_file():
        report = read_report(known)
    else:
        sparsity = zeros_in_all(weights["parameters"], weights["nonzero_parameters"])
        report = run_report(method=method, options=options, sparsity=sparsity, history=history, versions=versions)
    with atomic_path(folder / "weight_density.txt") as temporary:
        temporary.write_text(density_table(masks, counts) + "\n", encoding="utf-8")
    plot_densities(counts, folder / DENSITY_PICTURE)
    write_json(known, {**report, "weights": weights})  # last: where it is, all is
