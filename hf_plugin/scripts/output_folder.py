"""Checks of what a run starts from and of where it writes, before anything large is loaded."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Iterable

from head_pruning import HeadMask, HeadPruningError
from head_pruning.files import MASKS_FILE, REPORT_FILE, SIZES_FOLDER
from head_pruning.hosts import holds_heads
from head_pruning.quantization.engine.files import QUANTIZATION_FILE
from head_pruning.report.weights import DENSITY_PICTURE
from head_pruning.surgery.remaining import sites_left

from ..host import recipe
from ..saving.folders import PICTURE

#: What a run writes about its model, beside it.
REPORTS = ("README.md", REPORT_FILE, MASKS_FILE, PICTURE, DENSITY_PICTURE, "weight_density.txt", QUANTIZATION_FILE)
# What a run must not write over unasked.
_WRITTEN = ("*.safetensors", "config.json", *REPORTS)


def make_folder(output_dir: "str | Path") -> Path:
    """The folder that a run writes to, made if missing. Raises HeadPruningError if it cannot be made or written."""
    out = Path(output_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"{out} is a file" if out.is_file() else error.strerror or error
        raise HeadPruningError(f"--output_dir {out} cannot be made ({reason}); choose another.") from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise HeadPruningError(f"--output_dir {out} cannot be written; choose another.")
    return out


def clear_folders(out: Path, pattern: str, names: Iterable[str]) -> None:
    """Remove the smaller models of an earlier run and its folders of this pattern.

    Args:
        out: the run's folder.
        pattern: of folders in it.
        names: paths that the new run reads; the folders in which they lie stay.
    """
    named = [Path(name).resolve() for name in names]
    for folder in (*out.glob(pattern), *out.glob(f"{SIZES_FOLDER}/*")):
        place = folder.resolve()
        if folder.is_dir() and not any(place in (path, *path.parents) for path in named):
            shutil.rmtree(folder)
    with contextlib.suppress(OSError):  # there is none, or one stays in it
        (out / SIZES_FOLDER).rmdir()


def refuse_taken(out: Path) -> None:
    """Raise HeadPruningError if ``out`` holds files of another run that a model would be written over."""
    taken = [found for name in _WRITTEN for found in out.glob(name)]
    if taken:
        raise HeadPruningError(
            f"{out} already holds a model or other files ({taken[0].name}) that this run would write over; choose "
            "another --output_dir or add --overwrite_output_dir."
        )


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
        f"{folder} was pruned to {mask.words} already, and its zeroed heads would count as "
        f"kept; run head-pruning export {folder} SMALL --to compact and start from SMALL, or from the dense model."
    )


def _cut_out_already(folder: Path, mask: HeadMask) -> bool:
    """Whether the mask is of a compact model's original; that of what it has left removes more."""
    cut = recipe(folder)
    return cut is not None and not mask.fits(sites_left(cut).numbering(mask.unit_map.units))
