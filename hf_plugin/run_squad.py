"""Fine-tune on SQuAD: dense, or with any registered pruning method (--pruner_name, or the options of one).

    python -m hf_plugin.run_squad --data_dir data/squad --model_type bert --model_name_or_path bert-base-uncased \\
        --do_train --do_eval --output_dir output/ ...

``--help`` lists all flags in groups.
"""

import sys

from hf_plugin import running
from hf_plugin.arguments import parse
from hf_plugin.squad import run


def main() -> None:
    """Command line."""
    running.main(lambda: run(parse(sys.argv[1:], "run_squad")))


if __name__ == "__main__":
    main()
