"""Commands in processes of their own that need not import a framework again: each is forked from one that has.

What depends on a really fresh interpreter (what it imports, whether another package is installed) uses ``subprocess``.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Mapping, Optional, Sequence

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 240.0  # seconds that a command may take
#: What a command of each kind would import. torch._dynamo is what the first optimizer of a process imports.
MODULES = {
    "fairseq": ("torch._dynamo", "fairseq.trainer", "fairseq.sequence_generator", "hydra.experimental", "sacrebleu"),
    "transformers": ("torch._dynamo", "transformers.trainer", "transformers.models.auto.modeling_auto", "accelerate"),
}
_servers: dict[str, subprocess.Popen] = {}


def _server(kind: str) -> subprocess.Popen:
    if kind not in _servers or _servers[kind].poll() is not None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        _servers[kind] = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "forked_server.py"), *MODULES[kind]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )
    return _servers[kind]


class Command:
    """A running or finished ``python argv``, with its output; as :class:`subprocess.Popen` where tests need it."""

    def __init__(self, kind: str, argv: Sequence, cwd: Path = ROOT, env: Optional[Mapping[str, str]] = None) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="command-"))
        self._code = self._folder / "code"
        request = {
            "argv": [str(word) for word in argv],
            "cwd": str(cwd),
            "env": {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})},
            **{name: str(self._folder / name) for name in ("out", "err", "code")},
        }
        server = _server(kind)
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        self.pid = int(server.stdout.readline())

    def poll(self) -> Optional[int]:
        """The exit status, None while it runs."""
        return int(self._code.read_text()) if self._code.exists() else None

    def wait(self, timeout: float = LIMIT) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"the command did not end within {timeout} s\n{self.stdout[-2000:]}{self.stderr}")
            time.sleep(0.005)
        return self.returncode

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


def run(kind: str, argv: Sequence, cwd: Path = ROOT, env: Optional[Mapping[str, str]] = None) -> Command:
    """Run ``python argv`` to its end."""
    command = Command(kind, argv, cwd, env)
    command.wait()
    return command
