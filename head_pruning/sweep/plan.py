"""The plan of a sweep: a YAML file that says which command lines to run, and what to measure of what they leave.

    command: python -m hf_plugin.run_glue --output_dir {out} --task_name {task} --seed {seed}
      --num_train_epochs {task.epochs} --model_name_or_path {model} {method}
    set: {model: bert-base-uncased}   # --set model=... gives another
    grid:
      task:                         # a name, and what else is known of it
        CoLA: {epochs: 4}
        MRPC: {epochs: 3}
      seed: {from: 1, to: 3}
      heads: [36, 18]
      method:                       # a name, and the words that stand for it
        dense: ""
        dsp: --pruner dsp --num_of_heads {heads} --joint_pruning

Each combination of the grid is a cell. Values that a cell's command does not use do not tell cells apart: ``dense``
has one cell for each task and seed above. ``{out}`` is the cell's own folder, ``{out[method=dense]}`` that of the cell
with this other value, which runs first. A command that has no words in a cell is left out there.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, Optional, Sequence

from ..compact.shapes import Either, Number, Whole, conform
from ..errors import HeadPruningError, one_line
from ..yaml_text import UniqueLoader, parse_yaml

_SCALAR = Either(str, int, Number(), bool)
_PLAN = {
    "command": Either(str, [str]),
    "grid?": {str: Either([_SCALAR], {str: Either(_SCALAR, {str: _SCALAR})}, _SCALAR)},
    "set?": {str: Either(_SCALAR, None)},
    "include?": [{str: Either([_SCALAR], _SCALAR)}],
    "exclude?": [{str: Either([_SCALAR], _SCALAR)}],
    "score?": Either(str, [str]),
    "score_pattern?": str,
    "measure?": [str],
    "benchmark?": str,
    "env?": {str: _SCALAR},
    "threads?": Whole(1),
    "gpus?": Whole(),
    "unfinished?": str,
    "keep_models?": bool,
    "search?": {str: {"low": Number(), "high": Number(), "log?": bool, "whole?": bool}},
    "aim?": {str: Number()},
}
#: What can be measured, and the numbers that say it.
MEASURES = {
    "score": ("score",),
    "heads": ("heads_kept", "heads_total"),
    "units": ("units_kept", "units_total"),
    "density": ("density",),
    "parameters": ("parameters", "nonzero_parameters"),
    "file_size": ("file_bytes",),
    "latency": ("latency_ms",),
    "throughput": ("examples_per_second",),
    "macs": ("macs",),
    "speed_up": ("speed_up", "mac_bound"),
}
#: Of them, what takes a run of ``head-pruning benchmark``.
TIMED = ("latency", "throughput", "macs", "speed_up")
_LONGEST = 200  # bytes of a cell's name, to which files' names add theirs
_PLACE = re.compile(r"\{([A-Za-z_]\w*)(?:\.(\w+))?(?:\[([^\]{}]*)\])?\}")

# Of each value of an axis the words that stand for it, under "", or what is known of it: a name, and words.
Words = Mapping[str, Mapping[str, Mapping[str, tuple[str, ...]]]]


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Args:
        name: unique in its sweep, and a file name.
        values: the values that its command uses.
        commands: command lines, run one after the other.
        after: the names of the cells whose folders it reads.
        benchmark: what ``head-pruning benchmark`` is told beside its model.
    """

    name: str
    values: Mapping[str, Any]
    commands: tuple[tuple[str, ...], ...]
    after: tuple[str, ...] = ()
    benchmark: tuple[str, ...] = ()

    @property
    def lines(self) -> list[str]:
        """Its command lines, as a shell takes them; the benchmark's without its model, which is not there yet."""
        timed = [("head-pruning", "benchmark", *self.benchmark)] if self.benchmark else []
        return [shlex.join(words) for words in (*self.commands, *timed)]


