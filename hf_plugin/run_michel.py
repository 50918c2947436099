"""Prune the heads of a fine-tuned model by their importance (Michel et al. 2019), without training.

    python -m hf_plugin.run_michel --data_dir data/MNLI/ --model_name_or_path output/ --task_name MNLI \\
        --output_dir michel_output/ --exact_pruning --num_of_heads 12

Each round removes ``--num_of_heads`` heads and scores the model on the validation set. The rounds go into
``michel_rounds.json`` in ``--output_dir``, the mask of each into ``michel_masks/``; a run that was stopped goes on
after its last finished round. At the end the model with the fewest heads (but not none) is saved there as every run
saves its model; ``head-pruning export START OTHER --to masked --mask michel_masks/headsN.safetensors`` writes another.
"""

import sys

from hf_plugin.command_line import mistakes
from hf_plugin.command_line.michel import parse_michel


def main() -> None:
    """Command line."""
    mistakes.main(_run)


def _run() -> None:
    arguments = parse_michel(sys.argv[1:])
    from hf_plugin.glue.michel import run  # after --help and mistakes, which need none of it

    run(arguments)


if __name__ == "__main__":
    main()
