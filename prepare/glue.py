"""GLUE's tasks as data/TASK/*.tsv, the layout of GLUE's own archives.

    python -m prepare.glue --tasks MNLI CoLA --data_dir data      # from the Hugging Face hub
    python -m prepare.glue --tasks all --from FOLDER              # from copies at hand

FOLDER holds a folder per task with GLUE's TSV files, or with the hub's parquet or arrow files. Files that are there
already are kept, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from head_pruning import HeadPruningError
from hf_plugin.glue.tasks import HUB_REPOSITORY, TASKS, GlueTask, Split, find_task
from prepare.command import run
from prepare.files import PrepareError, copy_file, write_lines
from prepare.glue_copies import NoCopy, find_copies, read_table
from prepare.glue_layout import tsv_lines
from prepare.stages import only_run

Log = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What a run is asked to do.

    ``tasks``: in order. ``data_dir``: the folder that the tasks' folders are made in. ``source``: the folder of
    copies, None for the hub. ``repository``: the dataset on the hub. ``cache_dir``: for downloads, None for the
    default. ``every``: all tasks were asked for, so copies may lack some. ``quiet``: no progress.
    """

    tasks: tuple[GlueTask, ...]
    data_dir: Path
    source: Path | None = None
    repository: str = HUB_REPOSITORY
    cache_dir: str | None = None
    every: bool = False
    quiet: bool = False


def prepare(options: Options) -> list[Path]:
    """Write what is missing of the tasks and return the folders of those that are there now.

    PrepareError or HeadPruningError if a task cannot be had or is malformed.
    """
    log: Log = (lambda line: None) if options.quiet else partial(print, file=sys.stderr)
    if options.source is not None and not options.source.is_dir():
        raise PrepareError(f"There is no folder {options.source}; give --from the folder of your copies.")
    folders = []
    with only_run(options.data_dir / ".prepare-glue.lock"):
        for task in options.tasks:
            target = options.data_dir / task.folder
            missing = [split for split in task.splits if not (target / split.file).is_file()]
            if not missing:
                log(f"{target}: there already")
            elif options.source is None:
                _from_hub(options, task, missing, target, log)
            else:
                try:
                    _from_copies(options, task, missing, target, log)
                except NoCopy as error:
                    if not options.every:
                        raise
                    print(f"prepare-glue: left out: {error}", file=sys.stderr)
                    continue
            folders.append(target)
    if not folders:
        raise PrepareError(f"{options.source} has no whole copy of any task; give --from the folder above theirs.")
    return folders


def _from_hub(options: Options, task: GlueTask, missing: list[Split], target: Path, log: Log) -> None:
    from hf_plugin.glue.hub import hub_split, load_hub

    log(f"{task.folder}: loading {options.repository}")
    tables = load_hub(task, options.repository, options.cache_dir)
    for split in missing:
        rows = hub_split(task, split, tables, options.repository)
        target.mkdir(parents=True, exist_ok=True)
        write_lines(target / split.file, tsv_lines(task, split, rows))
        _report(target / split.file, split, len(rows), log)


def _from_copies(options: Options, task: GlueTask, missing: list[Split], target: Path, log: Log) -> None:
    from hf_plugin.glue.hub import from_hub
    from hf_plugin.glue.reading import read_tsv

    copies = find_copies(task, missing, options.source, only=len(options.tasks) == 1)
    for split in missing:
        path = target / split.file
        if split not in copies:
            log(f"{path}: no copy, left out")
            continue
        copy = copies[split]
        target.mkdir(parents=True, exist_ok=True)
        if copy.kind == "tsv":
            # Read only to check it: the copy keeps the columns that nobody here needs.
            rows = read_tsv(copy.paths[0], task, split.labelled)
            copy_file(copy.paths[0], path)
        else:
            rows = from_hub(task, split, read_table(copy), copy.shown)
            write_lines(path, tsv_lines(task, split, rows))
        _report(path, split, len(rows), log)


def _report(path: Path, split: Split, rows: int, log: Log) -> None:
    log(f"{path}: {rows} rows")
    if rows != split.rows:
        # Not silenced by --quiet: a result on part of a task is not the task's.
        print(f"prepare-glue: warning: {path} has {rows} rows where GLUE has {split.rows}.", file=sys.stderr)


def parse(arguments: Sequence[str] | None) -> Options:
    """The options of a command line; SystemExit (status 2) if they are wrong."""
    names = ", ".join(task.folder for task in TASKS.values())
    parser = argparse.ArgumentParser(prog="python -m prepare.glue", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--tasks",
        "--task",
        nargs="+",
        default=["all"],
        metavar="TASK",
        help=f"{names}, or all (default); in any usual spelling, parted by spaces or commas",
    )
    parser.add_argument("--data_dir", "--data-dir", type=Path, default=Path("data"), help="default %(default)s")
    parser.add_argument("--from", dest="source", type=Path, metavar="FOLDER", help="copies at hand (default: the hub)")
    parser.add_argument("--repository", default=HUB_REPOSITORY, help="dataset on the hub (default %(default)s)")
    parser.add_argument("--cache_dir", "--cache-dir", help="for downloads (default: that of datasets)")
    parser.add_argument("--quiet", action="store_true", help="no progress, only warnings and errors")
    given = parser.parse_args(arguments)
    wanted = [name for group in given.tasks for name in group.split(",") if name.strip()]
    every = "all" in (name.strip().lower() for name in wanted)
    try:
        tasks = tuple(TASKS.values()) if every else tuple(dict.fromkeys(map(find_task, wanted)))
    except HeadPruningError as error:
        parser.error(str(error))
    if not tasks:
        parser.error(f"--tasks takes one or more of {names}")
    return Options(tasks, given.data_dir, given.source, given.repository, given.cache_dir, every, given.quiet)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status: 0, 1 after an error (one sentence on stderr), 130 if interrupted."""
    options = parse(arguments)
    return run("prepare-glue", lambda: prepare(options), quiet=options.quiet, errors=(HeadPruningError,))


if __name__ == "__main__":
    sys.exit(main())
