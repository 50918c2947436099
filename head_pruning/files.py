"""Files that appear whole or not at all, and are never unpickled."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Iterator, Mapping

import numpy as np

from .errors import HeadPruningError

MASKS_FILE = "masks.safetensors"
REPORT_FILE = "pruning.json"


@contextlib.contextmanager
def atomic_path(path: "str | Path") -> Iterator[Path]:
    """Yield a temporary name beside ``path``; on success rename it to ``path``, else remove it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files private; give them the mode that open() would have given.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: "str | Path", data: "Mapping | list") -> None:
    """Write ``data`` as indented JSON, atomically. Raises ValueError for numbers that JSON does not have."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_safetensors(path: "str | Path", tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write numpy arrays and string metadata to ``path``; equal content gives equal bytes."""
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, str(path), dict(metadata))
    sort_metadata(path)


def sort_metadata(path: "str | Path") -> None:
    """Put the metadata of a safetensors file in order, in place: the library writes them in a random one."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if "__metadata__" not in header:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
        file.seek(8)
        file.write(text.ljust(size))  # as long as before: the same entries, spelled as the library spells them


def read_safetensors(path: "str | Path") -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read arrays and metadata. Raises HeadPruningError when the file is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise HeadPruningError(f"There is no file {path}; check the path.")
    try:
        with safe_open(str(path), framework="numpy") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}, dict(handle.metadata() or {})
    except SafetensorError as error:
        raise HeadPruningError(f"{path} is damaged ({error}); write it again.") from error
