"""One cell of a sweep, on the machine where it runs: its commands, what is measured after them, the file of both."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator, Mapping, Optional, Sequence

from ..compact.shapes import Number
from ..errors import HeadPruningError
from ..files import read_json, write_json
from ..inference.environment import CPU_ENVIRONMENT
from ..report.runs import CELL, CELLS_FOLDER, NUMBERS, SCORES, Run, model_files, runs_below
from .plan import MEASURES, TIMED, Cell, folder_of

CHECKPOINT = re.compile(r"checkpoint-\d+")  # a folder of transformers

fcntl: Any
try:
    import fcntl
except ImportError:  # a system without locks of this kind
    fcntl = None

_LAST_LINES = 12
_WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors", "pytorch_model*.bin", "checkpoint*.pt")
_ENDED = {"commands": [str], "env": str, "seconds": Number(0)}
_GPUS = "CUDA_VISIBLE_DEVICES"
_running: set[int] = set()  # process groups of this process's cells
_ending = threading.Event()


@dataclass(frozen=True)
class Job:
    """All that a machine needs to run a cell.

    Args:
        cell: the cell.
        work: folder of the sweep.
        here: the folder that its commands run in.
        scores: keys of all_results.json for the score; empty for the usual ones.
        score_pattern: finds the score in the log instead; where it does not, ``scores`` do, if they are given.
        measure: of :data:`head_pruning.sweep.plan.MEASURES`.
        env: variables of the environment.
        threads: threads of its processes.
        go_on: whether what a cell that was cut off left in its folder stays.
        keep_model: whether its model stays once it has been measured.
        gpus: the GPUs that it sees; None for what the machine gives it.
    """

    cell: Cell
    work: Path
    here: Path
    scores: tuple[str, ...] = ()
    score_pattern: Optional[str] = None
    measure: tuple[str, ...] = ("score",)
    env: Mapping[str, str] = field(default_factory=dict)
    threads: int = 1
    go_on: bool = False
    keep_model: bool = True
    gpus: Optional[Sequence[str]] = None

    @property
    def folder(self) -> Path:
        """What its commands know as ``{out}``."""
        return folder_of(self.work, self.cell.name)

    @property
    def log(self) -> Path:
        """What its commands print."""
        return self.work / "logs" / f"{self.cell.name}.log"

    @property
    def result(self) -> Path:
        """The file that says that it is finished."""
        return self.work / CELLS_FOLDER / f"{self.cell.name}.json"

    @property
    def failure(self) -> Path:
        """The file that says how it failed last."""
        return self.work / "failed" / f"{self.cell.name}.json"

    @property
    def ended(self) -> Path:
        """The file that says, until it is measured, that its commands ended well."""
        return self.folder / ".ended.json"

    def finished(self) -> Optional[dict[str, Any]]:
        """What it measured, if it has been.

        Raises:
            HeadPruningError: the file is damaged, is of other commands or settings, or lacks what is to be measured.
        """
        if not self.result.is_file():
            return None
        found = read_json(self.result, CELL, cure="delete it to run the cell again")
        if found["commands"] != self.cell.lines:
            raise HeadPruningError(
                f"{self.result} was measured with other commands than the plan's; delete it to run the cell again, or "
                "choose another --out."
            )
        lacking = [name for name in self.measure if name not in found.get("measure", self.measure)]
        if lacking:
            raise HeadPruningError(
                f"{self.result} was measured without {lacking[0]}; delete it to run the cell again, or drop that from "
                "the plan's measure."
            )
        theirs = found.get("settings", self.settings)
        other = next((name for name, value in self.settings.items() if theirs.get(name, value) != value), None)
        if other is not None:
            raise HeadPruningError(
                f"{self.result} was measured with another {other} than the plan's; delete it to run the cell again, "
                "or choose another --out."
            )
        return found

    @property
    def settings(self) -> dict[str, str]:
        """What its numbers depend on beside its commands; how many threads it has only where it is timed."""
        found = {"score": ", ".join(self.scores), "score_pattern": self.score_pattern or ""}
        found["env"] = hashlib.sha256(repr(sorted(self.env.items())).encode()).hexdigest()  # some of it may be secret
        return {**found, "threads": str(self.threads)} if self.timed else found

    @property
    def timed(self) -> bool:
        """Whether ``head-pruning benchmark`` measures it."""
        return any(name in TIMED for name in self.measure)

    def failed(self) -> Optional[str]:
        """How it failed last, if it did."""
        if not self.failure.is_file():
            return None
        return read_json(self.failure, {"error": str}, cure="delete it")["error"]

    def running(self) -> bool:
        """Whether a process of it lives, as far as this machine can tell."""
        with contextlib.suppress(OSError), open(self._lock_file, "rb") as file:
            return fcntl is not None and not _locked(file.fileno(), wait=False)
        return False

    @property
    def _lock_file(self) -> Path:
        return self.work / "locks" / self.cell.name


def run_job(job: Job) -> dict[str, Any]:
    """Run a cell and measure it, unless that has been done; its file appears last.

    Returns:
        What the file holds (:data:`head_pruning.report.runs.CELL`); or ``error``, how it failed, with the last lines
        of its log. A failure is returned, not raised, so that it looks the same from every machine.
    """
    try:
        with _alone(job) as lock:
            found = job.finished()
            if found is None:
                found = _measured(job, lock)
                write_json(job.result, found)
            job.ended.unlink(missing_ok=True)
            if not job.keep_model:
                _delete_models(job.folder)
            job.failure.unlink(missing_ok=True)
            return found
    except (HeadPruningError, OSError) as error:
        said = {"error": str(error)}
        if not _ending.is_set():  # else it did not fail by itself
            with contextlib.suppress(HeadPruningError, OSError):
                write_json(job.failure, {**said, "commands": job.cell.lines})
        return said


def _delete_models(folder: Path) -> None:
    """Of a cell that is measured, with all checkpoints, here and in folders below; what a link leads to stays."""
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink())]
    for each in folders:
        if each != folder and CHECKPOINT.fullmatch(each.name):
            shutil.rmtree(each, ignore_errors=True)
        for path in [path for pattern in _WEIGHTS for path in each.glob(pattern)]:
            path.unlink()


def _measured(job: Job, lock: Optional[int]) -> dict[str, Any]:
    begin, seconds = time.monotonic(), 0.0
    ended = read_json(job.ended, _ENDED, cure="delete it to run the cell again") if job.ended.is_file() else {}
    ran = ended.get("commands") == job.cell.lines and ended.get("env") == job.settings["env"] and job.log.is_file()
    if ran:  # only measuring failed
        seconds = ended["seconds"]
    elif job.folder.exists() and not job.go_on:
        shutil.rmtree(job.folder)
    for path in (job.folder, job.log.parent):
        path.mkdir(parents=True, exist_ok=True)
    with job.log.open("a" if ran else "w", encoding="utf-8") as stream:
        for words in () if ran else job.cell.commands:
            stream.write(f"$ {shlex.join(words)}\n")
            stream.flush()
            _call(job, words, lock, stdout=stream)
        if not ran:
            told = {"commands": job.cell.lines, "env": job.settings["env"], "seconds": time.monotonic() - begin}
            write_json(job.ended, told)
        runs = list(runs_below(job.folder, job.scores or SCORES))
        run = runs.pop(0) if runs and runs[0].folder == job.folder else None
        score = _score_in_log(job, run) if job.score_pattern else None
        if run is None and score is None:
            raise HeadPruningError(
                f"Its command ended well, but left neither all_results.json nor pruning.json in {job.folder}; let it "
                "write there, or give the plan a score_pattern."
            )
        numbers = {} if run is None else dict(run.numbers)
        if score is not None:
            numbers["score"] = score
        _check_score(job, run, numbers)
        if job.timed:
            numbers |= _timed(job, lock, stream)
    wanted = {number for name in job.measure for number in MEASURES[name]}
    more = [
        {
            "folder": os.path.relpath(each.folder, job.folder),
            "score_name": each.score_name,
            "numbers": {name: value for name, value in each.numbers.items() if name in wanted},
        }
        for each in runs
        if each.score is not None or "score" not in job.measure
    ]
    return {
        "name": job.cell.name,
        "values": dict(job.cell.values),
        "commands": job.cell.lines,
        **({"ran": [shlex.join(words) for words in (*job.cell.commands, _benchmark(job))]} if job.timed else {}),
        "folder": os.path.relpath(job.folder, job.work),
        "score_name": "score" if run is None or score is not None else run.score_name,
        "measure": list(job.measure),
        "settings": job.settings,
        "numbers": {name: value for name, value in numbers.items() if name in wanted},
        **({"more": more} if more else {}),
        "seconds": round(seconds + time.monotonic() - begin, 3),
    }


def _check_score(job: Job, run: Optional[Run], numbers: Mapping[str, float]) -> None:
    if "score" in numbers or "score" not in job.measure:
        return
    if run is not None and run.score_name:
        raise HeadPruningError(
            f"Its {run.score_name} in all_results.json is not finite: its training came to nothing; lower its rates."
        )
    if job.scores:
        raise HeadPruningError(
            f"Its all_results.json has no {' or '.join(job.scores)}; name one of its entries as the plan's score."
        )


def _score_in_log(job: Job, run: Optional[Run]) -> Optional[float]:
    """What the pattern finds; None where it finds nothing and the plan's other scores do."""
    found = re.findall(job.score_pattern or "", job.log.read_text(encoding="utf-8", errors="replace"))
    if not found and job.scores and run is not None and run.score is not None:
        return None
    try:
        score = float(found[-1])
    except (IndexError, ValueError):
        raise HeadPruningError(f"{job.log} has no number where the plan's score_pattern looks for one.") from None
    if not math.isfinite(score):
        raise HeadPruningError(f"The score in {job.log} is {score}: its training came to nothing; lower its rates.")
    return score


