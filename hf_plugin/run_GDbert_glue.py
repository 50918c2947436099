"""Prune heads and feed-forward units on a GLUE task: GPP, with DFD from a teacher (--do_distill --teacher_model_path).

    python -m hf_plugin.run_GDbert_glue --model_name_or_path bert-base-uncased --task_name cola --do_distill \\
        --teacher_model_path base/cola --target_sparsity 0.5 --prune_epochs 20 --num_train_epochs 32 \\
        --do_train --do_eval --output_dir gpp_output/ ...

Beside what run_glue leaves, ``compact/`` in the output folder has the model without what was removed, of which sizes
and speed are printed. ``--help`` lists all flags in groups.
"""

import sys

from hf_plugin.command_line import mistakes
from hf_plugin.command_line.arguments import parse


def main() -> None:
    """Command line."""
    mistakes.main(_run)


def _run() -> None:
    arguments = parse(sys.argv[1:], "run_GDbert_glue")
    from hf_plugin.glue.run import run  # after --help and mistakes, which need none of it
    from hf_plugin.scripts.compact import leave_compact

    run(arguments)
    if arguments.training.do_train and arguments.training.process_index == 0:
        leave_compact(arguments.training.output_dir)


if __name__ == "__main__":
    main()
