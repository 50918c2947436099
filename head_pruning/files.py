"""Files that appear whole or not at all, and are never unpickled."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Optional

import numpy as np

from .compact.shapes import conform
from .errors import HeadPruningError, one_line

fcntl: Any
try:
    import fcntl
except ImportError:  # a system without locks of this kind
    fcntl = None

MASKS_FILE = "masks.safetensors"
REPORT_FILE = "pruning.json"
#: In a run's folder: the smaller models that it left on its way, in a folder each.
SIZES_FOLDER = "sizes"


#: What begins the names of unfinished files and folders. Whoever makes one holds a lock on it, which ends with the
#: process: what is left without one is of a process that was killed.
UNFINISHED = ".saving-"

# Why a file system takes nothing, whatever is written.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
_REFUSED = _FULL | {errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR}
# How libraries say so that write by themselves: safetensors with a number, torch without.
_OF_SAFETENSORS = re.compile(r"os error (\d+)")
_OF_TORCH = re.compile(r"inline_container|PytorchStreamWriter|iostream error")


@contextlib.contextmanager
def writing(path: "str | Path", *, also_reading: bool = False) -> Iterator[None]:
    """Inside the block ``path`` is written; a disk that takes nothing becomes a HeadPruningError with its name.

    Args:
        path: a file, or a folder in which files are written.
        also_reading: other files are read in the block, so a file that may not be opened is left to others.
    """
    try:
        yield
    except HeadPruningError:
        raise
    except Exception as error:
        numbers = _FULL if also_reading else _REFUSED
        if not also_reading and _is_for(error, Path(path)):  # some file systems make no folders
            numbers = numbers | {errno.ENOENT}
        reason = _refusal(error, numbers)
        if reason is None:
            raise
        raise HeadPruningError(
            f"{path} cannot be written ({reason}); make room or choose another place (what was there before is whole)."
        ) from error


def _is_for(error: BaseException, path: Path) -> bool:
    """Whether it was raised for ``path``, what is to become it, or a folder above; not for a file that is read."""
    name = getattr(error, "filename", None)
    return isinstance(name, str) and (Path(name) in (path, *path.parents) or Path(name).name.startswith(UNFINISHED))


def _refusal(error: BaseException, numbers: set[int]) -> Optional[str]:
    """What a file system says, in the words of the system; None of errors that it did not cause."""
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno in numbers else None
    told = _OF_SAFETENSORS.search(str(error))
    if told is not None and int(told[1]) in numbers:
        return os.strerror(int(told[1]))
    return "the disk is full, or files on it may not be so large" if _OF_TORCH.search(str(error)) else None


@contextlib.contextmanager
def atomic_path(path: "str | Path") -> Iterator[Path]:
    """Yield a temporary name beside ``path``; on success rename it to ``path``, else remove it.

    Raises:
        HeadPruningError: the disk takes nothing.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = _unfinished(path.parent, path.name)
        try:
            yield temporary
            temporary.chmod(_usual_mode())  # temporary files are private
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
            os.close(descriptor)


def _usual_mode() -> int:
    """The mode that open() gives a new file."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


@contextlib.contextmanager
def temporary_folder(folder: "str | Path") -> Iterator[Path]:
    """A folder inside ``folder``, which is made if missing; it is removed in the end.

    Raises:
        HeadPruningError: the disk takes nothing.
    """
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = _unfinished(folder)
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(descriptor)


@contextlib.contextmanager
def appearing_at_once(folder: "str | Path") -> Iterator[Path]:
    """A temporary folder in ``folder`` whose files, those of its own folders too, move there when the block is done.

    They get the mode that open() would have given, whatever wrote them: safetensors writes private files.

    Raises:
        HeadPruningError: the disk takes nothing.
    """
    with temporary_folder(folder) as temporary:
        yield temporary
        for path in sorted(temporary.rglob("*")):  # folders before what is in them
            place = Path(folder) / path.relative_to(temporary)
            if path.is_dir():
                place.mkdir(exist_ok=True)  # one that is there may hold more, and cannot be replaced
            else:
                path.chmod(_usual_mode())
                os.replace(path, place)


def _unfinished(folder: Path, name: str = "") -> tuple[int, Path]:
    """Make a temporary file for ``name``, or without one a folder, and lock it; those of dead processes go."""
    for left in folder.glob(f"{UNFINISHED}*"):
        with contextlib.suppress(OSError):  # another process has just removed it
            descriptor = os.open(left, os.O_RDONLY)
            if _lock(descriptor):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            os.close(descriptor)
    while True:
        if name:
            descriptor, made = tempfile.mkstemp(prefix=UNFINISHED, suffix=f"-{name}", dir=folder)
        else:
            made = tempfile.mkdtemp(prefix=UNFINISHED, dir=folder)
            descriptor = os.open(made, os.O_RDONLY)
        if _lock(descriptor) is not False and os.path.exists(made):  # else taken for one that was left
            return descriptor, Path(made)
        os.close(descriptor)


def _lock(descriptor: int) -> Optional[bool]:
    """Whether an open file or folder could be locked; None where the file system, or the system, has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


_taken: dict[str, int] = {}


def take_folder(folder: "str | Path") -> Callable[[], None]:
    """Keep runs in other processes out of ``folder``, until what is returned is called or this process ends.

    The folder is made if missing. Nothing is written there: the lock is on the folder itself. File systems without
    locks (some of networks) let every run in.

    Raises:
        HeadPruningError: a run in another process has taken it, or it cannot be made.
    """
    with writing(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
    place = os.path.realpath(folder)
    if fcntl is None or place in _taken:
        return lambda: None
    descriptor = os.open(place, os.O_RDONLY)
    if _lock(descriptor) is False:
        os.close(descriptor)
        raise HeadPruningError(f"Another run is writing to {folder}; wait for its end, or choose another folder.")
    _taken[place] = descriptor

    def release() -> None:
        if _taken.pop(place, None) is not None:
            os.close(descriptor)

    return release


@contextlib.contextmanager
def alone_in(folder: "str | Path") -> Iterator[None]:
    """Inside the block ``folder`` is this process's own, as :func:`take_folder` has it."""
    release = take_folder(folder)
    try:
        yield
    finally:
        release()


def _leave_locks() -> None:
    """A forked process, such as one that loads data, must not hold its parent's locks when that is dead."""
    while _taken:
        os.close(_taken.popitem()[1])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_locks)


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


def tensor_shapes(path: "str | Path") -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a safetensors file, by its header. Raises as :func:`read_safetensors` does."""
    with _safetensors(path, "numpy", "write it again") as handle:
        return {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}


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