def _timed(job: Job, lock: Optional[int], stream: Any) -> dict[str, float]:
    """What ``head-pruning benchmark`` says of the model, without the heads that are gone, and beside the dense one."""
    words = _benchmark(job)
    stream.write(f"$ {shlex.join(words)}\n")
    stream.flush()
    printed = json.loads(_call(job, words, lock, stdout=subprocess.PIPE, stderr=stream))
    *_, smallest = printed["models"]
    found = {name: smallest[name] for name in NUMBERS if name in smallest and name != "parameters"}
    if "speed_up" in printed:
        found |= {"speed_up": printed["speed_up"]["throughput"], "mac_bound": printed["mac_bound"]}
    return found


def _benchmark(job: Job) -> tuple[str, ...]:
    """The command line that times its model, which is known once it is there."""
    files = model_files(job.folder)  # fairseq's models are files, those of transformers folders
    model = files[0] if files and files[0].suffix == ".pt" else job.folder
    what = (str(model), "--json", "--threads", str(job.threads), *job.cell.benchmark)
    return ("python", "-m", "head_pruning.cli", "benchmark", *what)


# -- processes -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _alone(job: Job) -> Iterator[Optional[int]]:
    """Inside the block no other process runs this cell; what a sweep that was killed left running has ended.

    The lock is on a file whose descriptor the cell's processes inherit: it is free when all of them are gone.
    """
    path = job._lock_file
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        if fcntl is not None and not _locked(file.fileno(), wait=False):
            file.seek(0)
            host, _, group = file.read().decode("utf-8", "replace").partition(" ")
            if host == socket.gethostname() and group.isdecimal():
                _end(int(group))
            _locked(file.fileno(), wait=True)
        file.truncate(0)
        yield file.fileno() if fcntl is not None else None


