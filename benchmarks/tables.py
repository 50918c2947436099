"""The tables and pictures of a plan in ``benchmarks/plans/``, from what its sweep measured.

    python -m benchmarks.NAME ... --work DIR  # the sweep, and then this; or, by hand:
    head-pruning sweep benchmarks/plans/NAME.yaml --set ... --out DIR
    python -m benchmarks.tables NAME DIR      # takes what was measured in DIR into results/NAME.csv
    python -m benchmarks.tables NAME          # from results/NAME.csv alone

``results/NAME.csv`` is the sweep's ``results.csv`` without the commands, with how many heads stay in each site, and
(``decoder.layers.1.encoder_attn:0,3``, where no units go) which; earlier rows lack the latter. Rows of an earlier
sweep stay, unless the same cell was measured anew. What the tables look like is under ``x-table`` in the plan.
"""

import argparse
import csv
import re
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any, Iterable, Mapping, Sequence

import yaml

from head_pruning import HeadPruningError
from head_pruning.files import atomic_path, write_json
from head_pruning.report.plots import plot_runs, plot_scores
from head_pruning.report.runs import read_run
from head_pruning.report.tables import markdown_table
from head_pruning.sweep.plan import Cell, Plan, folder_of, read_plan
from head_pruning.sweep.results import RESULTS as COLLECTED

HERE = Path(__file__).resolve().parent
PLANS, STORED = HERE / "plans", HERE / "results"
SITES, STAY, SENTENCES = "heads_by_site", "heads_that_stay", "sentences"
DISTILLED = ", distilled"  # at the end of a method
ANY = "ANYTHING"
Row = dict[str, str]


def asked(name: str) -> tuple[Plan, dict[str, Any], dict[str, str]]:
    """A plan, its ``x-table``, and what ``--set`` must say; what only a user knows stands there in capitals.

    Args:
        name: of the plan; or, after it and a hyphen, of another table of it, with other values of its ``set``.
    """
    stem = name.partition("-")[0]
    path = PLANS / f"{stem}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in PLANS.glob("*.yaml")))
        raise HeadPruningError(f"There is no plan {stem}, only {known}.")
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    spec = found["x-table"]
    if name != stem:
        if name not in spec.get("also", {}):
            raise HeadPruningError(f"The plan {stem} has no table {name}; its x-table says which it has.")
        spec = {**spec, **spec["also"][name]}
    given = {each: each.upper() for each, value in found["set"].items() if value is None}
    given |= {each: str(value) for each, value in spec.get("set", {}).items()}
    return read_plan(path, given), spec, given


def check_commands(name: str, rows: Iterable[Row]) -> None:
    """Raise HeadPruningError for a row of a sweep that was measured by other commands than the plan's.

    What is no number in the plan's ``set`` may be any word, or none: a folder, or a GPU.
    """
    _, spec, given = asked(name)
    path = PLANS / f"{name.partition('-')[0]}.yaml"
    defaults = yaml.safe_load(path.read_text(encoding="utf-8"))["set"]
    any_word = {each: ANY for each, value in defaults.items() if not isinstance(value, (int, float))}
    lines = {cell.name: cell.lines for cell in read_plan(path, {**given, **any_word}).cells(Path(ANY))}
    for row in rows:
        cell = row["cell"].partition("/")[0]
        words = [re.escape(word).replace(ANY, ".*") for line in lines.get(cell, ()) for word in shlex.split(line)]
        pattern = "".join("(?:.*\n)?" if word == ".*" else f"{word}\n" for word in words)
        if words and not re.fullmatch(pattern, "".join(f"{word}\n" for word in shlex.split(row["commands"]))):
            raise HeadPruningError(
                f"{cell} was measured by other commands than those of the plan {name}; give the folder of its own "
                "sweep, made with the same --set."
            )


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV file. Raises HeadPruningError if there is none."""
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            return list(csv.DictReader(stream))
    except OSError as error:
        raise HeadPruningError(f"{path} cannot be read ({error.strerror}); run the sweep first.") from error


def collected(sweep: Path) -> list[Row]:
    """What a sweep measured, with the heads that its models keep, and how many sentences were translated."""
    rows = read_rows(sweep / COLLECTED)
    for row in rows:
        folder = folder_of(sweep, row["cell"])
        run = read_run(folder) if folder.is_dir() else None
        if run is not None and run.kept:
            row[SITES] = " ".join(f"{site}:{len(heads)}" for site, heads in run.kept.items() if heads)
            if "units_kept" not in run.numbers:  # of thousands of units how many there are will do
                row[STAY] = " ".join(
                    f"{site}:{','.join(map(str, heads))}" for site, heads in run.kept.items() if heads
                )
        log = sweep / "logs" / f"{row['cell']}.log"
        decoded = log.is_file() and re.findall(r"Translated ([\d,]+) sentences", log.read_text(errors="replace"))
        if decoded:
            row[SENTENCES] = decoded[-1].replace(",", "")
    return rows


def merged(cells: Sequence[Cell], *sources: Iterable[Row]) -> list[Row]:
    """The rows of all sources in the order of the cells, those of a cell from the last source that has it."""
    of_cell: dict[str, list[Row]] = {}
    for rows in sources:
        found: dict[str, list[Row]] = {}
        for row in rows:
            found.setdefault(row["cell"].partition("/")[0], []).append(row)
        of_cell |= found
    odd = sorted(of_cell.keys() - {cell.name for cell in cells})
    if odd:
        raise HeadPruningError(f"The plan has no cell {odd[0]}; give the folder of its own sweep.")
    return [row for cell in cells for row in of_cell.get(cell.name, ())]


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write CSV, without the commands, which name the folders of a machine."""
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name != "commands"]
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def shown(scores: Sequence[float]) -> str:
    """A score, or of several seeds the mean and the range."""
    if len(scores) == 1:
        return f"{scores[0]:.1f}"
    return f"{statistics.mean(scores):.1f} ({min(scores):.1f} to {max(scores):.1f})"


