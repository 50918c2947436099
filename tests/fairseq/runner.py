"""Runs fairseq's commands, each in a fresh process that is forked from one that has imported fairseq already."""

import importlib
import logging
import multiprocessing
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Mapping, Optional, Sequence

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = str(ROOT / "fairseq_plugin")
WATCHED = str(Path(__file__).resolve().parent / "watched")
LIMIT = 240.0  # seconds that a command may take

_CONTEXT = multiprocessing.get_context("forkserver")
# Not fairseq_cli: each command configures logging itself when it is imported. Not the plugin: --user-dir imports it.
# torch._dynamo is what the first optimizer of a process imports, the slowest part of a short run.
_CONTEXT.set_forkserver_preload(
    ["torch._dynamo", "fairseq.trainer", "fairseq.sequence_generator", "hydra.experimental", "sacrebleu", "sacremoses"]
)


class Command:
    """One running or finished command, with its output."""

    def __init__(self, name: str, arguments: Sequence, cwd: Path, folder: Path, environment: Mapping) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._out, self._err = folder / "stdout", folder / "stderr"
        self._process = _CONTEXT.Process(
            target=_main,
            args=(name, [str(a) for a in arguments], str(cwd), str(self._out), str(self._err), dict(environment)),
        )
        self._process.start()

    def wait(self) -> "Command":
        """Wait for the end; a command that takes too long is killed and fails the test."""
        self._process.join(LIMIT)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
            raise AssertionError(f"the command did not end within {LIMIT} s\n{self.out[-2000:]}")
        return self

    def kill_once(self, condition, poll: float = 0.002) -> None:
        """Send SIGKILL as soon as ``condition()`` holds."""
        deadline = time.monotonic() + LIMIT
        while not condition():
            assert self._process.is_alive(), f"ended before it was killed\n{self.out[-2000:]}\n{self.err}"
            assert time.monotonic() < deadline, "nothing to kill for"
            time.sleep(poll)
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.join()
        assert self._process.exitcode == -signal.SIGKILL

    @property
    def code(self) -> Optional[int]:
        return self._process.exitcode

    @property
    def out(self) -> str:
        return self._out.read_text(encoding="utf-8") if self._out.exists() else ""

    @property
    def err(self) -> str:
        return self._err.read_text(encoding="utf-8") if self._err.exists() else ""


def _main(name: str, arguments: list, cwd: str, out: str, err: str, environment: dict) -> None:
    """What the console script does, with the output in files."""
    for descriptor, path in ((1, out), (2, err)):
        handle = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
        os.dup2(handle, descriptor)
    logging.getLogger().handlers.clear()  # importing fairseq has set one; a command sets its own first
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = [f"fairseq-{name}", *arguments]
    try:
        importlib.import_module(f"fairseq_cli.{name.replace('-', '_')}").cli_main()
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


class Runner:
    """Runs commands in a work folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0

    def start(self, name: str, arguments: Sequence, cwd: Optional[Path] = None, **environment: str) -> Command:
        """Start ``fairseq-NAME ARGUMENTS``."""
        self._count += 1
        folder = self.folder / "commands" / f"{self._count:03d}-{name}"
        return Command(name, arguments, cwd or self.folder, folder, environment)

    def run(self, name: str, arguments: Sequence, cwd: Optional[Path] = None, **environment: str) -> Command:
        """Run ``fairseq-NAME ARGUMENTS`` and expect success."""
        done = self.start(name, arguments, cwd, **environment).wait()
        assert done.code == 0, f"fairseq-{name} ended with {done.code}\n{done.out[-3000:]}\n{done.err[-3000:]}"
        return done

    def fail(self, name: str, arguments: Sequence, cwd: Optional[Path] = None) -> str:
        """Run a command that must fail with one sentence, which is returned."""
        done = self.start(name, arguments, cwd).wait()
        assert done.code == 1, f"fairseq-{name} ended with {done.code}\n{done.out[-2000:]}\n{done.err[-2000:]}"
        assert "Traceback" not in done.err, done.err
        sentences = [line for line in done.err.splitlines() if line.startswith("error: ")]
        assert len(sentences) == 1, done.err
        return sentences[0]


def logged(output: str, name: str) -> list:
    """The values of ``name`` in fairseq's JSON log, in order."""
    return [float(value) for value in re.findall(rf'"{re.escape(name)}": "([^"]+)"', output)]
