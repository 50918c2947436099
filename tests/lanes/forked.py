"""A child process that has all imports of its parent: no start-up cost, and it can be killed."""

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Callable


class Child:
    """``work()`` in a forked process, with its output in ``log``; it ends with 0, or 1 after an exception."""

    def __init__(self, work: Callable[[], object], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(_run(work, log))

    def kill(self) -> None:
        """kill -9, also if it has just ended."""
        os.kill(self.pid, signal.SIGKILL)  # a child that nobody waited for still has its number

    def ended(self) -> bool:
        """Whether it has ended; says nothing about how."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def wait(self) -> int:
        """Wait for the end: the exit code, negative if a signal killed it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _run(work: Callable[[], object], log: Path) -> int:
    handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    code = 0
    try:
        work()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code
