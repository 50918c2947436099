"""Prune heads on a GLUE task with DSP (Li et al. 2021), or with --use_ste its straight-through variant.

    python -m hf_plugin.run_dsp --data_dir data/MNLI/ --model_name_or_path bert-base-uncased --task_name MNLI \\
        --do_train --do_eval --output_dir dsp_output/ ...

``--help`` lists all flags in groups.
"""

import sys

from hf_plugin.command_line import mistakes
from hf_plugin.command_line.arguments import parse


def main() -> None:
    """Command line."""
    mistakes.main(_run)


def _run() -> None:
    arguments = parse(sys.argv[1:], "run_dsp")
    from hf_plugin.glue.run import run  # after --help and mistakes, which need none of it

    run(arguments)


if __name__ == "__main__":
    main()
