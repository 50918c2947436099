"""Prune heads on a GLUE task with the L0 gates of Voita et al. 2019.

    python -m hf_plugin.run_voita --data_dir data/MNLI/ --model_name_or_path bert-base-uncased --task_name MNLI \\
        --do_train --do_eval --output_dir voita_output/ ...

``--help`` lists all flags in groups.
"""

import sys

from hf_plugin.command_line import mistakes
from hf_plugin.command_line.arguments import parse


def main() -> None:
    """Command line."""
    mistakes.main(_run)


def _run() -> None:
    arguments = parse(sys.argv[1:], "run_voita")
    from hf_plugin.glue.run import run  # after --help and mistakes, which need none of it

    run(arguments)


if __name__ == "__main__":
    main()
