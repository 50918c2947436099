"""A corpus of few large files, spread over a file of documents for each shard in one pass.

A shard of every so many-th document would otherwise read all of the corpus. Files lie in the folder of the shards; one
that has its name is whole, and is removed once its shard is written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from prepare.files import PrepareError, part_path


def spread_path(folder: Path, shard: int, shards: int) -> Path:
    """The file of a shard's documents."""
    return folder / f".documents-{shard:05d}-of-{shards:05d}.jsonl"


def spread(
    texts: Iterable[str],
    folder: Path,
    wanted: Iterable[int],
    shards: int,
    tell: Callable[[int], object],
    waiting_characters: int = 2**24,
) -> None:
    """Write the documents of the wanted shards: of shard i those whose number is i more than a multiple of ``shards``.

    ``tell``: called with 1 for each document that was read. ``waiting_characters``: how many are written at once, of
    all files together; each file is opened anew for them, as a process may hold fewer open than there are shards.
    """
    paths = {shard: spread_path(folder, shard, shards) for shard in wanted}
    parts = {shard: part_path(path) for shard, path in paths.items()}
    waiting: dict[int, list[str]] = {shard: [] for shard in paths}

    def write() -> None:
        for shard, lines in waiting.items():
            with open(parts[shard], "a", encoding="utf-8", newline="\n") as handle:
                handle.writelines(lines)
            lines.clear()

    try:
        for part in parts.values():
            part.write_bytes(b"")  # of a run that was killed there may be one
        size = 0
        for number, text in enumerate(texts):
            tell(1)
            lines = waiting.get(number % shards)
            if lines is None:
                continue
            lines.append(json.dumps(text) + "\n")
            size += len(lines[-1])
            if size >= waiting_characters:
                write()
                size = 0
        write()
        for shard, path in paths.items():
            os.replace(parts[shard], path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def documents_of(path: Path) -> Iterator[str]:
    """The texts of a file that :func:`spread` wrote. PrepareError where it is damaged."""
    with open(path, encoding="utf-8") as handle:
        for line in handle:
            try:
                yield json.loads(line)
            except ValueError:
                raise PrepareError(f"{path} is damaged; remove it and run again.") from None
