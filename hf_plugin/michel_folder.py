"""The folder of a Michel run: what may lie there before, and what is left there by an earlier run."""

import shutil
from pathlib import Path
from typing import Sequence

from head_pruning import HeadPruningError
from head_pruning.importance.rounds import MASKS_FOLDER, ROUNDS_FILE

from .host import COMPANIONS
from .starting import REPORTS, make_folder, refuse_taken

RESULTS_FILE = "all_results.json"

# Beside the tokenizer's files.
_MODEL = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "compact_heads.py")


def open_folder(output_dir: "str | Path", start: str, overwrite: bool) -> Path:
    """The folder that a run writes to, made if missing; nothing in it is touched.

    Args:
        output_dir: what ``--output_dir`` says.
        start: what ``--model_name_or_path`` says.
        overwrite: whether the folder may hold the model of another run.

    Raises:
        HeadPruningError: it cannot be made or written, is the start model's own, or holds files of another run that
            this one would write over.
    """
    out = make_folder(output_dir)
    if Path(start).is_dir() and out.resolve() == Path(start).resolve():
        raise HeadPruningError(
            f"--output_dir {out} is the start model's own folder, where the pruned model would take its place; choose "
            "another --output_dir."
        )
    if not overwrite and not (out / ROUNDS_FILE).exists():
        refuse_taken(out)
    return out


def clear(out: Path) -> None:
    """Remove what an earlier Michel run wrote; a folder without one is left as it is."""
    if not (out / ROUNDS_FILE).exists():
        return
    shutil.rmtree(out / MASKS_FOLDER, ignore_errors=True)
    for unfinished in out.glob(".saving-*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    written = (RESULTS_FILE, *REPORTS, *_MODEL)
    for path in out.iterdir():
        ours = COMPANIONS.fullmatch(path.name) or any(path.match(pattern) for pattern in written)
        if ours and path.is_file():
            path.unlink()
    # Last: what is cut off on the way is cleared by the next call.
    (out / ROUNDS_FILE).unlink()


def model_round(rounds: Sequence[dict]) -> dict:
    """The entry whose mask the folder's model gets: the fewest heads, but not none where another round leaves some.

    The last round always removes the last head, and nobody wants that model.
    """
    return ([entry for entry in rounds[1:] if entry["heads"]] or rounds)[-1]
