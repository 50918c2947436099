"""Files written whole or not at all, checksums, and the one error a user is shown."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


class PrepareError(Exception):
    """Bad input or a failed step; its text is one sentence that says what to do about it."""


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of the bytes of ``path`` (64 characters); OSError if it cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_dest(dest: Path, stamp: str, folders: Sequence[str]) -> None:
    """Raise PrepareError where one of the ``folders`` of ``dest`` is there without the file ``stamp``.

    It is somebody else's then, and would be replaced.
    """
    theirs = next((dest / name for name in folders if (dest / name).exists()), None)
    if theirs is not None and not (dest / stamp).is_file():
        raise PrepareError(
            f"{theirs} was not made by this command, which would replace it; give another --dest, or move it away."
        )


def begin_dest(dest: Path, stamp: str) -> None:
    """Make ``dest``, and say in its file ``stamp`` that its folders are not finished."""
    dest.mkdir(parents=True, exist_ok=True)
    part = part_path(dest / stamp)
    part.write_text("{}\n", encoding="utf-8")
    part.replace(dest / stamp)


def part_path(path: Path) -> Path:
    """The temporary name, in the same folder, under which ``path`` is written."""
    return path.with_name(path.name + ".part")


def copy_file(source: Path, path: Path) -> None:
    """Copy a file; ``path`` appears whole or not at all."""
    part = part_path(path)
    try:
        shutil.copyfile(source, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def atomic_text(path: Path) -> Iterator[TextIO]:
    """Open a UTF-8 text file that takes the name ``path`` only once the block has ended well.

    Line ends are written as given (no ``\\r\\n`` translation). After an exception the temporary
    file is removed and an older ``path`` is left as it was.
    """
    part = part_path(path)
    try:
        with open(part, "w", encoding="utf-8", newline="\n") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file without their ``\\n``.

    Only ``\\n`` ends a line: U+2028, ``\\r`` and form feeds stay inside lines, as they do for
    the shell tools of the original pipeline, so that both sides of a corpus keep their pairing.
    PrepareError if the file is missing or is not UTF-8.
    """
    try:
        with open(path, encoding="utf-8", newline="\n") as handle:
            return [line.removesuffix("\n") for line in handle]
    except FileNotFoundError:
        raise PrepareError(f"{path} does not exist.") from None
    except UnicodeDecodeError as error:
        raise PrepareError(f"{path} is not valid UTF-8 ({error.reason} at byte {error.start}).") from None


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write ``lines`` to ``path``, each followed by ``\\n``; no half-written file is ever left."""
    with atomic_text(path) as handle:
        handle.writelines(line + "\n" for line in lines)
