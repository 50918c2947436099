"""Files of ``torch.save``: tensors and plain values are read, code is not run, and no size is believed."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any, Iterator

import torch

from .errors import HeadPruningError, one_line


def load_pickled(
    path: "str | Path", *, problem: str = "is damaged or of another kind", cure: str = "copy it again"
) -> Any:
    """What a file of ``torch.save`` holds, on the CPU; its tensors stay in the file until they are used.

    Args:
        path: the file, also one of the format before torch 1.6.
        problem: what is said of any other file, for the error's sentence.
        cure: what to do about a damaged file, for the error's sentence.

    Raises:
        HeadPruningError: the file is missing, damaged, holds code or objects (of which nothing is run), or claims
            tensors larger than itself.
    """
    path = Path(path)
    if not path.is_file():
        raise HeadPruningError(f"There is no file {path}; check the path.")
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            _check_archive(path)
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        else:  # of a file Python gets as much memory as it is asked to read, and torch as much as a storage claims
            data = path.read_bytes()
            _check_sizes(torch.load(io.BytesIO(data), map_location="meta", weights_only=True), len(data))
            found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        _check_sizes(found, path.stat().st_size)
    except Exception as error:  # each part of torch's reader has errors of its own for what is damaged
        raise HeadPruningError(f"{path} {problem} ({one_line(error):.200}); {cure}.") from error
    return found


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("a part of it is compressed")
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise ValueError("it claims to be larger than it is")


def _check_sizes(found: Any, limit: int) -> None:
    """Raise ValueError where a tensor has more entries than the file has bytes, as one does that was expanded."""
    for tensor in tensors_in(found):
        if tensor.layout is torch.strided and tensor.untyped_storage().nbytes() > limit:
            raise ValueError("it claims to be larger than it is")
        if tensor.numel() > limit:
            raise ValueError(f"it claims a tensor of the shape {list(tensor.shape)}")


def tensors_in(found: Any) -> Iterator[torch.Tensor]:
    """The tensors in lists, tuples and mappings, nested as deep as they may be."""
    stack, seen = [found], set()
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            stack += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set)):
            stack += value
