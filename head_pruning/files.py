"""Files that appear whole or not at all, and are never unpickled."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Iterator, Mapping

import numpy as np

from .compact.shapes import conform
from .errors import HeadPruningError, one_line

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


def parse_json(text: "str | bytes", shape: Any = object, where: str = "it") -> Any:
    """A JSON text of this shape (:mod:`head_pruning.compact.shapes`). Raises ValueError for any other text."""
    try:
        return conform(json.loads(text.decode("utf-8") if isinstance(text, bytes) else text), shape, where)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: "str | Path", shape: Any = object, *, cure: str = "write it again") -> Any:
    """The JSON in a file, of this shape.

    Args:
        path: the file.
        shape: see :mod:`head_pruning.compact.shapes`.
        cure: what to do about a damaged file, for the error's sentence.

    Raises:
        HeadPruningError: the file is missing, or holds something else.
    """
    path = _existing(path)
    try:
        return parse_json(path.read_bytes(), shape)
    except ValueError as error:
        raise HeadPruningError(f"{path} is damaged ({one_line(error)}); {cure}.") from error


def read_safetensors(
    path: "str | Path", framework: str = "numpy", *, cure: str = "write it again"
) -> tuple[dict[str, Any], dict[str, str]]:
    """Read tensors and metadata of a safetensors file; no more memory is asked for than the file is long.

    Args:
        path: the file.
        framework: ``numpy`` for arrays, ``pt`` for tensors of torch, which stay in the file.
        cure: what to do about a damaged file, for the error's sentence.

    Raises:
        HeadPruningError: the file is missing or damaged, or has numbers that the framework does not have.
    """
    with _safetensors(path, framework, cure) as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}, dict(handle.metadata() or {})


def read_metadata(path: "str | Path") -> tuple[list[str], dict[str, str]]:
    """The names of the tensors and the metadata of a safetensors file. Raises as :func:`read_safetensors` does."""
    with _safetensors(path, "numpy", "write it again") as handle:
        return list(handle.keys()), dict(handle.metadata() or {})


@contextlib.contextmanager
def _safetensors(path: "str | Path", framework: str, cure: str) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    path = _existing(path)
    try:
        with safe_open(str(path), framework=framework) as handle:
            yield handle
    except (SafetensorError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
        raise HeadPruningError(f"{path} is damaged ({one_line(error):.200}); {cure}.") from error


def _existing(path: "str | Path") -> Path:
    path = Path(path)
    if not path.is_file():
        raise HeadPruningError(f"There is no file {path}; check the path.")
    return path
