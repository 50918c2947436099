"""The file of a Michel run: one entry per finished round, enough to go on after the last."""

import math
import os
from pathlib import Path
from typing import Any, Mapping, Optional

import numpy as np

from ..compact.shapes import Either, Number, Whole
from ..errors import HeadPruningError, one_line
from ..files import read_json, write_json
from ..masks import HeadMask
from ..unit_map import UnitMap
from .michel import PruningRound

ROUNDS_FILE = "michel_rounds.json"
MASKS_FOLDER = "michel_masks"
_ENTRY = {
    "heads": Whole(),
    "score": Either(None, Number()),
    "kept_heads_by_site": {str: [Whole()]},
    "importance": Either(None, [Number()]),
}
_FILE = {"rounds": [_ENTRY], "unit_map": dict, "settings": dict}


class RoundsReport:
    """``michel_rounds.json`` and ``michel_masks/`` in a folder.

    Args:
        folder: where they lie.
        settings: what the rounds depend on; rounds of other settings are neither gone on with nor replaced.
        unit_map: the model's sites.
        flags: how the host's command line spells a setting, where that is not ``--name``.
        cure: what to do about rounds of other settings, in the host's spelling.

    Raises:
        HeadPruningError: the file is damaged, of another architecture, or of other settings.
    """

    def __init__(
        self,
        folder: "str | Path",
        settings: Mapping[str, Any],
        unit_map: UnitMap,
        *,
        flags: Optional[Mapping[str, str]] = None,
        cure: str = "choose another folder",
    ) -> None:
        self.path = Path(folder) / ROUNDS_FILE
        self.settings = dict(settings)
        self.unit_map = unit_map
        self.flags, self.cure = dict(flags or {}), cure
        self.entries: list[dict] = []
        self.start: Optional[PruningRound] = None
        if self.path.exists():
            self._read()

    @property
    def finished(self) -> bool:
        """Whether no head was left to remove when the file was read."""
        return self.start is not None and not self.start.mask.kept

    def _read(self) -> None:
        data = read_json(self.path, _FILE, cure="move it away to start anew")
        entries, settings = data["rounds"], data["settings"]
        if not entries:
            return
        try:
            theirs = UnitMap.from_dict(data["unit_map"])
            masks = [self.mask(entry, theirs) for entry in entries]
            if [mask.kept for mask in masks] != [entry["heads"] for entry in entries]:
                raise ValueError("its heads are not as many as it says")
            if any(len(entry["importance"] or masks[0].keep) != masks[0].keep.size for entry in entries):
                raise ValueError("there is not one importance for each head")
        except (KeyError, ValueError) as error:
            raise HeadPruningError(
                f"{self.path} is damaged ({one_line(error)}); move it away to start anew."
            ) from error
        last = entries[-1]
        start = last["score"], None if last["importance"] is None else np.array(last["importance"])
        # Another model first of all differs in its settings: they say which.
        self._check_settings(settings)
        theirs.check_same_heads(self.unit_map, str(self.path))
        self.entries = entries
        self.start = PruningRound(HeadMask(self.unit_map, masks[-1].keep), *start)

    def _check_settings(self, theirs: Mapping[str, Any]) -> None:
        # A file may be older than a setting: one that is missing there was not set.
        names = dict.fromkeys((*self.settings, *theirs))
        other = [name for name in names if not _same(theirs.get(name), self.settings.get(name))]
        if other:
            told = ", ".join(self._told(name, theirs.get(name), self.settings.get(name)) for name in other)
            raise HeadPruningError(f"{self.path} holds the rounds of another run ({told}); {self.cure}.")

    def _told(self, name: str, theirs: Any, mine: Any) -> str:
        flag = self.flags.get(name, f"--{name}")
        if any(isinstance(value, (float, dict)) for value in (theirs, mine)):  # sums and fingerprints say nothing
            return f"another {flag}"
        was, now = ("not set" if value is None else value for value in (theirs, mine))
        return f"{flag:.80} was {was!s:.80} and is now {now!s:.80}"

    def mask(self, entry: Mapping[str, Any], unit_map: Optional[UnitMap] = None) -> HeadMask:
        """The heads that an entry keeps."""
        unit_map = unit_map or self.unit_map
        kept = {site: set(heads) for site, heads in entry["kept_heads_by_site"].items()}
        keep = [head in kept[site.name] for site in unit_map.sites for head in range(site.heads)]
        return HeadMask(unit_map, np.array(keep))

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


def _same(one: Any, other: Any) -> bool:
    """Equality, but for the last digits of a float: a sum of weights depends on the device and its threads."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-9)
    return one == other


def fingerprint(path: "str | Path") -> dict[str, Any]:
    """What tells one file from another of the same name."""
    found = os.stat(path)
    return {"name": os.path.basename(path), "bytes": found.st_size, "modified_ns": found.st_mtime_ns}
