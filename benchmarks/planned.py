"""A plan of ``benchmarks/plans/`` as one command: its sweep, then its tables; for the modules named after plans."""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Mapping, Optional

from benchmarks.tables import PLANS, STORED, take
from head_pruning import HeadPruningError
from head_pruning.cli import main as head_pruning
from head_pruning.sweep.results import RESULTS as COLLECTED


def parser(doc: Optional[str], **places: str) -> argparse.ArgumentParser:
    """The options of all; ``places``: a folder that must be given, and what it holds."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, words in places.items():
        made.add_argument(name, type=Path, help=words)
    made.add_argument("--work", type=Path, required=True, help="folder of the sweep")
    made.add_argument("--jobs", type=int, default=2, help="cells at a time (default: %(default)s)")
    made.add_argument("--threads", type=int, default=1, help="threads of each cell (default: %(default)s)")
    made.add_argument("--only", metavar="REGEX", help="leave out the cells whose names it does not match")
    made.add_argument("--dry-run", action="store_true", help="print the cells and their commands; run nothing")
    made.add_argument("--results", type=Path, default=STORED, help="where the tables go (default: %(default)s)")
    return made


def run(name: str, given: Mapping[str, object], options: argparse.Namespace) -> None:
    """Run the sweep, and write the tables, also when some cells failed.

    Args:
        name: of the tables: the plan's, or one of the others that its ``x-table`` has.
        given: what the plan's ``set`` asks for.
        options: of :func:`parser`.
    """
    words = ["sweep", str(PLANS / f"{name.partition('-')[0]}.yaml"), "--out", str(options.work)]
    words += ["--jobs", str(options.jobs), "--threads", str(options.threads)]
    words += [word for each, value in given.items() for word in ("--set", f"{each}={value}")]
    words += ["--only", options.only] if options.only else []
    if options.dry_run:
        head_pruning([*words, "--dry-run"])
        return
    try:
        head_pruning(words)
    finally:
        if (options.work / COLLECTED).exists():
            try:
                take(name, [options.work], options.results)
            except HeadPruningError as error:
                print(f"error: {error}", file=sys.stderr)


def main(name: str, doc: Optional[str], **places: str) -> None:
    """The command line of a plan that asks for folders only."""
    options = parser(doc, **places).parse_args()
    run(name, {place: getattr(options, place).resolve() for place in places}, options)


def call(*words: object) -> None:
    """Run python on what a plan's folders are made of; its failure ends the command."""
    done = subprocess.run([sys.executable, *map(str, words)])
    if done.returncode:
        sys.exit(done.returncode)
