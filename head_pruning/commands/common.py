"""What several commands share."""

import json
import sys
from pathlib import Path
from typing import Any, Iterable, Optional

from ..hosts import HostModel
from ..masks import HeadMask
from .flags import LENGTH


def chosen_length(given: Optional[int], models: Iterable[HostModel]) -> int:
    """The tokens of ``--length``; not given, those of the default that all models have positions for."""
    if given is not None:
        return given
    return min(LENGTH, *(model.longest or LENGTH for model in models))


def note(text: str) -> None:
    """Progress, on the error stream."""
    print(text, file=sys.stderr, flush=True)


def note_step(text: str) -> None:
    """Progress of many steps: on a terminal one line that is overwritten, at last by an empty one; else nothing."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def given_mask(path: Optional[str]) -> Optional[HeadMask]:
    """The mask of ``--mask``."""
    return HeadMask.load(path) if path else None


def print_json(data: Any) -> None:
    """One JSON object and nothing else."""
    print(json.dumps(data, allow_nan=False))


def count(value: float) -> str:
    """A count for people: 109,484,547; or 11.17 G."""
    return f"{value:,}" if value < 1e9 else f"{value / 1e9:,.2f} G"


def short(path: "str | Path") -> str:
    """The last two parts of a path, which tell models apart."""
    return "/".join(Path(path).parts[-2:])
