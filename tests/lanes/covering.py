"""Which tests run a line, what each of them costs, and a run of some of them in a forked child."""

import ast
import hashlib
import importlib
import json
import math
import os
import resource
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Optional

from tests.forked import ROOT, Child

START = 1.0  # seconds of processor time, about, that a file costs before its first test
PLUGINS = ["pytest_timeout", "_hypothesis_pytestplugin"]
WAIT = 240.0  # seconds until a run counts as one that waits for ever


def run(tree: Path, files: Iterable[str], log: Path, plugin: Any, seconds: float = math.inf) -> str:
    """Run ``files`` in ``tree``: ``passed``, the first failing test, an error, or ``the time``.

    Args:
        plugin: a pytest plugin that goes with it.
        seconds: of processor time, so that other work on the machine changes no verdict.
    """
    return judge(lambda: pytest_in(tree, files, plugin), log, seconds)


def pytest_in(tree: Path, files: Iterable[str], plugin: Any, *options: str) -> None:
    """Become a run of pytest in ``tree``, a copy of the repository."""
    os.chdir(tree)
    # The lane's own modules, and what they import of the project, are those of the repository.
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "head_pruning")]:
        del sys.modules[name]
    sys.path[:] = [str(tree), *(place for place in sys.path if place not in ("", str(ROOT)))]
    os.environ["PYTHONPATH"] = str(tree)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # other plugins import for longer than many tests run
    os.environ.pop("HEAD_PRUNING_REFERENCE", None)
    import pytest

    words = ["-q", "-p", "no:cacheprovider", *(word for name in PLUGINS for word in ("-p", name))]
    words += ["-W", "ignore::pytest.PytestAssertRewriteWarning", "--hypothesis-profile", "mutants", *options]
    raise SystemExit(int(pytest.main([*words, *files], plugins=[plugin])))


