"""Imports the modules that it is given, then runs commands, each in a process forked from it: ``tests/forked.py``."""

import importlib
import json
import os
import runpy
import signal
import sys
import traceback


def run(argv: list[str]) -> None:
    """What ``python ARGV`` does."""
    while argv[0] == "-W":
        import warnings

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


def child(request: dict) -> int:
    """Run one command; its exit status, as Python's own start-up counts it."""
    for descriptor, path in ((1, request["out"]), (2, request["err"])):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644), descriptor)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    try:
        run(request["argv"])
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        hook = sys.excepthook
        traceback.print_exc() if hook is sys.__excepthook__ else hook(*sys.exc_info())
        return 1
    return 0


def serve() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # monitors end by themselves
    for line in sys.stdin:
        request = json.loads(line)
        read, write = os.pipe()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.close(0)
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    status = child(request)
                    sys.stdout.flush()
                    sys.stderr.flush()
                finally:
                    os._exit(status)
            os.write(write, str(pid).encode())
            os.close(write)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with open(request["code"] + ".part", "w") as file:
                file.write(str(status))
            os.rename(request["code"] + ".part", request["code"])
            os._exit(0)
        os.close(write)
        pid = os.read(read, 32)
        os.close(read)
        print(pid.decode(), flush=True)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        importlib.import_module(name)
    serve()
