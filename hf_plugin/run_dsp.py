"""Prune heads on a GLUE task with DSP (Li et al. 2021), or with --use_ste its straight-through variant.

    python -m hf_plugin.run_dsp --data_dir data/MNLI/ --model_name_or_path bert-base-uncased --task_name MNLI \\
        --do_train --do_eval --output_dir dsp_output/ ...

``--help`` lists all flags in groups.
"""

import sys

from hf_plugin.command_line import mistakes
from hf_plugin.command_line.arguments import parse
from hf_plugin.glue.run import run


def main() -> None:
    """Command line."""
    mistakes.main(lambda: run(parse(sys.argv[1:], "run_dsp")))


if __name__ == "__main__":
    main()
