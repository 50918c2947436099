"""Learn masked words and next sentences on segment pairs: dense, or with any registered pruning method.

    python -m prepare.wikipedia --data_dir data/wikipedia
    python -m hf_plugin.run_pretraining --data_dir data/wikipedia --model_name_or_path bert-base-uncased \\
        --do_train --do_eval --output_dir output/ ...

With ``--distill logits --teacher_path TEACHER`` a student learns from a teacher too; ``--help`` lists all flags in
groups.
"""

import sys

from hf_plugin.command_line import mistakes
from hf_plugin.command_line.arguments import parse


def main() -> None:
    """Command line."""
    mistakes.main(_run)


def _run() -> None:
    arguments = parse(sys.argv[1:], "run_pretraining")
    from hf_plugin.pretraining.run import run  # after --help and mistakes, which need none of it

    run(arguments)


if __name__ == "__main__":
    main()