def judge(work: Callable[[], object], log: Path, seconds: float) -> str:
    """What comes of tests in a child: see :func:`run`."""

    def limited() -> None:
        if seconds < math.inf:
            resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), math.ceil(seconds) + 5))
        work()

    child = Child(limited, log)
    deadline = time.monotonic() + (WAIT if seconds < math.inf else math.inf)
    while not child.ended():
        if time.monotonic() > deadline:
            child.kill()
        time.sleep(0.02)
    code = child.wait()
    if code in (0, 5):  # 5: there was nothing to run
        return "passed"
    if code < 0:
        return "the time" if -code in (9, 24) else f"signal {-code}"
    failed = [line for line in log.read_text(errors="replace").splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return failed[0].split(" - ")[0].partition(" ")[2] if failed else f"an error ({code})"


class Recorder:
    """A pytest plugin that writes what each passing test costs and which lines it runs."""

    def __init__(self, tree: Path, modules: list[str], out: Path) -> None:
        self.tree, self.modules, self.out = tree, modules, out
        self.costs: dict[str, float] = {}
        self.failed: set[str] = set()

    def pytest_sessionstart(self) -> None:
        import coverage

        self.coverage = coverage.Coverage(
            data_file=None, config_file=False, include=[str(self.tree / module) for module in self.modules]
        )
        self.coverage.start()

    def _write(self) -> None:
        """What a command in a process of its own runs counts for the test that started it."""
        lines = [[self.current, module, found] for test, module, found in self._lines() if test == self.current]
        with open(self.out.with_suffix(".children"), "a", encoding="utf-8") as file:
            file.write(json.dumps(lines) + "\n")

    def pytest_collection_finish(self) -> None:
        fork_commands(self._write)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.coverage.switch_context(nodeid)
        self.current = nodeid
        self.costs[nodeid] = -_processor_time()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.costs[nodeid] += _processor_time()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if not report.passed:
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        lines: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
        children = self.out.with_suffix(".children")
        told = children.read_text(encoding="utf-8").splitlines() if children.exists() else []
        children.unlink(missing_ok=True)
        for test, module, found in [*self._lines(), *(each for line in told for each in json.loads(line))]:
            lines[test][module] |= set(found)
        texts = {module: texts_of((self.tree / module).read_text(encoding="utf-8")) for module in self.modules}
        tests = {
            name: {
                "seconds": round(cost, 3),
                "lines": {
                    module: sorted({texts[module][line] for line in seen}) for module, seen in lines[name].items()
                },
            }
            for name, cost in self.costs.items()
            if name not in self.failed
        }
        self.out.write_text(json.dumps({"failed": sorted(self.failed), "tests": tests}), encoding="utf-8")

    def _lines(self) -> Iterator[tuple[str, str, list[int]]]:
        """(test, module, lines) that this process has seen."""
        self.coverage.stop()
        data = self.coverage.get_data()
        for module in self.modules:
            by_test: dict[str, list[int]] = defaultdict(list)
            for line, tests in data.contexts_by_lineno(str(self.tree / module)).items():
                for test in tests:
                    by_test[test].append(line)
            for test, found in by_test.items():
                yield test, module, found


def texts_of(source: str) -> list[str]:
    """The text of each line, from 1, with its number among equal ones: the same where others come and go."""
    seen: Counter = Counter()
    texts = [""]
    for line in source.splitlines():
        text = line.strip()
        seen[text] += 1
        texts.append(f"{text} #{seen[text]}")
    return texts


def fork_commands(at_end: Callable[[], object] = lambda: None) -> None:
    """Let commands be forked from the tests' process, which has imported the host and the changed line already."""
    forked = importlib.import_module("tests.forked")  # that of the copy
    command = importlib.import_module("tests.forked_server").command
    children: dict[int, Child] = {}

    def work(request: dict) -> None:
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # not what pytest put there
        try:
            command(request)
        finally:
            at_end()

    def ask(kind: str, **request: Any) -> Optional[int]:
        if "poll" in request:
            child = children[request["poll"]]
            return child.wait() if child.ended() else None
        child = forked.Child(lambda: work(request), Path(request["out"]), Path(request["err"]))
        children[child.pid] = child
        return child.pid

    forked._ask = ask


def _processor_time() -> float:
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


class Chosen:
    """A pytest plugin that leaves only some tests, and stops at the first that fails."""

    def __init__(self, names: list[str]) -> None:
        self.names = set(names)
        self.files = list(dict.fromkeys(name.partition("::")[0] for name in names))

    def pytest_configure(self, config: Any) -> None:
        config.option.maxfail = 1

    def pytest_collection_modifyitems(self, items: list) -> None:
        items[:] = [item for item in items if item.nodeid in self.names]

    def pytest_collection_finish(self) -> None:
        fork_commands()


class Covering:
    """The tests of a group of files, with what they run; what was recorded of an unchanged file is read again."""

    def __init__(self, tree: Path, files: list[str], modules: list[str], work: Path) -> None:
        self.tests: dict[str, dict[str, Any]] = {}
        work.mkdir(exist_ok=True)
        for file in files:
            # What a change of the product changes here is little, and a choice of tests does not have to be exact.
            out = work / f"{Path(file).stem}-{hashlib.sha256((tree / file).read_bytes()).hexdigest()[:16]}.json"
            if not out.exists():
                part = out.with_suffix(".part")
                verdict = run(tree, [file], out.with_suffix(".log"), Recorder(tree, modules, part))
                print(f"{file} without a mutant: {verdict}", flush=True)
                part.rename(out)
            self.tests |= json.loads(out.read_text(encoding="utf-8"))["tests"]

    def of(self, module: str, source: str, line: int, seconds: float) -> tuple[list[str], float]:
        """(tests, their seconds) that run a line, file by file, the cheapest file first, in ``seconds`` altogether.

        One case of each test function comes before the second case of any.
        """
        found, texts = [], texts_of(source)
        for lines in _where(source, line):
            wanted = {texts[each] for each in lines}
            found = [name for name, test in self.tests.items() if not wanted.isdisjoint(test["lines"].get(module, ()))]
            if found:
                break
        found.sort(key=lambda name: self.tests[name]["seconds"])
        case: Counter = Counter()
        order = []
        for name in found:
            function = name.partition("[")[0]
            order.append((case[function], self.tests[name]["seconds"], name))
            case[function] += 1
        files: dict[str, list[str]] = {}
        spent = 0.0
        for _, cost, name in sorted(order):
            file = name.partition("::")[0]
            cost += 0 if file in files else START
            if files and spent + cost > seconds:
                continue
            files.setdefault(file, []).append(name)
            spent += cost
        price = {file: sum(self.tests[name]["seconds"] for name in names) for file, names in files.items()}
        return [name for file in sorted(files, key=price.__getitem__) for name in files[file]], spent


def _where(source: str, line: int) -> list[set[int]]:
    """Sets of lines that show that ``line`` matters to a test, the nearest first.

    The statement itself in a function; for what runs at import the function or class that it is of; the module.
    """
    inside: list[ast.stmt] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt) and _first(node) <= line <= (node.end_lineno or 0):
            inside.append(node)
    inside.sort(key=lambda node: (node.end_lineno or 0) - _first(node))
    scopes = [node for node in inside if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    found = []
    if inside and any(isinstance(node, ast.FunctionDef) and node is not inside[0] for node in scopes):
        found.append(_own_lines(inside[0]))
    for scope in scopes:
        found.append({each for function in _functions(scope) for each in _lines_of(function.body)})
    whole = ast.parse(source)
    return [
        *found,
        {each for function in _functions(whole) for each in _lines_of(function.body)},
        _lines_of(whole.body),
    ]


def _first(node: ast.stmt) -> int:
    return min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])


def _own_lines(node: ast.stmt) -> set[int]:
    """A statement's lines without those of the statements in it."""
    body: Optional[list[ast.stmt]] = getattr(node, "body", None)
    return set(range(_first(node), max(body[0].lineno, _first(node) + 1) if body else (node.end_lineno or 0) + 1))


def _functions(node: ast.AST) -> list[ast.FunctionDef]:
    return [each for each in ast.walk(node) if isinstance(each, ast.FunctionDef)]


def _lines_of(body: list[ast.stmt]) -> set[int]:
    return set(range(body[0].lineno, (body[-1].end_lineno or 0) + 1)) if body else set()
