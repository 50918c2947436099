"""Prune heads on a GLUE task with the L0 gates of Voita et al. 2019.

    python -m hf_plugin.run_voita --data_dir data/MNLI/ --model_name_or_path bert-base-uncased --task_name MNLI \\
        --do_train --do_eval --output_dir voita_output/ ...

``--help`` lists all flags in groups.
"""

import sys

from hf_plugin.command_line import mistakes
from hf_plugin.command_line.arguments import parse
from hf_plugin.glue.run import run


def main() -> None:
    """Command line."""
    mistakes.main(lambda: run(parse(sys.argv[1:], "run_voita")))


if __name__ == "__main__":
    main()
