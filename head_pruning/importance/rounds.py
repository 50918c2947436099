"""The file of a Michel run: one entry per finished round, enough to go on after the last."""

import json
import os
from pathlib import Path
from typing import Any, Mapping, Optional

import numpy as np

from ..artifacts import write_json
from ..errors import HeadPruningError
from ..unit_map import HeadMask, UnitMap
from .michel import PruningRound

ROUNDS_FILE = "michel_rounds.json"
MASKS_FOLDER = "michel_masks"


class RoundsReport:
    """``michel_rounds.json`` and ``michel_masks/`` in a folder.

    Args:
        folder: where they lie.
        settings: what the rounds depend on; rounds of other settings are not gone on with.
        unit_map: the model's sites.

    Raises:
        HeadPruningError: the file is damaged, or of another architecture.
    """

    def __init__(self, folder: "str | Path", settings: Mapping[str, Any], unit_map: UnitMap) -> None:
        self.path = Path(folder) / ROUNDS_FILE
        self.settings = dict(settings)
        self.unit_map = unit_map
        self.entries: list[dict] = []
        self.start: Optional[PruningRound] = None
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            entries, theirs = data["rounds"], UnitMap.from_dict(data["unit_map"])
            if _set(data["settings"]) != _set(self.settings) or not entries:
                return
        except (KeyError, TypeError, ValueError) as error:
            raise HeadPruningError(f"{self.path} is damaged ({error!r}); move it away to start anew.") from error
        theirs.check_same_heads(self.unit_map, str(self.path))
        last = entries[-1]
        sites = self.unit_map.attention
        kept = [head in last["kept_heads_by_site"][site.name] for site in sites for head in range(site.heads)]
        scores = None if last["importance"] is None else np.array(last["importance"])
        self.entries = entries
        self.start = PruningRound(HeadMask(self.unit_map, np.array(kept)), last["score"], scores)

    def add(self, result: PruningRound, **more: Any) -> dict:
        """Write a finished round with further values, and its mask; returns the entry."""
        entry = {
            "heads": result.mask.kept,
            "removed_percent": 100.0 * (1.0 - result.mask.kept / result.mask.keep.size),
            "score": result.score,
            "kept_heads_by_site": result.mask.kept_heads(),
            "importance": None if result.importance is None else result.importance.tolist(),
            **more,
        }
        self.entries.append(entry)
        result.mask.save(self.path.parent / MASKS_FOLDER / f"heads{result.mask.kept}.safetensors")
        write_json(self.path, {"settings": self.settings, "unit_map": self.unit_map.to_dict(), "rounds": self.entries})
        return entry


def _set(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are set: a file may be older than one of them."""
    return {name: value for name, value in dict(settings).items() if value is not None}


def fingerprint(path: "str | Path") -> dict[str, Any]:
    """What tells one file from another of the same name."""
    found = os.stat(path)
    return {"name": os.path.basename(path), "bytes": found.st_size, "modified_ns": found.st_mtime_ns}