@dataclass(frozen=True)
class Plan:
    """What a plan's file says; docs/sweeps.md says what is.

    Args:
        commands: the command lines of a cell, with places for its values.
        axes: name to the values of the grid; of values with words, the names.
        words: of an axis whose values have words: value to them, see :data:`Words`.
        given: what else commands have a place for: name to the one word that stands there.
        include: cells beside what is left of the grid.
        exclude: cells of the grid that are left out: where all values are among these.
        scores: keys of all_results.json that a score is taken from, the first that is there (of several that are
            joined by + the mean); empty for the usual ones.
        score_pattern: a regular expression; the last place in a cell's log that it finds is the score instead.
        measure: of :data:`MEASURES`.
        benchmark: what ``head-pruning benchmark`` is told.
        env: variables of the environment.
        threads: of each cell.
        gpus: of each cell.
        go_on: whether the folder of a cell that was cut off is left as it is, for its command to go on there.
        keep_models: whether models stay once they have been measured; those that cells start from always do.
        search: parameters of a search: name to its range.
        aim: the numbers that a search should reach; empty to look for the best score.
    """

    commands: tuple[tuple[str, ...], ...]
    axes: Mapping[str, Sequence[Any]]
    words: Words
    given: Mapping[str, str] = field(default_factory=dict)
    include: Sequence[Mapping[str, Sequence[Any]]] = ()
    exclude: Sequence[Mapping[str, Sequence[Any]]] = ()
    scores: tuple[str, ...] = ()
    score_pattern: Optional[str] = None
    measure: tuple[str, ...] = ("score", "heads", "units", "density", "parameters", "file_size")
    benchmark: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    threads: int = 1
    gpus: int = 0
    go_on: bool = False
    keep_models: bool = True
    search: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    aim: Mapping[str, float] = field(default_factory=dict)

    def combinations(self) -> Iterator[dict[str, Any]]:
        """The values of every cell, before those that a command does not use are left out."""
        every = list(_products(self.axes)) if self.axes or not self.include else []
        idle = next((out for out in self.exclude if not any(_within(values, out) for values in every)), None)
        if idle is not None:
            told = _told({name: " or ".join(map(str, values)) for name, values in idle.items()})
            raise HeadPruningError(f"The plan excludes {told}, which fits no cell of its grid; correct it or drop it.")
        left = [values for values in every if not any(_within(values, out) for out in self.exclude)]
        return itertools.chain(left, *map(_products, self.include))

    def cells(self, work: Path) -> list[Cell]:
        """All cells, in the order of the plan; their folders lie in ``work``, as it stands in their commands.

        Raises:
            HeadPruningError: a command has a place for a value that there is not, two cells have one name, one has a
                name that no file can have, no command, a cell starts from one that is not in the plan, or nothing is
                excluded by an entry of ``exclude``.
        """
        found = Cells(self, work)
        cells = {cell.name: cell for cell in map(found.cell, self.combinations())}
        for cell in cells.values():
            missing = [name for name in cell.after if name not in cells]
            if missing:
                raise HeadPruningError(
                    f"The cell {cell.name} starts from {missing[0]}, which the plan leaves out; add it to the grid."
                )
        return list(cells.values())


