"""Finding the files of a GLUE task in a folder: TSV files, or copies of the hub's parquet or arrow files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_plugin.glue.tasks import GlueTask, Split, plain_name
from prepare.files import PrepareError

if TYPE_CHECKING:
    from datasets import Dataset

# Other names under which copies of the tasks go round, hyphens left out.
_ALIASES = {"sst-2": {"sst"}, "sts-b": {"sts", "stsbenchmark"}, "mnli": {"multinli"}}
# Where a folder has several kinds of files, the original one.
_KINDS = ("tsv", "parquet", "arrow")


@dataclass(frozen=True)
class Copy:
    """The files of one split: one TSV file, or the parts of a parquet or arrow table in order."""

    kind: str
    paths: tuple[Path, ...]

    @property
    def shown(self) -> str:
        """The first file's path."""
        return str(self.paths[0])


class NoCopy(PrepareError):
    """There is no whole copy of a task."""


def find_copies(task: GlueTask, wanted: Sequence[Split], source: Path, only: bool) -> dict[Split, Copy]:
    """The files of the ``wanted`` splits; test splits may be absent.

    They are looked for below the folder of ``source`` that has the task's name, or below ``source`` if it has that
    name itself, or, if no other task is wanted (``only``), in ``source`` under any name.
    NoCopy if there is no such folder or it lacks a labelled split.
    """
    folder = _task_folder(task, source)
    if folder is None and not only:
        raise NoCopy(f"{source} has no folder of {task.folder}; give --from the folder above it.")
    copies = {}
    for split in wanted:
        copy = _find(split, folder or source, deep=folder is not None)
        if copy is not None:
            copies[split] = copy
        elif split.labelled:
            raise NoCopy(
                f"{folder or source} has neither {split.file} nor a parquet or arrow file of {split.hub}, "
                f"so {task.folder} would not be whole; add it."
            )
    return copies


def _task_folder(task: GlueTask, folder: Path) -> Path | None:
    """The folder in ``folder`` that has the task's name, or ``folder`` itself if it has; None if neither."""
    names = {plain_name(task.name), *_ALIASES.get(task.name, ())}
    inside = [child for child in sorted(folder.iterdir()) if child.is_dir() and plain_name(child.name) in names]
    if inside:
        return inside[0]
    return folder if plain_name(folder.resolve().name) in names else None


def _find(split: Split, folder: Path, deep: bool) -> Copy | None:
    """The least deep files of ``split`` below ``folder`` (unless ``deep``: right in it), or None.

    PrepareError when parts of a table are missing.
    """
    stem = "|".join(sorted(_stems(split)))
    part = r"(?:-(?P<part>\d{5})-of-(?P<parts>\d{5}))?"
    pattern = re.compile(
        rf"(?:(?:glue-)?(?:{stem}){part}\.(?P<kind>tsv|parquet|arrow)"
        rf"|(?:{stem})/data-(?P<saved>\d{{5}})-of-(?P<saved_parts>\d{{5}})\.(?P<saved_kind>arrow))"
    )
    found: dict[tuple[int, int, Path], list[tuple[int, int, Path]]] = {}
    for path in sorted(folder.rglob("*")):
        for name in (path.name, f"{path.parent.name}/{path.name}"):
            match = pattern.fullmatch(name)
            if match and path.is_file() and (deep or path == folder / name):
                kind = match["kind"] or match["saved_kind"]
                number, parts = int(match["part"] or match["saved"] or 0), match["parts"] or match["saved_parts"] or 1
                depth = len(path.relative_to(folder).parts)
                found.setdefault((_KINDS.index(kind), depth, path.parent), []).append((number, int(parts), path))
    if not found:
        return None
    best = min(found)
    files = sorted(found[best])
    if len(files) != files[0][1]:
        raise PrepareError(f"{files[0][2]} is one of {files[0][1]} parts, but {len(files)} are there; add the others.")
    return Copy(_KINDS[best[0]], tuple(path for _, _, path in files))


def read_table(copy: Copy) -> Dataset:
    """The rows of a parquet or arrow copy, with the features that its files name; PrepareError if it is damaged."""
    from datasets import concatenate_datasets

    return concatenate_datasets([_read_part(copy.kind, path) for path in copy.paths])


def _read_part(kind: str, path: Path) -> Dataset:
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset

    try:
        if kind == "arrow":
            return Dataset.from_file(str(path))
        return Dataset(pyarrow.parquet.read_table(path, partitioning=None))
    except (pyarrow.ArrowException, ValueError) as error:
        raise PrepareError(f"{path} is damaged or is no {kind} file; get it again.") from error


def _stems(split: Split) -> set[str]:
    """The file names, without endings, that the split goes by."""
    own = split.file.removesuffix(".tsv")
    return {own, split.hub} | {own.replace("dev", name, 1) for name in ("valid", "val") if own.startswith("dev")}