def scores_of(rows: Iterable[Row], words: str) -> list[float]:
    """The scores, as ``words`` has them."""
    return [float(row["score"]) * (100 if words.endswith("x 100") else 1) for row in rows]


def grouped(rows: Iterable[Row], column: str) -> dict[str, dict[str, list[Row]]]:
    """Rows by method and by a column."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        found.setdefault(row["method"], {}).setdefault(row[column], []).append(row)
    return found


def by_share(name: str, spec: Mapping[str, Any], plan: Plan, rows: list[Row], folder: "Path | None") -> list[str]:
    """A table for each task, methods by what is kept, and its picture, unless ``folder`` is None."""
    parts, column = [], spec["columns"]
    every = [str(share) for share in plan.axes.get(column, spec.get("shares", ()))]
    for task, words in spec["tasks"].items():
        mine = [row for row in rows if row["task"] == task]
        table = grouped((row for row in mine if row["method"] != "dense" and row.get(column) in every), column)
        dense = scores_of((row for row in mine if row["method"] == "dense"), words)
        if not table:
            continue
        shares = [s for s in every if column in plan.axes or any(s in line for line in table.values())]

        def cell(found: list[Row], words: str = words) -> str:
            numbers = {k: [float(row[k]) for row in found] for k in ("speed_up", "mac_bound") if k in found[0]}
            beside = spec.get("beside", "").format(**{k: statistics.mean(v) for k, v in numbers.items()})
            return "; ".join(filter(None, [shown(scores_of(found, words)), beside]))

        lines = sorted(table.items()) if spec.get("sorted") else list(table.items())
        body = [(method, *(cell(line[s]) if s in line else "" for s in shares)) for method, line in lines]
        title = f"{task}, {words}" + (f"; {spec['dense']} {shown(dense)}" if dense else "")
        heads = [spec.get("head", "{share} {unit}").format(share=share, unit=spec["unit"]) for share in shares]
        parts += [f"## {title}", "", markdown_table(("method", *heads), body), ""]
        if dense and folder is not None:
            drawn = {m: {float(s): scores_of(found, words) for s, found in line.items()} for m, line in table.items()}
            plot_scores(
                {m: [(s, statistics.mean(v)) for s, v in line.items()] for m, line in drawn.items()},
                folder / f"{name}-{task}.png",
                dense=(spec["dense"], statistics.mean(dense)),
                score=f"{task} {words}",
                total=spec["total"],
                spread={m: [(s, min(v), max(v)) for s, v in line.items() if len(v) > 1] for m, line in drawn.items()},
                unit=spec["unit"],
            )
    return parts


def by_site(row: Row, column: str) -> dict[str, str]:
    """What a column says of each site; nothing where the row lacks it."""
    parts = (part.rpartition(":") for part in (row.get(column) or "").split())
    return {site: words for site, _, words in parts}


def in_numbers(spec: Mapping[str, Any], rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Each run: the heads that it keeps, and its score as the tables have it."""
    found = []
    for row in rows:
        if row["method"] != "start":
            told = spec["tasks"][row["task"]]
            method, sign, _ = row["method"].partition(DISTILLED)
            stay = by_site(row, STAY)
            number = {
                "task": row["task"],
                "method": method,
                "heads": int(row.get("heads_kept") or told["total"]),
                "seed": int(row["seed"]),
                "distilled": bool(sign),
                "score": float(row["score"]) * told.get("scale", 1),
                SITES: {site: int(count) for site, count in by_site(row, SITES).items()},
            }
            if stay:
                number[STAY] = {site: [int(head) for head in heads.split(",")] for site, heads in stay.items()}
            found.append(number)
    return found


