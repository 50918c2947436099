"""Imports the modules that it is given, then runs commands, each in a process forked from it: ``tests/forked.py``."""

import functools
import gc
import importlib
import json
import logging
import os
import runpy
import sys
import warnings
from pathlib import Path

from tests.forked import PIPES, Child


def run(argv: list[str]) -> None:
    """What ``python ARGV`` does."""
    while argv[0] == "-W":
        action, _, category, module = (argv[1].split(":") + ["", "", ""])[:4]
        warnings.filterwarnings(action, category=getattr(__builtins__, category, Warning), module=module)
        argv = argv[2:]
    if argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    elif argv[0] == "-c":
        sys.argv = ["-c", *argv[2:]]
        exec(compile(argv[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")


def command(request: dict) -> None:
    """One request, in the child."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    logging.getLogger().handlers.clear()  # importing fairseq has set one; a command sets its own first
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    run(request["argv"])


def serve_pipes(modules: list[str], folder: Path) -> None:
    """A server in a child, which has imported more."""
    for descriptor, (name, mode) in enumerate(zip(PIPES, (os.O_RDONLY, os.O_WRONLY))):
        os.dup2(os.open(folder / name, mode), descriptor)
    serve(modules)


def serve(modules: list[str]) -> None:
    """Import, then answer requests until there are no more."""
    for name in modules:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # children neither look through nor copy what was imported
    gc.set_threshold(50_000, 20, 10)
    children: dict[int, Child] = {}
    for line in open(0, closefd=False):
        request = json.loads(line)
        if "poll" in request:
            child = children[request["poll"]]
            answer = child.wait() if child.ended() else None
        elif "serve" in request:
            folder = Path(request["folder"])
            answer = Child(functools.partial(serve_pipes, request["serve"], folder), folder / "log").pid
        else:
            child = Child(functools.partial(command, request), Path(request["out"]), Path(request["err"]))
            answer, children[child.pid] = child.pid, child
        os.write(1, f"{json.dumps(answer)}\n".encode())


if __name__ == "__main__":
    serve(sys.argv[1:])
