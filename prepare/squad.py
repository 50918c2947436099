"""SQuAD as data/squad/train-v1.1.json and dev-v1.1.json (or v2.0), the files of its makers.

    python -m prepare.squad --data_dir data/squad                        # from its makers' page
    python -m prepare.squad --data_dir data/squad --versions 2.0 --hub   # from the Hugging Face hub
    python -m prepare.squad --data_dir data/squad --from FOLDER          # from copies at hand

FOLDER holds SQuAD's JSON files, or the hub's parquet or arrow files, of v2.0 in a folder or file with v2 in its name.
Files that are there already are kept, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from head_pruning import HeadPruningError
from hf_plugin.squad.reading import SPLITS, VERSIONS, SquadVersion, from_squad_hub, hub_table, read_squad
from prepare.command import run
from prepare.download import download
from prepare.files import PrepareError, atomic_text, copy_file
from prepare.glue_copies import Copy, NoCopy, read_table
from prepare.stages import only_run

if TYPE_CHECKING:
    from datasets import Dataset

PAGE = "https://rajpurkar.github.io/SQuAD-explorer/dataset/"
Log = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What a run is asked to do.

    ``versions``: in order. ``data_dir``: the folder of the files. ``source``: the folder of copies, None for none.
    ``hub``: load the hub's tables instead of its makers' files. ``repository``: the dataset there, None for the
    version's. ``page``: where the makers' files are. ``cache_dir``: for the hub's, None for the default. ``quiet``:
    no progress.
    """

    versions: tuple[SquadVersion, ...]
    data_dir: Path
    source: Path | None = None
    hub: bool = False
    repository: str | None = None
    page: str = PAGE
    cache_dir: str | None = None
    quiet: bool = False


def prepare(options: Options) -> list[Path]:
    """Write what is missing and return the files that are there now.

    PrepareError or HeadPruningError if a file cannot be had or is malformed.
    """
    log: Log = (lambda line: None) if options.quiet else partial(print, file=sys.stderr)
    if options.source is not None and not options.source.is_dir():
        raise PrepareError(f"There is no folder {options.source}; give --from the folder of your copies.")
    options.data_dir.mkdir(parents=True, exist_ok=True)
    made: list[Path] = []
    with only_run(options.data_dir / ".prepare-squad.lock"):
        for version in options.versions:
            there = []
            for i, split in enumerate(SPLITS):
                target = options.data_dir / version.files[i]
                try:
                    rows = None if target.is_file() else _write(options, version, split, target)
                except NoCopy as error:
                    print(f"prepare-squad: left out: {error}", file=sys.stderr)
                    continue
                there.append(target)
                if rows is None:
                    log(f"{target}: there already")
                else:
                    _report(target, rows, version.rows[i], log)
            if not there:
                raise PrepareError(
                    f"{options.source} has no copy of SQuAD v{version.number} ({' and '.join(version.files)}, or the "
                    f"hub's parquet or arrow files); give --from another folder."
                )
            made += there
    return made


def _write(options: Options, version: SquadVersion, split: str, target: Path) -> int:
    """Make one file; returns its number of questions."""
    if options.source is not None:
        copy = findcopy_file(options.source, version, split)
        if copy.kind == "json":
            rows = len(read_squad(copy.paths[0], version.unanswerable))  # to check it
            copy_file(copy.paths[0], target)
            return rows
        return _convert(read_table(copy), version, copy.shown, target)
    if options.hub:
        table = hub_table(version, split, options.repository, options.cache_dir)
        return _convert(table, version, f"The hub's {options.repository or version.repository} ({split})", target)
    download(options.page + target.name, target, sha256=version.sha256[SPLITS.index(split)], quiet=options.quiet)
    return len(read_squad(target, version.unanswerable))


def _convert(table: Dataset, version: SquadVersion, place: str, target: Path) -> int:
    rows = len(from_squad_hub(table, version, place))  # to check it
    with atomic_text(target) as handle:
        json.dump({"version": version.number, "data": list(_articles(table, version))}, handle)
    return rows


def _articles(rows: Iterable[dict[str, Any]], version: SquadVersion) -> Iterable[dict[str, Any]]:
    """The articles of the hub's rows, in which those of one article and one paragraph follow each other."""
    for title, article in itertools.groupby(rows, key=lambda row: row.get("title") or ""):
        paragraphs = [
            {"context": context, "qas": [_question(row, version) for row in paragraph]}
            for context, paragraph in itertools.groupby(article, key=lambda row: row["context"])
        ]
        yield {"title": title, "paragraphs": paragraphs}


