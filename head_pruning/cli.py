"""The ``head-pruning`` command. Plugins add their own commands through the entry points ``head_pruning.commands``."""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import sys
from typing import Optional

from .errors import HeadPruningError
from .registry import methods
from .report.tables import text_table
from .unit_map import HeadMask


def _user_dir(args: argparse.Namespace) -> None:
    found = importlib.util.find_spec("fairseq_plugin")
    if found is None or not found.submodule_search_locations:
        raise HeadPruningError("The package fairseq_plugin is not installed; install head-pruning as its README says.")
    print(next(iter(found.submodule_search_locations)))


def _pruners(args: argparse.Namespace) -> None:
    for method in methods().values():
        print(f"{method.name}: {(method.pruner.__doc__ or '').strip().splitlines()[0]}")
        for field in dataclasses.fields(method.config):
            print(f"    --{field.name.replace('_', '-')} (default {field.default}): {field.metadata['help']}")


def _show(args: argparse.Namespace) -> None:
    masks = {path: HeadMask.load(path) for path in args.masks}
    for path, mask in masks.items():
        print(f"{path}\n{mask}\n")
    first = next(iter(masks.values()))
    rows = [(path, *first.compare(mask).values()) for path, mask in list(masks.items())[1:]]
    if rows:
        print(text_table(("compared with the first", "both", "only first", "only this", "jaccard"), rows))
    if args.plot:
        from .report.plots import plot_head_masks

        plot_head_masks(masks, args.plot)


def build_parser(asked: Optional[str] = None) -> argparse.ArgumentParser:
    """The parser with every command; of the plugins' commands only ``asked`` is loaded."""
    parser = argparse.ArgumentParser(prog="head-pruning", description="Tools around pruned attention heads.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("user-dir", help="print the folder for fairseq's --user-dir")
    command.set_defaults(run=_user_dir)
    command = commands.add_parser("pruners", help="list the registered pruners and their options")
    command.set_defaults(run=_pruners)
    command = commands.add_parser("show", help="print head masks, compare them, draw them")
    command.add_argument("masks", nargs="+", help="masks.safetensors files")
    command.add_argument("--plot", help="PNG to draw them in, side by side")
    command.set_defaults(run=_show)
    for entry in importlib.metadata.entry_points(group="head_pruning.commands"):
        if entry.name == asked:  # importing a host takes seconds
            try:
                entry.load()(commands)
            except ImportError as error:
                raise HeadPruningError(f"{entry.name} needs its framework ({error}); install it first.") from error
        else:
            commands.add_parser(entry.name, help=f"from {entry.module.partition('.')[0]}")
    return parser


def main() -> None:
    """Command line."""
    try:
        args = build_parser(sys.argv[1] if len(sys.argv) > 1 else None).parse_args()
        args.run(args)
    except HeadPruningError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
