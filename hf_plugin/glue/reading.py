"""GLUE's TSV files, read strictly."""

import itertools
import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from datasets import ClassLabel, Dataset, Features, Value

from head_pruning import HeadPruningError

from .tasks import TASKS, GlueTask, Split

logger = logging.getLogger(__name__)

SCORES = (0.0, 5.0)
"""The least and the greatest similarity of STS-B."""


def read_split(task: GlueTask, split: Split, data_dir: "str | Path") -> Dataset:
    """Read one split of ``task`` from the folder ``data_dir``; see :func:`read_tsv`."""
    return read_tsv(split_path(task, split, data_dir), task, split.labelled)


def split_path(task: GlueTask, split: Split, data_dir: "str | Path") -> Path:
    """The file of a split in the folder ``data_dir``; HeadPruningError if it is not there."""
    path = Path(data_dir) / split.file
    if path.is_file():
        return path
    if split.labelled:
        raise HeadPruningError(
            f"There is no file {path}; give the folder of {task.folder} in GLUE's layout, "
            f"which python -m prepare.glue --tasks {task.folder} writes."
        )
    raise HeadPruningError(
        f"There is no file {path} to predict; get it with python -m prepare.glue --tasks {task.folder}, "
        f"or drop --do_predict."
    )


def check_tsv(path: "str | Path", task: GlueTask, labelled: bool = True) -> None:
    """Look at the first two lines of a file that :func:`read_tsv` is to read; errors are its own."""
    lines = _lines(Path(path))
    first = next(lines, None)
    if first is None:
        raise _no_rows(Path(path))
    layout = _layout(Path(path), task, labelled, first[1].split("\t"))
    if layout.header and next(lines, None) is None:
        raise _no_rows(Path(path))


def read_tsv(path: "str | Path", task: GlueTask, labelled: bool = True) -> Dataset:
    """Read a file in GLUE's layout: UTF-8, columns parted by tabs and named in the first line, no quoting.

    CoLA's files may lack the header line. Blank lines do not count. QQP's labelled lines of a wrong number of columns
    (its official files have some) are left out with a warning; a test file must be whole.

    Returns:
        A dataset with the columns ``sentence1``, ``sentence2`` (pairs only), ``label`` (``labelled`` only: the class
        number in ``task.labels``, or a score of 0 to 5) and ``idx`` (without labels: what the file's column ``index``
        or ``id`` says, by which GLUE knows the row; else, or without that column: the row's number from 0).

    Raises:
        HeadPruningError: the file has no rows, is not UTF-8, lacks a column, is another task's, or has a line with a
            wrong number of columns, an unknown label, or an index that is no number or was there before.
    """
    path = Path(path)
    lines = _lines(path)
    rows: list[list[Any]] = []
    broken: list[int] = []
    ids: dict[int, None] = {}
    first = next(lines, None)
    if first is None:
        raise _no_rows(path)
    layout = _layout(path, task, labelled, first[1].split("\t"))
    for number, line in lines if layout.header else itertools.chain([first], lines):
        fields = line.split("\t")
        if len(fields) != layout.width:
            if task.broken_lines and labelled:
                broken.append(number)
                continue
            raise HeadPruningError(
                f"{path}, line {number}, has {len(fields)} columns where {layout.width} belong; "
                f"correct the line or write the file again with python -m prepare.glue."
            )
        row: list[Any] = [fields[position] for position in layout.texts]
        if layout.label is not None:
            row.append(parse_label(task, fields[layout.label], f"{path}, line {number},"))
        if layout.index is not None:
            _add_index(ids, fields[layout.index], f"{path}, line {number},")
        rows.append(row)
    if broken:
        logger.warning("%s: %d lines of a wrong number of columns left out (first: %d).", path, len(broken), broken[0])
    if not rows:
        raise _no_rows(path)
    columns = list(zip(*rows))
    return make_dataset(task, columns[: len(layout.texts)], columns[-1] if labelled else None, list(ids) or None)


def _add_index(ids: dict[int, None], text: str, place: str) -> None:
    """Add the index that ``text`` spells to those before it; HeadPruningError, naming ``place``, if it cannot be."""
    if not re.fullmatch("[0-9]{1,9}", text.strip()):
        raise HeadPruningError(f"{place} has the index {text!r}, which should be a number; correct it.")
    number = int(text)
    if number in ids:
        raise HeadPruningError(f"{place} has the index {number}, as a line before it has; correct one of them.")
    ids[number] = None


