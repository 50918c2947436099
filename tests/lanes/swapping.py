"""Mutants of function bodies, in a child of a process that has collected the tests: no import, no collection."""

import gc
import inspect
import os
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, Callable, Optional

from tests.lanes.covering import fork_commands, judge

_NAMELESS = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")  # these have run when the module is imported


def new_code(path: str, old: str, new: str) -> Optional[dict[tuple[str, int], CodeType]]:
    """(qualified name, line) to the changed code of a module's functions; None where a change is not of a body."""
    codes: dict[tuple[str, int], CodeType] = {}
    return codes if _pair(compile(old, path, "exec"), compile(new, path, "exec"), codes) else None


def _pair(old: CodeType, new: CodeType, codes: dict[tuple[str, int], CodeType]) -> bool:
    """Add the changed functions in a module's, a class's or a function's code; False if they cannot be exchanged."""
    if old.co_flags & inspect.CO_OPTIMIZED:  # a function's
        if (old.co_freevars, old.co_firstlineno) != (new.co_freevars, new.co_firstlineno):
            return False
        codes[old.co_qualname, old.co_firstlineno] = new
        parts = [[each for each in code.co_consts if isinstance(each, CodeType)] for code in (old, new)]
        return len(parts[0]) == len(parts[1]) and all(_pair(*pair, codes) for pair in zip(*parts))
    if (old.co_code, old.co_names, len(old.co_consts)) != (new.co_code, new.co_names, len(new.co_consts)):
        return False
    for before, after in zip(old.co_consts, new.co_consts):
        if isinstance(before, CodeType) and isinstance(after, CodeType) and before.co_name not in _NAMELESS:
            if not _pair(before, after, codes):
                return False
        elif (type(before), before) != (type(after), after):
            return False
    return True


def swap(path: str, codes: dict[tuple[str, int], CodeType]) -> None:
    """Give the functions of the module at ``path`` their changed code."""
    gc.unfreeze()  # the tests freeze what was imported, which then is not listed
    for function in [each for each in gc.get_objects() if isinstance(each, FunctionType)]:
        code = function.__code__
        if code.co_filename == path and (code.co_qualname, code.co_firstlineno) in codes:
            function.__code__ = codes[code.co_qualname, code.co_firstlineno]


class Swapping:
    """A pytest plugin: after the collection ``each(self.verdict)`` is called instead of the tests."""

    def __init__(self, each: Callable[["Swapping"], None]) -> None:
        self.each = each

    def pytest_configure(self, config: Any) -> None:
        config.option.maxfail = 1

    def pytest_collection_finish(self, session: Any) -> None:
        fork_commands()
        self.session = session
        self.items = {item.nodeid: item for item in session.items}

    def pytest_runtestloop(self) -> bool:
        self.each(self)
        return True

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            os.write(self.told, f"FAILED {report.nodeid}\n".encode())

    def verdict(self, path: str, codes: dict, tests: list[str], log: Path, seconds: float) -> str:
        """As :func:`tests.lanes.covering.run` of ``tests`` with changed code."""

        def work() -> None:
            from _pytest.main import pytest_runtestloop

            self.told, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
            for stream in (1, 2):  # a log would grow where a test forbids files to
                os.dup2(nowhere, stream)
            swap(path, codes)
            self.session.items[:] = [self.items[name] for name in tests]
            try:
                pytest_runtestloop(self.session)
            except self.session.Failed:
                pass
            raise SystemExit(int(self.session.testsfailed > 0))

        return judge(work, log, seconds)
