"""One page about many runs: scores over what is kept, the best trade-offs, the kept heads, every run in a table."""

from __future__ import annotations

import base64
import re
import shlex
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, NamedTuple, Optional, Sequence
from urllib.parse import quote

from ..errors import HeadPruningError
from ..files import atomic_path
from ..masks import HeadMask, numbered_alike
from .plots import plot_head_masks, plot_scores
from .runs import NUMBERS, Run, lower_is_better
from .tables import head_table

#: What scores are drawn over: the numbers that may stand for it, and the axis.
AXES = {
    "heads": (("heads_kept",), "heads kept"),
    "units": (("units_kept",), "feed-forward units kept"),
    "density": (("density",), "density of the weights"),
    "size": (("nonzero_parameters", "parameters"), "parameters that are not zero"),
    "file": (("file_bytes",), "bytes of the model's file"),
    "latency": (("latency_ms",), "latency of one example, ms"),
}
_SHOWN_MASKS = 6
_TEMPLATES = "templates"


class Point(NamedTuple):
    """Runs that differ in their seeds alone: means, and the range of the scores."""

    curve: str
    where: float
    score: float
    low: float
    high: float
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Figure:
    """A picture.

    Args:
        name: of its file, without an ending.
        title: shown above.
        text: what the picture shows, for who does not see it.
        detail: more of it, as plain text.
    """

    name: str
    title: str
    text: str
    detail: str = ""


@dataclass(frozen=True)
class Section:
    """The runs of one task: those whose scores can be compared."""

    title: str
    score_name: str
    dense: str
    runs: Sequence[Run]
    figures: Sequence[Figure]


def curve_of(run: Run) -> str:
    """The line that a run belongs to: its method, and what else its sweep called by words."""
    more = [f"{name} {value}" for name, value in run.values.items() if isinstance(value, str) and name not in _GIVEN]
    return ", ".join([run.method, *more])


_GIVEN = ("method", "task", "seed")


def points_of(runs: Iterable[Run], axis: str) -> list[Point]:
    """The points of a picture over one of :data:`AXES`, of runs with a score and that number; all seeds are one.

    Nothing tells the seed of a run outside of a sweep: those of one model, with the same options and counts, are
    taken for seeds whose names differ in digits alone.
    """
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        if run.score is not None and _where(run, axis) is not None:
            values = tuple((name, str(value)) for name, value in run.values.items() if name != "seed")
            count = () if run.values else (re.sub(r"\d+", "", run.name), str(run.options), *_counts(run))
            model = run.name.partition("/")[2] if run.values else ""  # one of many that a run left
            groups.setdefault((curve_of(run), values, count, model), []).append(run)
    found = []
    for (curve, *_), group in groups.items():
        scores = [run.numbers["score"] for run in group]
        where = statistics.mean(_where(run, axis) or 0.0 for run in group)
        found.append(Point(curve, where, statistics.mean(scores), min(scores), max(scores), tuple(group)))
    return found


def _counts(run: Run) -> tuple:
    names = ("heads_kept", "heads_total", "units_kept", "units_total", "density")
    return *map(run.numbers.get, names), tuple(run.kept)


def _where(run: Run, axis: str) -> Optional[float]:
    return next((run.numbers[name] for name in AXES[axis][0] if name in run.numbers), None)


def pareto(points: Iterable[Point], lower: bool = False) -> list[Point]:
    """The points that no other beats in both, from the smallest: less of what the axis counts, and a better score.

    Args:
        points: of one picture.
        lower: whether the lower score is the better one.
    """
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.where, p.score if lower else -p.score)):
        if not best or (point.score < best[-1].score if lower else point.score > best[-1].score):
            best.append(point)
    return best