class Cells:
    """Fills a plan's commands in.

    Args:
        plan: the plan.
        work: folder of the sweep, as commands name it.
    """

    def __init__(self, plan: Plan, work: Path) -> None:
        self.plan, self.work = plan, work
        self._open: list[dict] = []  # the cells that are being filled in, to see circles
        self._named: dict[str, Cell] = {}

    def cell(self, values: Mapping[str, Any]) -> Cell:
        """The cell of these values. Raises HeadPruningError, see :meth:`Plan.cells`."""
        if dict(values) in self._open:
            raise HeadPruningError(f"The cell of {_told(values)} starts from itself; name another in its out[...].")
        self._open.append(dict(values))
        used: dict[str, Any] = {}
        after: dict[str, None] = {}
        lines = (*self.plan.commands, self.plan.benchmark)
        filled = [self._fill(words, values, used, after) for words in lines]
        self._open.pop()
        own = {name: value for name, value in values.items() if name in used}
        name = re.sub(r"[^\w.+-]+", "-", "-".join(_part(*item) for item in own.items()))
        name = name if name.strip(".") else "cell"  # "..", a folder, would be that of the sweep itself
        if len(name.encode()) > _LONGEST:
            raise HeadPruningError(
                f"The cell {name:.40}... would have files of names that are too long; have short names stand for its "
                "values, as words of the grid."
            )
        folder = str(folder_of(self.work, name))
        *every, benchmark = (tuple(word.replace("{out}", folder) for word in words) for words in filled)
        commands = tuple(words for words in every if words)
        if not commands:
            raise HeadPruningError(f"The cell {name} has no command; give one to each value of the grid.")
        cell = Cell(name, own, commands, tuple(after), benchmark)
        if self._named.setdefault(name, cell) != cell:
            raise HeadPruningError(f"Two cells of the plan are called {name}; give their values names that differ.")
        return cell

    def _fill(self, words: Sequence[str], values: Mapping[str, Any], used: dict, after: dict) -> list[str]:
        filled: list[str] = []
        for word in words:
            place = _PLACE.fullmatch(word)
            found = self._words(place, values, used, after) if place else None
            if found is None:
                found = [_PLACE.sub(lambda place: self._put(place, values, used, after), word)]
            filled += found
        return filled

    def _words(self, place: re.Match, values: Mapping[str, Any], used: dict, after: dict) -> Optional[list[str]]:
        """What stands for a place that is all of a word; None: one word."""
        name, key = place[1], place[2] or ""
        if name in self.plan.given:
            return [self.plan.given[name]] if self.plan.given[name] else []
        known = self.plan.words.get(name, {})
        if not any(key in texts for texts in known.values()):
            return None
        return self._fill(known[self._value(name, values, used)].get(key, ()), values, used, after)

    def _put(self, place: re.Match, values: Mapping[str, Any], used: dict, after: dict) -> str:
        name, key, others = place.groups()
        if name != "out":
            if others is not None:
                raise HeadPruningError(f"The plan has {place[0]}, but only out takes [...]; write {{{name}}}.")
            if key is not None:
                return " ".join(self._words(place, values, used, after) or ())
            return self.plan.given[name] if name in self.plan.given else str(self._value(name, values, used))
        if others is None:
            return "{out}"
        change = {}
        for part in filter(None, (part.strip() for part in others.split(","))):
            axis, sign, value = part.partition("=")
            same = [each for each in self.plan.axes.get(axis, ()) if str(each) == value]
            if not sign or not same:
                raise HeadPruningError(f"The plan has {place[0]}, but no cell with {part}; name a value of the grid.")
            change[axis] = same[0]
        start = self.cell({**values, **change})
        used |= {axis: value for axis, value in start.values.items() if axis not in change}
        after[start.name] = None
        return str(folder_of(self.work, start.name))

    def _value(self, name: str, values: Mapping[str, Any], used: dict) -> Any:
        if name not in values:
            if name in self.plan.search:
                names = ", ".join(self.plan.search)
                raise HeadPruningError(
                    f"The plan is a search for {names}; say with --optuna N how many cells to measure."
                )
            known = ", ".join(["out", *self.plan.given, *values])
            raise HeadPruningError(
                f"The plan's command has a place for {name}, which has no value here ({known} have)."
            )
        used[name] = values[name]
        return values[name]


