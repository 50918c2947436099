"""Checks of what a run starts from and of where it writes, before anything large is loaded."""

from pathlib import Path

from head_pruning import HeadMask, HeadPruningError
from head_pruning.artifacts import MASKS_FILE
from head_pruning.hosts import holds_heads
from head_pruning.surgery import sites_left

from .host import recipe


def refuse_masked_start(folder: "str | Path") -> None:
    """Raise if ``folder`` is a model whose heads were pruned by zeroing them.

    Nothing in its weights tells a zeroed head from one that is there, so a method that prunes it counts all of them.
    Compact folders, which have only the heads that stay, and names on the hub are fine.

    Args:
        folder: what ``--model_name_or_path`` says.

    Raises:
        HeadPruningError: ``masks.safetensors`` in the folder removes heads that the model still has, or is damaged.
    """
    file = Path(folder) / MASKS_FILE
    if not file.is_file() or not holds_heads(file):
        return
    mask = HeadMask.load(file)
    if mask.keep.all() or _cut_out_already(Path(folder), mask):
        return
    raise HeadPruningError(
        f"{folder} was pruned to {mask.kept} of {mask.keep.size} heads already, and its zeroed heads would count as "
        f"kept; run head-pruning export {folder} SMALL --to compact and start from SMALL, or from the dense model."
    )


def _cut_out_already(folder: Path, mask: HeadMask) -> bool:
    """Whether the mask is of a compact model's original; that of what it has left removes more."""
    cut = recipe(folder)
    return cut is not None and not mask.fits(sites_left(cut))
