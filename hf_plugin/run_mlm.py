"""``run_pretraining`` by the name of the published script of Prune Once for All, whose flags it reads."""

import sys

from hf_plugin.command_line import mistakes
from hf_plugin.command_line.arguments import parse


def main() -> None:
    """Command line."""
    mistakes.main(_run)


def _run() -> None:
    arguments = parse(sys.argv[1:], "run_mlm")
    from hf_plugin.pretraining.run import run  # after --help and mistakes, which need none of it

    run(arguments)


if __name__ == "__main__":
    main()
