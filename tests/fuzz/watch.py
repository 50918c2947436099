"""What an input did: refused in one sentence, or taken; nothing run, nothing written elsewhere, little memory."""

import contextlib
import os
import resource
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterator

from head_pruning import HeadPruningError

#: No input here is larger than a megabyte: more than this on top of what the process has is the claim of a file.
LIMIT = 1 << 30
_RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "os.remove", "os.rename", "shutil.")
_watched: dict[str, Any] = {}


@dataclass
class Outcome:
    """What became of the inputs of one kind."""

    kind: str
    inputs: int = 0
    refused: int = 0
    seconds: float = 0.0
    megabytes: float = 0.0
    longest: float = 0.0
    faults: list[str] = field(default_factory=list)


def _hook(event: str, args: tuple) -> None:
    if not _watched:
        return
    if event.startswith(_RUNS):
        _watched["events"].append(f"{event} {args!r:.80}")
    elif event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
        writes = isinstance(args[1], str) and set(args[1]) & set("wax+")
        path = os.path.abspath(os.fsdecode(args[0]))
        if writes and not path.startswith((_watched["folder"], "/dev/", "/proc/")):
            _watched["events"].append(f"writes {path}")


sys.addaudithook(_hook)


@contextlib.contextmanager
def _watching(folder: Path) -> Iterator[list[str]]:
    _watched.update(folder=str(folder), events=[])
    try:
        yield _watched["events"]
    finally:
        _watched.clear()


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """Inside the block the process gets :data:`LIMIT` bytes more of addresses, not any number."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def peak() -> float:
    """The most memory that the process ever had, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def try_input(outcome: Outcome, folder: Path, label: str, read: Callable[[], Any]) -> None:
    """Read one input, and note in ``outcome`` what came of it.

    Args:
        outcome: of its kind.
        folder: the only place that may be written.
        label: says which input it was.
        read: reads it; a HeadPruningError of one line, or ``SystemExit`` with a sentence or argparse's 2, refuses it.
    """
    begin, before = time.monotonic(), peak()
    files = sorted(path.name for path in folder.iterdir())
    with _watching(folder) as events, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read()
        except HeadPruningError as error:
            outcome.refused += 1
            if "\n" in str(error) or len(str(error)) > 2000 or "weights_only" in str(error):
                outcome.faults.append(f"{label}: no sentence: {str(error)!r:.200}")
            if any(words in str(error).lower() for words in ("memory", "can't allocate")):
                outcome.faults.append(f"{label}: asks for memory: {str(error)!r:.200}")
        except SystemExit as error:
            outcome.refused += 1
            if error.code not in (0, 2) and not isinstance(error.code, str):
                outcome.faults.append(f"{label}: ends with {error.code!r}")
        except Exception as error:
            trace, last = error.__traceback__, None
            while trace is not None:
                last, trace = trace, trace.tb_next
            where = "" if last is None else f"{last.tb_frame.f_code.co_filename[-40:]}:{last.tb_lineno}"
            outcome.faults.append(f"{label}: {type(error).__name__} {str(error)!r:.150} at {where}")
    outcome.faults += [f"{label}: {event}" for event in events]
    left = sorted(set(path.name for path in folder.iterdir()) - set(files))
    outcome.faults += [f"{label}: left {name}" for name in left]
    outcome.inputs += 1
    spent = time.monotonic() - begin
    outcome.seconds += spent
    outcome.longest = max(outcome.longest, spent)
    outcome.megabytes = max(outcome.megabytes, peak() - before)
