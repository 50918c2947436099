"""What the cells of a sweep measured, together: a table for people, CSV, Parquet."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, Mapping, Sequence

from ..errors import HeadPruningError
from ..files import atomic_path
from .cell import Job

RESULTS = "results.csv"


def told(found: Mapping[str, Any]) -> str:
    """A finished cell in a few words."""
    numbers = found["numbers"]
    words = []
    if "score" in numbers:
        words.append(f"{found['score_name']} {numbers['score']:.4g}")
    for name in ("heads", "units"):
        if f"{name}_kept" in numbers:
            words.append(f"{numbers[f'{name}_kept']:g} {name}")
    if "density" in numbers:
        words.append(f"{numbers['density']:.2%} of the weights")
    return ", ".join([*words, f"{found['seconds']:.0f} s"])


def rows(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A flat row for each finished cell, and for each further model that it left, all with the same columns; None for
    what there is not.

    A value of the plan that is called as a number, or another column, is in a column of its own: ``plan_density``.
    """
    every = [
        {**each, **model, "name": each["name"] + name}
        for each in found
        for name, model in (("", {}), *(("/" + more["folder"], more) for more in each.get("more", ())))
    ]
    taken = {"cell", "score_name", "seconds", "commands"}.union(*(each["numbers"] for each in every))
    flat = [
        {
            "cell": each["name"],
            **{f"plan_{name}" if name in taken else name: value for name, value in each["values"].items()},
            **each["numbers"],
            "score_name": each["score_name"],
            "seconds": each["seconds"],
            "commands": "\n".join(each["commands"]),
        }
        for each in every
    ]
    columns = dict.fromkeys(name for row in flat for name in row)
    return [{name: row.get(name) for name in columns} for row in flat]


def write_csv(found: Sequence[Mapping[str, Any]], path: "str | Path") -> None:
    """Write :func:`rows`; numbers with all of their digits. Raises HeadPruningError when the disk takes nothing."""
    flat = rows(found)
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(flat[0]) if flat else ["cell"])
        writer.writeheader()
        writer.writerows(flat)


def write_parquet(found: Sequence[Mapping[str, Any]], path: "str | Path") -> None:
    """Write :func:`rows` as Parquet. Raises HeadPruningError when pyarrow is missing, or a column mixes types."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise HeadPruningError(f"Parquet needs pyarrow ({error}); pip install pyarrow.") from error
    flat = rows(found)
    mixed = {name for row in flat for name, value in row.items() if isinstance(value, str)}
    flat = [{k: str(v) if k in mixed and v is not None else v for k, v in row.items()} for row in flat]
    with atomic_path(path) as temporary:
        parquet.write_table(pyarrow.Table.from_pylist(flat), temporary)


def state_table(jobs: Sequence[Job]) -> str:
    """One line per cell: finished, running, failed or waiting, and what it measured or said."""
    lines, counts = [], dict.fromkeys(("finished", "running", "failed", "waiting"), 0)
    for job in jobs:
        found, error = job.finished(), job.failed()
        if found is not None:
            state, words = "finished", told(found)
        elif job.running():
            state, words = "running", f"log: {job.log}"
        else:
            state, words = ("waiting", "") if error is None else ("failed", error.partition("\n")[0])
        counts[state] += 1
        lines.append((job.cell.name, state, words))
    total = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    width = max((len(name) for name, *_ in lines), default=0)
    return "\n".join([*(f"{n.ljust(width)}  {s.ljust(8)}  {w}".rstrip() for n, s, w in lines), total])