def _locked(descriptor: int, *, wait: bool) -> bool:
    """Whether the lock could be had; a file system without locks gives it to everybody."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _call(job: Job, words: Sequence[str], lock: Optional[int], stdout: Any, stderr: Any = subprocess.STDOUT) -> str:
    """Run a command in a process group of its own. Raises HeadPruningError with its last lines where it fails."""
    if _ending.is_set():
        raise HeadPruningError("The sweep was ended; start it again to go on.")
    env = {**os.environ, **CPU_ENVIRONMENT, "OMP_NUM_THREADS": str(job.threads), **job.env}
    if job.gpus is not None:
        env[_GPUS] = ",".join(job.gpus)
    words = (sys.executable, *words[1:]) if words[0] == "python" else words
    held = () if lock is None else (lock,)
    options: dict[str, Any] = {"cwd": job.here, "env": env, "stdout": stdout, "stderr": stderr, "pass_fds": held}
    try:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True, text=True, **options)
    except OSError as error:
        raise HeadPruningError(
            f"{words[0]} cannot be started ({error.strerror}); correct the plan's command."
        ) from error
    _running.add(process.pid)
    try:
        if lock is not None:
            os.write(lock, f"{socket.gethostname()} {process.pid}".encode())
        printed = None
        while process.returncode is None:
            with contextlib.suppress(subprocess.TimeoutExpired):  # an interruption by Ray does not end the waiting
                printed, _ = process.communicate(timeout=1)
    finally:
        if process.poll() is None:
            _end(process.pid)
            process.wait()
        _running.discard(process.pid)
        if lock is not None:
            os.truncate(lock, 0)
    if process.returncode:
        raise HeadPruningError(
            f"{shlex.join(words):.200} ended with status {process.returncode}; its log {job.log} ends with:\n"
            + last_lines(job.log)
        )
    return printed or ""


def last_lines(path: Path) -> str:
    """The end of a log, indented."""
    with path.open(encoding="utf-8", errors="replace") as stream:
        return "\n".join(f"    {line.rstrip():.300}" for line in deque(stream, _LAST_LINES))


def end_all() -> None:
    """End all cells that run in this process, with what they have started; none begins any more."""
    _ending.set()
    for group in list(_running):
        _end(group)


def _end(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