def _sections(runs: Sequence[Run]) -> Iterator[tuple[str, str, list[Run]]]:
    """Title, score and runs of each task, those without a score last."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((str(run.values.get("task", "")), run.score_name), []).append(run)
    for (task, score), group in sorted(groups.items(), key=lambda item: (not item[0][1], item[0])):
        yield " ".join(filter(None, (task, score))) or "without a score", score, group


def build_sections(runs: Sequence[Run], pictures: Path, endings: Sequence[str] = (".svg",)) -> list[Section]:
    """The parts of the page; their pictures go to the folder ``pictures``, one file for each of ``endings``."""
    found = []
    for number, (title, score, group) in enumerate(_sections(runs), 1):
        lower = lower_is_better(score)
        order = sorted(group, key=lambda run: (run.score is None, (run.score or 0.0) * (1 if lower else -1), run.name))
        dense = [run.numbers["score"] for run in group if run.dense and run.score is not None]
        figures = list(_figures(f"{number}", group, score, dense, pictures, endings)) if score else []
        figures += _mask_figures(f"{number}", order, lower, pictures, endings)
        found.append(Section(title, score, _shown(dense), order, figures))
    return found


def _shown(scores: Sequence[float]) -> str:
    if len(scores) < 2:
        return "".join(f"{score:.4g}" for score in scores)
    return f"{statistics.mean(scores):.4g} ({min(scores):.4g} to {max(scores):.4g} of {len(scores)} runs)"


def _figures(
    prefix: str, runs: Sequence[Run], score: str, dense: Sequence[float], pictures: Path, endings: Sequence[str]
) -> Iterator[Figure]:
    lower = lower_is_better(score)
    level = ("dense", statistics.mean(dense)) if dense else None
    for axis, (_, words) in AXES.items():
        points = points_of(runs, axis)
        if len({point.where for point in points}) < 2:
            continue
        front = pareto(points, lower)
        curves: dict[str, list[tuple[float, float]]] = {}
        spread: dict[str, list[tuple[float, float, float]]] = {}
        for point in points:
            curves.setdefault(point.curve, []).append((point.where, point.score))
            if len(point.runs) > 1:
                spread.setdefault(point.curve, []).append((point.where, point.low, point.high))
        name = f"{prefix}-{axis}"
        best = [(point.where, point.score) for point in front]
        for ending in endings:
            path = pictures / f"{name}{ending}"
            plot_scores(curves, path, dense=level, score=score, unit=words, spread=spread, front=best)
        told = "; ".join(f"{p.score:.4g} at {p.where:,.6g} ({p.curve})" for p in front)
        text = f"{score} over {words}, {len(points)} points of {len(curves)} methods. Not beaten in both: {told}."
        yield Figure(name, f"{score} over {words}", text)


def _mask_figures(
    prefix: str, runs: Sequence[Run], lower: bool, pictures: Path, endings: Sequence[str]
) -> Iterator[Figure]:
    """The kept heads of the best models of the front, or of the first ones where nothing was scored."""
    front = [point.runs for point in pareto((p for p in points_of(runs, "heads") if p.runs[0].kept), lower)]
    best = [min(group, key=lambda run: (run.score or 0.0) * (1 if lower else -1)) for group in front]
    masks: dict[str, HeadMask] = {}
    others = []  # of another model, which has no place in the picture
    for run in best[-_SHOWN_MASKS:] or list(runs):
        mask = run.mask() if len(masks) < _SHOWN_MASKS else None
        if mask is None:
            continue
        title = f"{run.name}\n{run.method}" + ("" if run.score is None else f": {run.score:.4g}")
        try:
            masks = dict(zip([*masks, title], numbered_alike([*masks.values(), mask])))
        except HeadPruningError:
            others.append(run.name)
    if not masks:
        return
    for ending in endings:
        plot_head_masks(masks, pictures / f"{prefix}-masks{ending}")
    names = ", ".join(f"{title.partition(chr(10))[0]} with {mask.words}" for title, mask in masks.items())
    tables = "\n\n".join(f"{title}\n{head_table(mask)}" for title, mask in masks.items())
    yield Figure(
        f"{prefix}-masks",
        "Heads that are kept, by site",
        f"A square per head, filled where it is kept: {names}."
        + (f" Left out, as other models' masks: {', '.join(others)}." if others else ""),
        tables,
    )


# -- what is written -------------------------------------------------------------------------------------------------


def write_page(runs: Sequence[Run], path: "str | Path", title: str, markdown: "str | Path | None" = None) -> None:
    """Write one HTML file that holds everything: no other file, no network, no script is needed to read it.

    Args:
        runs: of :func:`head_pruning.report.runs.find_runs`.
        path: the HTML file.
        title: its heading.
        markdown: a Markdown file to write too; its pictures go into a folder beside it, as SVG and PNG.

    Raises:
        HeadPruningError: both files are one, or the disk takes nothing.
    """
    if markdown is not None and Path(markdown).resolve() == Path(path).resolve():
        raise HeadPruningError(f"{markdown} is to be both HTML and Markdown; name two files.")
    with tempfile.TemporaryDirectory(prefix="head-pruning-") as temporary:
        pictures, endings = Path(temporary), [".svg"]
        if markdown is not None:
            pictures, endings = Path(markdown).with_name(f"{Path(markdown).stem}-figures"), [".svg", ".png"]
        sections = build_sections(runs, pictures, endings)
        figures = [figure for part in sections for figure in part.figures]
        _write("report.html", path, sections, {each.name: _inline(pictures, each) for each in figures}, title)
        if markdown is not None:
            sources = {each.name: f"{quote(pictures.name)}/{each.name}.png" for each in figures}
            _write("report.md", markdown, sections, sources, title)


def _inline(pictures: Path, figure: Figure) -> str:
    data = base64.b64encode((pictures / f"{figure.name}.svg").read_bytes()).decode("ascii")
    return f"data:image/svg+xml;base64,{data}"


def _write(template: str, path: "str | Path", sections: list[Section], sources: Mapping[str, str], title: str) -> None:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name(_TEMPLATES)),
        autoescape=template.endswith(".html"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"number": _number, "words": _words, "markdown": _markdown, "code": _code}
    text = environment.get_template(template).render(
        title=title,
        sections=sections,
        sources=sources,
        columns=[_columns(section.runs) for section in sections],
        versions=_versions([run for section in sections for run in section.runs]),
    )
    with atomic_path(path) as temporary:
        temporary.write_text(text.rstrip() + "\n", encoding="utf-8")


def _columns(runs: Sequence[Run]) -> dict[str, Any]:
    """What the table of a section has columns for: the values that a sweep set, and the numbers that are known."""
    values = dict.fromkeys(name for run in runs for name in run.values if name not in ("method", "task"))
    return {"values": list(values), "numbers": {k: v for k, v in NUMBERS.items() if any(k in r.numbers for r in runs)}}


def _number(value: Optional[float]) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 1000 else f"{value:.5g}"


def _words(run: Run) -> str:
    """The exact commands of a run; without them the options of its method."""
    if run.commands:
        return "\n".join(run.commands)
    return " ".join(f"{name}={shlex.quote(str(value))}" for name, value in run.options.items())


def _markdown(value: Any) -> str:
    """A value on one line of Markdown, which shows it as it is."""
    text = " ".join(str(value).splitlines())
    return re.sub(r"[\\`*\[\]<>|~$]|(?<!\w)_|_(?!\w)|&(?=[\w#])", r"\\\g<0>", text)


def _code(text: str) -> str:
    """The same for command lines, in a cell of a table."""
    text = " ; ".join(text.splitlines()).replace("|", r"\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in (text[:1], text[-1:]) else ""
    return f"{fence}{space}{text}{space}{fence}" if text else ""


def _versions(runs: Sequence[Run]) -> dict[str, str]:
    """Package to its version, or to all of them with the number of runs of each."""
    found: dict[str, dict[str, int]] = {}
    for run in runs:
        for name, version in run.versions.items():
            counts = found.setdefault(name, {})
            counts[version] = counts.get(version, 0) + 1
    return {
        name: ", ".join(
            version if len(counts) == 1 else f"{version} ({count} runs)" for version, count in counts.items()
        )
        for name, counts in sorted(found.items())
    }