def _products(grid: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    return (dict(zip(grid, values)) for values in itertools.product(*grid.values()))


def _within(values: Mapping[str, Any], limits: Mapping[str, Sequence[Any]]) -> bool:
    return all(values.get(name) in among for name, among in limits.items())


def folder_of(work: Path, name: str) -> Path:
    """Where the cell ``name`` leaves its files."""
    return work / "runs" / name


def _part(axis: str, value: Any) -> str:
    return value if isinstance(value, str) else f"{axis}{value}"


def _told(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


class _Loader(UniqueLoader):
    """Reads 1e-4 as a number too, as JSON and Python do."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
)


def read_plan(path: "str | Path", given: Mapping[str, str] = {}) -> Plan:
    """The plan in a YAML file.

    Args:
        path: the file. Its entries that start with ``x-`` are for others.
        given: in place of what its ``set`` says.

    Raises:
        HeadPruningError: there is none, it is not of this form, or what its ``set`` asks for is not given.
    """
    path = Path(path)
    if not path.is_file():
        raise HeadPruningError(f"There is no plan {path}; check the path.")
    try:
        plan = conform(parse_yaml(path.read_text(encoding="utf-8"), _Loader), _PLAN, "the plan")
        known = [name.rstrip("?") for name in _PLAN]
        more = [name for name in plan if name not in known and not name.startswith("x-")]
        if more:
            raise ValueError(f"it has {more[0]}, but there is only {', '.join(known)}")
        made = _plan(plan)
    except ValueError as error:
        raise HeadPruningError(
            f"{path} is no plan of a sweep ({one_line(error):.300}); docs/sweeps.md says what is."
        ) from error
    return dataclasses.replace(made, given=_given(made.given, given, path))


def _given(defaults: Mapping[str, Any], given: Mapping[str, str], path: Path) -> dict[str, str]:
    """What stands for each name of ``set``."""
    odd = next((name for name in given if name not in defaults), None)
    if odd is not None:
        names = f"only {', '.join(defaults)}" if defaults else "nothing"
        raise HeadPruningError(f"--set {odd} is for nothing: {path} asks for {names}; correct it or leave it out.")
    found = {**defaults, **given}
    missing = [name for name, value in found.items() if value is None]
    if missing:
        flags = " ".join(f"--set {name}=..." for name in missing)
        raise HeadPruningError(f"{path} does not say what {missing[0]} is; add {flags}.")
    return {name: str(value) for name, value in found.items()}


def _plan(plan: Mapping[str, Any]) -> Plan:
    axes: dict[str, Sequence[Any]] = {}
    words: dict[str, dict[str, dict[str, tuple[str, ...]]]] = {}
    texts: list[str] = [plan.get("benchmark", "")]
    for axis, values in plan.get("grid", {}).items():
        if isinstance(values, dict) and values.keys() <= {"from", "to", "step"} and {"from", "to"} <= values.keys():
            axes[axis] = _steps(axis, values["from"], values["to"], values.get("step", 1))
        elif isinstance(values, dict):
            known = {name: each if isinstance(each, dict) else {"": each} for name, each in values.items()}
            if any("" in each for each in known.values()) and any(each.keys() - {""} for each in known.values()):
                raise ValueError(f"{axis} of its grid has words for some values, and names for others")
            words[axis] = {n: {k: _split(str(t)) for k, t in each.items()} for n, each in known.items()}
            texts += [str(text) for each in known.values() for text in each.values()]
            axes[axis] = tuple(values)
        else:
            axes[axis] = tuple(values) if isinstance(values, list) else (values,)
        if not axes[axis]:
            raise ValueError(f"{axis} of its grid has no values")
    measure = tuple(plan.get("measure", Plan.measure))
    unknown = [name for name in measure if name not in MEASURES]
    if unknown:
        raise ValueError(f"{unknown[0]} cannot be measured, only {', '.join(MEASURES)}")
    if "benchmark" in plan and not any(name in TIMED for name in measure):
        raise ValueError(f"its benchmark is for none of what it measures; measure one of {', '.join(TIMED)}")
    unfinished = plan.get("unfinished", "restart")
    if unfinished not in ("restart", "continue"):
        raise ValueError(f"unfinished is {unfinished}, not restart or continue")
    if "score_pattern" in plan and _groups(plan["score_pattern"]) != 1:
        raise ValueError("score_pattern has not one pattern in parentheses, that of the number")
    lines = plan["command"] if isinstance(plan["command"], list) else [plan["command"]]
    commands = [_split(line) for line in lines]
    if not all(commands):
        raise ValueError("its command is empty")
    texts += lines
    if not any("{out}" in text for text in texts):
        raise ValueError("its command has no {out}, so the runs would write over each other")
    include = [_lists(each) for each in plan.get("include", ())]
    search = plan.get("search", {})
    kinds = {"grid": axes, "include": itertools.chain(*include), "search": search, "set": plan.get("set", {})}
    _check_names(kinds, words, texts)
    for name, values in itertools.chain(*(each.items() for each in include)):
        odd = next((value for value in values if name in words and value not in words[name]), None)
        if odd is not None:
            raise ValueError(f"its include has the {name} {odd}, of which its grid has no words")
    _check_search(search, plan.get("aim", {}), {number for name in measure for number in MEASURES[name]})
    score = plan.get("score", ())
    return Plan(
        commands=tuple(commands),
        axes=axes,
        words=words,
        given=plan.get("set", {}),
        include=include,
        exclude=[_lists(each) for each in plan.get("exclude", ())],
        scores=(score,) if isinstance(score, str) else tuple(score),
        score_pattern=plan.get("score_pattern"),
        measure=measure,
        benchmark=_split(plan.get("benchmark", "")),
        env={name: str(value) for name, value in plan.get("env", {}).items()},
        threads=plan.get("threads", 1),
        gpus=plan.get("gpus", 0),
        go_on=unfinished == "continue",
        keep_models=plan.get("keep_models", True),
        search=search,
        aim=plan.get("aim", {}),
    )


def _split(text: str) -> tuple[str, ...]:
    """Words as a shell takes them; a place is one, whatever is in it."""
    places: list[str] = []

    def hide(place: re.Match) -> str:
        places.append(place[0])
        return f"\0{len(places) - 1}\0"

    words = shlex.split(_PLACE.sub(hide, text))
    return tuple(re.sub("\0(\\d+)\0", lambda hidden: places[int(hidden[1])], word) for word in words)


def _check_names(kinds: Mapping[str, Iterable[str]], words: Words, texts: Sequence[str]) -> None:
    """Raise ValueError for values that no command has a place for, and places for what no value has."""
    places = dict.fromkeys((place[1], place[2]) for text in texts for place in _PLACE.finditer(text))
    taken = {"out"}
    for kind, names in kinds.items():
        for name in names:
            if not any(name == axis for axis, _ in places):
                raise ValueError(f"its {kind} has {name}, but its command has no {{{name}}}")
            if kind == "set" and name in taken:
                raise ValueError(f"its set has {name}, which something else is called too")
            taken.add(name)
    keys = {(axis, key) for axis, values in words.items() for each in values.values() for key in each if key}
    odd = next((each for each in places if each[1] is not None and each not in keys), None)
    if odd is not None:
        raise ValueError(f"its command has {{{odd[0]}.{odd[1]}}}, but no value of its {odd[0]} has {odd[1]}")
    idle = min(keys - places.keys(), default=None)
    if idle is not None:
        raise ValueError(f"its {idle[0]} has {idle[1]}, but its command has no {{{idle[0]}.{idle[1]}}}")


def _check_search(search: Mapping[str, Mapping[str, Any]], aim: Mapping[str, float], measured: set[str]) -> None:
    """Raise ValueError for ranges that are none, and for aims that are not measured."""
    for name, space in search.items():
        low, high = space["low"], space["high"]
        if not low < high or space.get("log") and low <= 0:
            raise ValueError(
                f"{name} of its search goes from {low:g} to {high:g}; the first must be lower, and above 0 for log"
            )
        if space.get("whole") and not (float(low).is_integer() and float(high).is_integer()):
            raise ValueError(f"{name} of its search is whole, but goes from {low:g} to {high:g}")
    odd = next((name for name in aim or (("score",) if search else ()) if name not in measured), None)
    if odd is not None:
        raise ValueError(f"its search looks for {odd}, which it does not measure, only {', '.join(sorted(measured))}")


def _groups(pattern: str) -> int:
    try:
        return re.compile(pattern).groups
    except re.error:
        return -1


def _lists(values: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    return {name: tuple(value) if isinstance(value, list) else (value,) for name, value in values.items()}


def _steps(axis: str, low: float, high: float, step: float) -> tuple[float, ...]:
    if any(isinstance(value, (str, bool)) for value in (low, high, step)) or step <= 0 or high < low:
        raise ValueError(f"{axis} of its grid goes from {low} to {high} by {step}; give numbers, and a step above 0")
    return tuple(round(low + step * i, 12) for i in range(int((high - low) / step + 1e-9) + 1))