def _question(row: dict[str, Any], version: SquadVersion) -> dict[str, Any]:
    pairs = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
    question = {name: row[name] for name in ("id", "question")}
    question["answers"] = [{"text": text, "answer_start": start} for text, start in pairs]
    if version.unanswerable:
        question["is_impossible"] = not question["answers"]
    return question


def findcopy_file(source: Path, version: SquadVersion, split: str) -> Copy:
    """The file, or the parts of a table, of one split below ``source``: JSON first, then the least deep.

    NoCopy if there is none, PrepareError if parts are missing.
    """
    official = version.files[SPLITS.index(split)]
    part = r"(?:-(?P<part>\d{5})-of-(?P<parts>\d{5}))?"
    table = re.compile(
        rf"(?:squad(?:_v2)?-)?{split}{part}\.(?P<kind>parquet|arrow)"
        rf"|{split}/data-(?P<saved>\d{{5}})-of-(?P<saved_parts>\d{{5}})\.(?P<saved_kind>arrow)"
    )
    found: dict[tuple[int, int, int, Path], list[tuple[int, int, Path]]] = {}
    for path in sorted(source.rglob("*")):
        if not path.is_file():
            continue
        inside = path.relative_to(source.parent)
        second = "v2" in str(inside)
        if path.name == official:
            found.setdefault((0, 0, len(inside.parts), path), []).append((0, 1, path))
        match = table.fullmatch(path.name) or table.fullmatch(f"{path.parent.name}/{path.name}")
        # A table without v2 in its name may be either; one with it is not v1.1.
        if match and (version.unanswerable or not second):
            kind = ("parquet", "arrow").index(match["kind"] or match["saved_kind"])
            number, parts = match["part"] or match["saved"] or 0, match["parts"] or match["saved_parts"] or 1
            key = (1 + kind, int(version.unanswerable and not second), len(inside.parts), path.parent)
            found.setdefault(key, []).append((int(number), int(parts), path))
    if not found:
        raise NoCopy(
            f"{source} has neither {official} nor a parquet or arrow file of {split} of SQuAD v{version.number}; add "
            f"it."
        )
    best = min(found)
    files = sorted(found[best])
    if len(files) != files[0][1]:
        raise PrepareError(f"{files[0][2]} is one of {files[0][1]} parts, but {len(files)} are there; add the others.")
    return Copy(("json", "parquet", "arrow")[best[0]], tuple(path for _, _, path in files))


def _report(path: Path, rows: int, expected: int, log: Log) -> None:
    log(f"{path}: {rows} questions")
    if rows != expected:
        # Not silenced by --quiet: a result on part of SQuAD is not SQuAD's.
        print(f"prepare-squad: warning: {path} has {rows} questions where SQuAD has {expected}.", file=sys.stderr)


def parse(arguments: Sequence[str] | None) -> Options:
    """The options of a command line; SystemExit (status 2) if they are wrong."""
    parser = argparse.ArgumentParser(prog="python -m prepare.squad", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--versions",
        "--version",
        nargs="+",
        choices=[*VERSIONS, "all"],
        default=["1.1"],
        help="which of the two, or all (default 1.1)",
    )
    parser.add_argument("--data_dir", "--data-dir", type=Path, default=Path("data/squad"), help="default %(default)s")
    parser.add_argument("--from", dest="source", type=Path, metavar="FOLDER", help="copies at hand")
    parser.add_argument("--hub", action="store_true", help="load the hub's tables, not the files of SQuAD's makers")
    parser.add_argument("--repository", help="dataset on the hub (default: rajpurkar/squad or rajpurkar/squad_v2)")
    parser.add_argument("--page", default=PAGE, help="where the makers' files are (default %(default)s)")
    parser.add_argument("--cache_dir", "--cache-dir", help="for the hub's tables (default: that of datasets)")
    parser.add_argument("--quiet", action="store_true", help="no progress, only warnings and errors")
    given = parser.parse_args(arguments)
    if given.source is not None and (given.hub or given.repository):
        parser.error("--from takes copies at hand, --hub and --repository load the hub's: give one of them")
    chosen = list(VERSIONS) if "all" in given.versions else list(dict.fromkeys(given.versions))
    return Options(
        versions=tuple(VERSIONS[number] for number in chosen),
        data_dir=given.data_dir,
        source=given.source,
        hub=given.hub or given.repository is not None,
        repository=given.repository,
        page=given.page.rstrip("/") + "/",
        cache_dir=given.cache_dir,
        quiet=given.quiet,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status: 0, 1 after an error (one sentence on stderr), 130 if interrupted."""
    options = parse(arguments)
    return run("prepare-squad", lambda: prepare(options), quiet=options.quiet, errors=(HeadPruningError,))


if __name__ == "__main__":
    sys.exit(main())
