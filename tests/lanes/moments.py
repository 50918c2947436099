"""The moments of a run at which it may be killed: each update, and each change in its output folder."""

import itertools
import os
import signal
import sys
import time
from pathlib import Path
from typing import Optional

from head_pruning import PruningSession

# Audit events of Python with the place of the path among their arguments. What compiled code writes (torch.save,
# safetensors) lies between two of them.
_CHANGES = {"open": 0, "os.mkdir": 0, "os.rename": 1, "os.remove": 0, "os.rmdir": 0, "shutil.rmtree": 0}


def watch(log: Path, folder: Path, last: Optional[int] = None) -> None:
    """From now on append a line to ``log`` at each moment of this process; kill -9 it at number ``last``, from 0."""
    handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    root = os.path.abspath(folder)

    seen = itertools.count()

    def note(moment: str) -> None:
        os.write(handle, f"{time.monotonic():.6f}\t{moment}\n".encode())
        if next(seen) == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def changed(event: str, arguments: tuple) -> None:
        if event not in _CHANGES or not isinstance(arguments[_CHANGES[event]], (str, os.PathLike)):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        path = os.path.abspath(arguments[_CHANGES[event]])
        if path.startswith(root + os.sep):
            note(f"{event.rpartition('.')[2]} {os.path.relpath(path, root)}")

    update = PruningSession.before_update

    def before_update(session, step, *arguments, **options):
        note(f"update {step}")
        return update(session, step, *arguments, **options)

    PruningSession.before_update = before_update
    sys.addaudithook(changed)


def moments(log: Path) -> list[tuple[float, str]]:
    """(seconds since the first, what happened) for each moment in ``log``."""
    lines = [line.split("\t") for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    return [(float(at) - float(lines[0][0]), what) for at, what in lines]


def count(log: Path) -> int:
    """How many moments there were."""
    return log.read_bytes().count(b"\n") if log.exists() else 0
