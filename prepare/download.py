"""One file over HTTP: resumed after a break, checked, and named only when it is whole."""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from head_pruning.progress import bar_options
from prepare.files import PrepareError, atomic_text, part_path, sha256_file

_BLOCK = 1 << 16
_BROKEN = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


class _Incomplete(Exception):
    """The connection ended early; what has come is in the part file."""


def check_sha256(path: Path, expected: str | None) -> str:
    """The hex SHA-256 of ``path``; PrepareError if ``expected`` is given and differs (case aside)."""
    found = sha256_file(path)
    if expected is not None and found != expected.lower():
        raise PrepareError(f"{path} has SHA-256 {found}, but {expected.lower()} was expected.")
    return found


def download(
    url: str,
    target: Path,
    sha256: str | None = None,
    quiet: bool = False,
    timeout: float = 60.0,
    attempts: int = 5,
    pause: float = 2.0,
) -> str:
    """Fetch ``url`` to ``target`` and return the file's hex SHA-256.

    What has arrived lies in ``target.part`` and is kept when the run is killed or the connection
    breaks; the next call asks for the rest only (HTTP Range), provided that the server still
    names the same version (ETag or Last-Modified) or names none. ``target`` appears when all bytes
    are there and, if ``sha256`` is given, fit it. ``timeout``: seconds without a byte;
    ``attempts``: connections in all, ``pause`` seconds apart.
    PrepareError if the file cannot be had, stays incomplete, or has another checksum (it is then
    deleted, as resuming it could not mend it).
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = part_path(target)
    for attempt in range(1, attempts + 1):
        try:
            _fetch_rest(url, part, quiet, timeout)
            break
        except urllib.error.HTTPError as error:
            if error.code < 500 or attempt == attempts:
                raise PrepareError(f"{url} cannot be downloaded: HTTP {error.code} {error.reason}.") from None
        except (*_BROKEN, _Incomplete) as error:
            if attempt == attempts:
                reason = getattr(error, "reason", error)
                raise PrepareError(f"Downloading {url} broke off ({reason}); run again to resume it.") from None
        time.sleep(pause)
    try:
        found = check_sha256(part, sha256)
    except PrepareError as error:
        part.unlink()
        _note_path(part).unlink(missing_ok=True)
        raise PrepareError(f"The download of {url} was discarded: {error}") from None
    os.replace(part, target)
    _note_path(part).unlink(missing_ok=True)
    return found


def _note_path(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _fetch_rest(url: str, part: Path, quiet: bool, timeout: float) -> None:
    """Append to ``part`` what it lacks of ``url``; start over where the server cannot resume."""
    have = part.stat().st_size if part.exists() else 0
    note = _read_note(part)
    if have and note.get("url") != url:
        have = 0
    headers = {"User-Agent": "prepare-iwslt14", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if note.get("version"):
            headers["If-Range"] = note["version"]
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        # Nothing lies beyond what we have: either all of it came, or the file has changed.
        total = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
        if total and int(total[1]) == have:
            return
        part.unlink()
        raise _Incomplete("the part file did not fit the server's file") from None
    with response:
        begin, total = _span(response)
        if begin != have:
            begin = 0
            if response.status == 206:
                part.unlink(missing_ok=True)
                raise _Incomplete("the server sent another part than was asked for")
        # A weak ETag must not be used in If-Range.
        tag = response.headers.get("ETag") or ""
        version = tag if tag.startswith('"') else response.headers.get("Last-Modified")
        with atomic_text(_note_path(part)) as handle:
            json.dump({"url": url, "version": version}, handle)
        with (
            open(part, "ab" if begin else "wb") as handle,
            tqdm(total=total, initial=begin, unit="B", unit_scale=True, disable=quiet, **bar_options()) as bar,
        ):
            while block := response.read(_BLOCK):
                handle.write(block)
                bar.update(len(block))
            size = handle.tell()
    if total is not None and size != total:
        raise _Incomplete(f"{size} of {total} bytes came")


def _read_note(part: Path) -> dict:
    try:
        return json.loads(_note_path(part).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _span(response: http.client.HTTPResponse) -> tuple[int, int | None]:
    """(offset of the first byte of the answer, size of the whole file if known)."""
    if response.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if not found:
            return -1, None
        return int(found[1]), None if found[2] == "*" else int(found[2])
    length = response.headers.get("Content-Length")
    return 0, int(length) if length else None
