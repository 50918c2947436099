"""Fine-tune on SQuAD: dense, or with any registered pruning method (--pruner_name, or the options of one).

    python -m hf_plugin.run_squad --data_dir data/squad --model_type bert --model_name_or_path bert-base-uncased \\
        --do_train --do_eval --output_dir output/ ...

``--help`` lists all flags in groups.
"""

import sys

from hf_plugin.command_line import mistakes
from hf_plugin.command_line.arguments import parse
from hf_plugin.squad.run import run


def main() -> None:
    """Command line."""
    mistakes.main(lambda: run(parse(sys.argv[1:], "run_squad")))


if __name__ == "__main__":
    main()
