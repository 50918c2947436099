"""Unpacking a tar archive safely, with damage found before anything is used."""

from __future__ import annotations

import lzma
import os
import shutil
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from prepare.files import PrepareError

_DAMAGE = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError)


def unpack(archive: Path, names: Sequence[str], targets: Sequence[Path]) -> None:
    """Unpack the files ``names`` of a tar archive (compressed or not) to ``targets``, one for one.

    A member is found by its file name, in whatever folder of the archive it lies. All of the
    archive is read, so that a broken tail is noticed. PrepareError if the archive is missing or
    damaged, holds an unsafe path, or lacks a name or has it twice.
    """
    if not archive.is_file():
        raise PrepareError(f"{archive} does not exist.")
    scratch = targets[0].with_name(archive.name + ".unpacked")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        try:
            with tarfile.open(archive, "r:*") as tar:
                tar.extractall(scratch, filter="data")
                # tarfile stops at the end mark; the checksum of gzip lies behind it.
                while tar.fileobj.read(1 << 20):
                    pass
        except tarfile.FilterError as error:
            raise PrepareError(f"{archive} was not unpacked, as it holds an unsafe path ({error}).") from None
        except _DAMAGE as error:
            # With an errno it is the disk that failed; decompressors raise OSError without one.
            if getattr(error, "errno", None) is not None:
                raise
            reason = str(error).partition("\n")[0].rstrip(":")
            raise PrepareError(f"{archive} is damaged or is no tar archive ({reason}).") from None
        for path, target in zip(find_members(scratch, names, str(archive)), targets, strict=True):
            os.replace(path, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def find_members(folder: Path, names: Sequence[str], shown: str) -> list[Path]:
    """The one regular file of each of ``names`` in or below ``folder``, in the order of ``names``.

    PrepareError, with ``shown`` as the name of the place, if any is missing or there twice.
    """
    places: dict[str, list[Path]] = {name: [] for name in names}
    for path in sorted(folder.rglob("*")):
        # macOS archives carry "._name" twins; those have other names and are passed over.
        if path.name in places and path.is_file() and not path.is_symlink():
            places[path.name].append(path)
    if missing := [name for name in names if not places[name]]:
        raise PrepareError(f"{shown} lacks {', '.join(missing)}.")
    if twice := [name for name in names if len(places[name]) > 1]:
        raise PrepareError(f"{shown} holds {', '.join(twice)} more than once.")
    return [places[name][0] for name in names]
