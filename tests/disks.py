"""Disks that take nothing, and runs that hold a folder."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_HOLD = """
import multiprocessing, sys, time
from head_pruning.files import take_folder
take_folder(sys.argv[1])
def loads_data():
    print("taken", flush=True)  # by the one that it has forked, whose own life has begun
    time.sleep(60)
multiprocessing.get_context("fork").Process(target=loads_data, daemon=True).start()
time.sleep(60)
"""


@contextlib.contextmanager
def no_file_above(size: int):
    """Inside the block no file of this process grows above ``size`` bytes, as on a disk that is nearly full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def read_only(folder: Path):
    """Inside the block this process may not write in ``folder``, also if it belongs to the system's administrator."""
    user = os.geteuid()
    folder.chmod(0o555)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o755)


@contextlib.contextmanager
def held(folder: Path):
    """Inside the block another process, with one that it has forked, runs in ``folder``; gives what kills it."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", _HOLD, str(folder)]
    environment = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, env=environment, text=True, start_new_session=True
    ) as other:

        def kill() -> None:
            other.kill()
            other.wait()

        try:
            assert other.stdout.readline() == "taken\n"
            yield kill
        finally:
            os.killpg(other.pid, signal.SIGKILL)
