"""The ``head-pruning`` command; what it knows of models comes from the hosts (:mod:`head_pruning.hosts`)."""

import argparse
import importlib.util
import logging
import os
import sys
from typing import Optional, Sequence

from .commands.flags import add_commands
from .errors import HeadPruningError
from .lazy import load_later


def _user_dir(args: argparse.Namespace) -> None:
    found = importlib.util.find_spec("fairseq_plugin")
    if found is None or not found.submodule_search_locations:
        raise HeadPruningError("The package fairseq_plugin is not installed; install head-pruning as its README says.")
    print(next(iter(found.submodule_search_locations)))


def _pruners(args: argparse.Namespace) -> None:
    load_later("torch", "numpy")  # methods are imported to be listed, but none is run
    from .options import dashed
    from .registry import KINDS, methods

    for method in methods(None).values():
        print(f"{method.name} ({method.kind}): {method.summary}")
        options = " ".join(
            dashed(name) if value is True else f"{dashed(name)} {value}" for name, value in method.example.items()
        )
        print(f"    such as {dashed(KINDS[method.kind].flag)} {method.name} {options}".rstrip())
        for name, field in method.options.items():
            print(f"    {dashed(name)} (default {field.default}): {field.metadata['help']}")


def build_parser() -> argparse.ArgumentParser:
    """The parser with every command."""
    parser = argparse.ArgumentParser(prog="head-pruning", description="Tools around pruned attention heads.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("user-dir", help="print the folder for fairseq's --user-dir")
    command.set_defaults(run=_user_dir)
    command = commands.add_parser("pruners", help="list the registered pruners and their options")
    command.set_defaults(run=_pruners)
    add_commands(commands)
    return parser


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Command line; ``arguments`` default to those of the process."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        # First, so that no host's own set-up of the logs takes effect.
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        try:
            args = build_parser().parse_args(arguments)
            args.run(args)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here a pipe that is closed can be seen to, at the end of the process no more
    except BrokenPipeError:  # whoever reads has enough, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (HeadPruningError, OSError) as error:  # such as a full disk, or a folder that may not be written
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
