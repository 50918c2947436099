"""Fine-tune on SQuAD: dense, or with any registered pruning method (--pruner_name, or the options of one).

    python -m hf_plugin.run_squad --data_dir data/squad --model_type bert --model_name_or_path bert-base-uncased \\
        --do_train --do_eval --output_dir output/ ...

``--help`` lists all flags in groups.
"""

import sys

from hf_plugin.command_line import mistakes
from hf_plugin.command_line.arguments import parse


def main() -> None:
    """Command line."""
    mistakes.main(_run)


def _run() -> None:
    arguments = parse(sys.argv[1:], "run_squad")
    from hf_plugin.squad.run import run  # after --help and mistakes, which need none of it

    run(arguments)


if __name__ == "__main__":
    main()