def by_mean(spec: Mapping[str, Any], rows: list[dict[str, Any]], picture: "Path | None") -> list[str]:
    """A table of :func:`in_numbers` for each task: mean and range of seeds, best mean first, the distilled last.

    And a picture of all runs, unless ``picture`` is None.
    """
    parts, panels = [], {}
    for task, told in spec["tasks"].items():
        groups: dict[tuple[int, bool, str], list[float]] = {}
        for row in rows:
            if row["task"] == task:
                name = row["method"] + DISTILLED * row["distilled"]
                groups.setdefault((row["heads"], row["distilled"], name), []).append(row["score"])
        order = sorted(groups.items(), key=lambda g: (-g[0][0], g[0][1], -statistics.mean(g[1])))
        lines = [
            (method, kept, f"{statistics.mean(v):.2f}", f"{min(v):.2f} to {max(v):.2f}", len(v))
            for (kept, _, method), v in order
        ]
        if lines:
            header = ("method", f"heads kept of {told['total']}", f"mean {told['score']}", "range", "runs")
            parts += [f"## {task}: {told['about']}", "", markdown_table(header, lines), ""]
        for (kept, _, method), scores in order:
            title = f"{task}, {kept} of {told['total']} heads: {told['score']}"
            panels.setdefault(title, {})[method] = scores
    if picture is not None and panels:
        plot_runs(panels, picture)
    return parts


def by_run(name: str, spec: Mapping[str, Any], plan: Plan, rows: list[Row], folder: "Path | None") -> list[str]:
    """One table, a line for each run, and its picture, unless ``folder`` is None."""
    columns: dict[str, list[Any]] = {
        column: [] for column in ("method", f"heads kept of {spec['total']}", spec["runs"])
    }
    columns |= {"updates": [], SENTENCES: [], "published code": []}
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        kept = int(row.get("heads_kept") or row.get("heads") or spec["total"])
        length = spec["updates"].get(row["method"], "updates")
        found = (row["method"], kept, float(row["score"]), plan.given.get(length, length), row.get(SENTENCES, ""))
        for column, value in zip(columns.values(), (*found, spec.get("published", {}).get(row["cell"], ""))):
            column.append(value)
        curves.setdefault(row["method"], []).append((kept, float(row["score"])))
    told = {header: column for header, column in columns.items() if any(value != "" for value in column)}
    dense = curves.pop("dense", None)
    if dense and curves and folder is not None:
        level = ("dense", dense[0][1])
        plot_scores(curves, folder / f"{name}.png", dense=level, score=spec["runs"], total=spec["total"])
    return [markdown_table(list(told), list(zip(*told.values())))]


def write_tables(name: str, rows: list[Row], folder: Path, pictures: bool = True) -> None:
    """Write ``NAME.csv``, ``NAME.md`` and the pictures."""
    plan, spec, given = asked(name)
    cells = plan.cells(Path("DIR"))
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(rows, folder / f"{name}.csv")
    flags = "".join(f"--set {each}={value} " for each, value in given.items())
    about = spec.get("about", "").format(rows=len(rows), cells=len(cells))
    parts = [f"# {spec['title']}", ""]
    command = f"head-pruning sweep benchmarks/plans/{name.partition('-')[0]}.yaml {flags}--out DIR"
    parts += [f"`{command}`", ""]
    parts += [about, ""] if about else []
    if "columns" in spec:
        parts += by_share(name, spec, plan, rows, folder if pictures else None)
    elif "runs" in spec:
        parts += by_run(name, spec, plan, rows, folder if pictures else None)
    else:
        numbers = in_numbers(spec, rows)
        write_json(folder / f"{name}.json", {"command": command, "rows": numbers})
        parts += by_mean(spec, numbers, folder / f"{name}.png" if pictures else None)
    with atomic_path(folder / f"{name}.md") as temporary:
        temporary.write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")


def take(name: str, sweeps: Iterable[Path], folder: Path) -> None:
    """Take what sweeps have measured into the rows in a folder, and write the tables there.

    Raises:
        HeadPruningError: nothing was measured, or by other commands than the plan's.
    """
    cells = asked(name)[0].cells(Path("DIR"))
    stored = folder / f"{name}.csv"
    found = [collected(sweep) for sweep in sweeps]
    for rows in found:
        check_commands(name, rows)
    before = read_rows(stored) if stored.exists() or not found else []
    write_tables(name, merged(cells, before, *found), folder)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the plan, without .yaml")
    parser.add_argument("sweep", nargs="*", type=Path, help="folder of its sweep; of several the last counts most")
    parser.add_argument("--results", type=Path, default=STORED, help="folder of NAME.csv, tables and pictures")
    options = parser.parse_args()
    try:
        take(options.name, options.sweep, options.results)
    except HeadPruningError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
