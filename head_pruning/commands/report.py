"""``head-pruning report``: one page about the runs in folders, see :mod:`head_pruning.report.page`."""

import argparse

from ..report.page import write_page
from ..report.runs import find_runs


def run(args: argparse.Namespace) -> None:
    """The command."""
    found = find_runs(args.folders, args.score)
    write_page(found, args.output, args.title, args.markdown)
    print("\n".join(f"{path}: {len(found)} runs" for path in (args.output, args.markdown) if path))