def parse_label(task: GlueTask, text: str, place: str) -> "int | float":
    """The class number, or the score, that ``text`` spells; HeadPruningError, naming ``place``, if none."""
    if task.written is not None:
        if text in task.written:
            return task.written.index(text)
        expected = f"one of {', '.join(task.written)}"
    else:
        try:
            score = float(text)
        except ValueError:
            score = math.nan
        if SCORES[0] <= score <= SCORES[1]:
            return score
        expected = f"a number from {SCORES[0]:g} to {SCORES[1]:g}"
    raise HeadPruningError(f"{place} has the label {text!r}, which should be {expected}; correct it.")


def make_dataset(
    task: GlueTask,
    texts: Sequence[Sequence[str]],
    labels: "Sequence[int | float] | None",
    ids: Optional[Sequence[int]] = None,
) -> Dataset:
    """The dataset that :func:`read_tsv` describes, from its columns; ``ids`` become ``idx``, None: 0, 1, 2, ..."""
    columns: dict[str, Any] = {f"sentence{i}": list(text) for i, text in enumerate(texts, start=1)}
    features: dict[str, Any] = {name: Value("string") for name in columns}
    if labels is not None:
        columns["label"] = list(labels)
        features["label"] = Value("float32") if task.labels is None else ClassLabel(names=list(task.labels))
    columns["idx"] = list(range(len(columns["sentence1"])) if ids is None else ids)
    features["idx"] = Value("int32")
    return Dataset.from_dict(columns, features=Features(features))


@dataclass(frozen=True)
class _Layout:
    """Columns in all; positions of the texts, the label and the index; whether the first line holds the names."""

    width: int
    texts: tuple[int, ...]
    label: "int | None"
    index: "int | None"
    header: bool


def _layout(path: Path, task: GlueTask, labelled: bool, first: list[str]) -> _Layout:
    names = [name.strip() for name in first]
    wanted = [*task.columns, *([task.label_column] if labelled else [])]
    missing = [name for name in wanted if name not in names]
    _refuse_other_task(path, task, names)
    if not missing:
        positions = [names.index(name) for name in wanted]
        texts = tuple(positions[: len(task.columns)])
        if labelled:
            return _Layout(len(first), texts, positions[-1], None, True)
        index = next((names.index(name) for name in ("index", "id") if name in names), None)
        return _Layout(len(first), texts, None, index, True)
    if task.headerless and task.columns[0] in missing:
        # CoLA: source, label, the author's mark, sentence; its test file may hold an index and the sentence.
        if len(first) == 4 or not labelled:
            index = 0 if len(first) == 2 else None
            return _Layout(len(first), (len(first) - 1,), 1 if labelled else None, index, False)
        raise HeadPruningError(
            f"{path}, line 1, has {len(first)} columns where 4 belong (source, label, mark, sentence); "
            f"write the file again with python -m prepare.glue."
        )
    raise HeadPruningError(
        f"{path} has no column {missing[0]!r} in its first line; {task.folder} needs {', '.join(wanted)}: "
        f"write the file again with python -m prepare.glue."
    )


def _refuse_other_task(path: Path, task: GlueTask, names: list[str]) -> None:
    """Raise HeadPruningError where the header ``names`` has more text columns of another task than of this one."""
    found = len(set(task.columns) & set(names))
    for other in TASKS.values():
        if len(other.columns) > found and set(other.columns) <= set(names):
            raise HeadPruningError(
                f"{path} is another task's: it has the columns {', '.join(other.columns)} where {task.folder} has "
                f"{', '.join(task.columns)}; give --data_dir with the folder of {task.folder}."
            )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1. Only ``\\n`` and ``\\r\\n`` end a line."""
    with open(path, "rb") as handle:
        for number, raw in enumerate(handle, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise HeadPruningError(
                    f"{path}, line {number}, is not UTF-8 ({error.reason}); save the file as UTF-8."
                ) from None
            if line:
                yield number, line


def _no_rows(path: Path) -> HeadPruningError:
    return HeadPruningError(f"{path} has no rows; write it again with python -m prepare.glue.")
