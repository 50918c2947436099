"""Steps that are done once: a manifest with checksums says which need not be done again."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prepare.files import PrepareError, atomic_text, part_path, sha256_file

FORMAT = 1


class Stages:
    """Runs steps and records them in a JSON manifest.

    ``manifest``: the manifest's path. ``base``: the folder that paths in it are relative to.
    ``log`` is called with a line of text per step. PrepareError if the manifest cannot be read.
    """

    def __init__(self, manifest: Path, base: Path, log: Callable[[str], None] = lambda line: None) -> None:
        self.manifest = manifest
        self.base = base
        self.log = log
        self.record: dict[str, Any] = {"format": FORMAT, "archive": None, "stages": {}}
        self._sums: dict[Path, str] = {}
        if manifest.exists():
            try:
                self.record = json.loads(manifest.read_text(encoding="utf-8"))
                readable = self.record["format"] == FORMAT and isinstance(self.record["stages"], dict)
            except (ValueError, KeyError, TypeError):
                readable = False
            if not readable:
                raise PrepareError(f"{manifest} is not a manifest of this program; delete it to start over.")

    def save(self) -> None:
        """Write the manifest, whole or not at all."""
        with atomic_text(self.manifest) as handle:
            json.dump(self.record, handle, indent=1, sort_keys=True)
            handle.write("\n")

    def sha256(self, path: Path) -> str:
        """Hex SHA-256 of ``path``, read at most once per run unless a step rewrites it."""
        if path not in self._sums:
            try:
                self._sums[path] = sha256_file(path)
            except FileNotFoundError:
                raise PrepareError(f"{path} does not exist.") from None
        return self._sums[path]

    def run(
        self,
        name: str,
        inputs: Sequence[Path],
        outputs: Sequence[Path],
        work: Callable[[list[Path]], None],
        **settings: Any,
    ) -> bool:
        """Do ``work`` unless its recorded outputs still stand; True if it was done.

        It is skipped if the manifest has ``name`` with the same ``settings`` (JSON values) and
        the same checksums of ``inputs``, and every one of ``outputs`` still has its checksum.
        ``work`` gets temporary paths to write, one per output; they take the outputs' names
        together after it has returned, so a step that was killed leaves no output behind.
        """
        key = self._key(inputs, outputs, settings)
        done = self.record["stages"].get(name)
        if done and done["key"] == key and self._stands(done["outputs"], outputs):
            self.log(f"{name}: already done")
            return False
        self.log(name)
        parts = [part_path(path) for path in outputs]
        for path in outputs:
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            work(parts)
            for part, path in zip(parts, outputs, strict=True):
                os.replace(part, path)
                self._sums.pop(path, None)
        finally:
            for part in parts:
                part.unlink(missing_ok=True)
        sums = {self._shown(path): {"sha256": self.sha256(path), "bytes": path.stat().st_size} for path in outputs}
        self.record["stages"][name] = {"key": key, "settings": settings, "outputs": sums}
        self.save()
        return True

    def _key(self, inputs: Sequence[Path], outputs: Sequence[Path], settings: dict[str, Any]) -> str:
        # Names of inputs do not count: the same bytes from elsewhere give the same outputs.
        facts = [settings, [self.sha256(path) for path in inputs], [self._shown(path) for path in outputs]]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _stands(self, recorded: dict[str, Any], outputs: Sequence[Path]) -> bool:
        for path in outputs:
            fact = recorded[self._shown(path)]
            if not path.is_file() or path.stat().st_size != fact["bytes"]:
                return False
            # Read anew: a checksum from memory would not notice a file that was changed.
            self._sums.pop(path, None)
            if self.sha256(path) != fact["sha256"]:
                return False
        return True

    def _shown(self, path: Path) -> str:
        return path.relative_to(self.base).as_posix() if path.is_relative_to(self.base) else path.name


@contextmanager
def only_run(lock: Path) -> Iterator[None]:
    """Hold ``lock`` for the block; PrepareError if another process holds it. A kill frees it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "a", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PrepareError(f"Another run is at work in {lock.parent}; wait for it to end.") from None
        yield
