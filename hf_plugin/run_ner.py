"""Fine-tune on token classification (entities, parts of speech): dense, or with any registered pruning method.

    python -m hf_plugin.run_ner --train_file train.json --validation_file dev.json \\
        --model_name_or_path bert-base-uncased --do_train --do_eval --output_dir output/ ...

``--help`` lists all flags in groups.
"""

import sys

from hf_plugin.command_line import mistakes
from hf_plugin.command_line.arguments import parse


def main() -> None:
    """Command line."""
    mistakes.main(_run)


def _run() -> None:
    arguments = parse(sys.argv[1:], "run_ner")
    from hf_plugin.ner.run import run  # after --help and mistakes, which need none of it

    run(arguments)


if __name__ == "__main__":
    main()
