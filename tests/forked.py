"""Commands in processes of their own that need not import a framework again: each is forked from one that has.

What depends on a really fresh interpreter (what it imports, whether another package is installed) uses ``subprocess``.
"""

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Callable, Mapping, Optional, Sequence

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 240.0  # seconds that a command may take
#: By kind of server: the one that it is forked from (None: a fresh interpreter), and what it imports.
#: torch._dynamo is what the first optimizer of a process imports, the slowest part of a short run.
SERVERS: dict[str, tuple[Optional[str], tuple[str, ...]]] = {
    "fairseq": (
        None,
        ("torch._dynamo", "fairseq.trainer", "fairseq.sequence_generator", "hydra.experimental", "sacrebleu"),
    ),
    "fairseq_plugin": ("fairseq", ("tests.fairseq.warm",)),
    "transformers": (
        None,
        ("torch._dynamo", "transformers.trainer", "transformers.models.auto.modeling_auto", "accelerate"),
    ),
}
PIPES = ("requests", "answers")
_servers: dict[str, tuple[IO[str], IO[str]]] = {}  # where requests are written, and answers read


class Child:
    """``work()`` in a forked process that writes to files; it ends as Python would with ``work`` as its script."""

    def __init__(self, work: Callable[[], object], out: Path, err: Optional[Path] = None) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(_run(work, out, err or out))

    def kill(self) -> None:
        """kill -9, also if it has just ended."""
        os.kill(self.pid, signal.SIGKILL)  # a child that nobody waited for still has its number

    def ended(self) -> bool:
        """Whether it has ended; says nothing about how."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def wait(self) -> int:
        """Wait for the end: the exit code, negative if a signal killed it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _run(work: Callable[[], object], out: Path, err: Path) -> int:
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_APPEND, 0o644), descriptor)
    code = 0
    try:
        work()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code


@functools.cache
def _place() -> Path:
    """A folder until this process ends."""
    place = tempfile.TemporaryDirectory(prefix="forked-")
    atexit.register(place.cleanup)
    return Path(place.name)


def _new_folder(prefix: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"{prefix}-", dir=_place()))


def _server(kind: str) -> tuple[IO[str], IO[str]]:
    if kind not in _servers:
        parent, modules = SERVERS[kind]
        if parent is None:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.forked_server", *modules],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                cwd=ROOT,
            )
            _servers[kind] = process.stdin, process.stdout
        else:
            folder = _new_folder(kind)
            for name in PIPES:
                os.mkfifo(folder / name)
            _ask(parent, serve=modules, folder=str(folder))
            _servers[kind] = open(folder / PIPES[0], "w"), open(folder / PIPES[1])
    return _servers[kind]


def _ask(kind: str, **request: object) -> Optional[int]:
    """A server's answer: the number of the process that it started, or the exit code of one, None while it runs."""
    requests, answers = _server(kind)
    requests.write(json.dumps(request) + "\n")
    requests.flush()
    return json.loads(answers.readline())


class Command:
    """A running or finished ``python argv``, with its output; as :class:`subprocess.Popen` where tests need it."""

    def __init__(self, kind: str, argv: Sequence, cwd: Path = ROOT, env: Optional[Mapping[str, str]] = None) -> None:
        self._folder = _new_folder("command")
        self._kind, self._code = kind, None
        self.pid = _ask(
            kind,
            argv=[str(word) for word in argv],
            cwd=str(cwd),
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})},
            out=str(self._folder / "out"),
            err=str(self._folder / "err"),
        )

    def poll(self) -> Optional[int]:
        """The exit status, None while it runs."""
        if self._code is None:
            self._code = _ask(self._kind, poll=self.pid)
        return self._code

    def wait(self, timeout: float = LIMIT) -> int:
        """Wait for the end; a command that takes too long is killed and fails the test."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"the command did not end within {timeout} s\n{self.stdout[-2000:]}{self.stderr}")
            time.sleep(0.005)
        return self.returncode

    def kill_once(self, condition: Callable[[], bool]) -> None:
        """Send SIGKILL as soon as ``condition()`` holds."""
        deadline = time.monotonic() + LIMIT
        while not condition():
            assert self.poll() is None, f"ended before it was killed\n{self.stdout[-2000:]}\n{self.stderr}"
            assert time.monotonic() < deadline, "nothing to kill for"
            time.sleep(0.002)
        self.send_signal(signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL

    def communicate(self, timeout: float = LIMIT) -> tuple[str, str]:
        self.wait(timeout)
        return self.stdout, self.stderr

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    @property
    def returncode(self) -> Optional[int]:
        return self.poll()

    def _read(self, name: str) -> str:
        path = self._folder / name
        return path.read_text(encoding="utf-8") if path.exists() else ""

    @property
    def stdout(self) -> str:
        return self._read("out")

    @property
    def stderr(self) -> str:
        return self._read("err")

    out, err = stdout, stderr


def run(kind: str, argv: Sequence, cwd: Path = ROOT, env: Optional[Mapping[str, str]] = None) -> Command:
    """Run ``python argv`` to its end."""
    command = Command(kind, argv, cwd, env)
    command.wait()
    return command
