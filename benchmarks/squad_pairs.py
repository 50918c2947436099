"""Segment pairs of SQuAD's paragraphs, each a document, for the pretraining of ``plans/prune_once.yaml``.

python -m benchmarks.squad_pairs MODEL SQUAD/train-v1.1.json PAIRS
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from head_pruning import HeadPruningError
from head_pruning.files import read_json

LENGTH = 128
SHAPE = {"data": [{"paragraphs": [{"context": str}]}]}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder with the encoder, for its tokenizer")
    parser.add_argument("train_file", type=Path, help="training file of SQuAD v1.1")
    parser.add_argument("pairs", help="folder for the pairs")
    options = parser.parse_args()
    try:
        articles = read_json(options.train_file, SHAPE, cure="give a training file of SQuAD")["data"]
    except HeadPruningError as error:
        sys.exit(f"error: {error}")
    texts = dict.fromkeys(" ".join(p["context"].split()) for article in articles for p in article["paragraphs"])
    with tempfile.TemporaryDirectory() as corpus:
        Path(corpus, "paragraphs.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
        words = ["--data_dir", options.pairs, "--corpus", corpus, "--tokenizer", options.model, "--workers", "1"]
        words += ["--max_seq_length", str(LENGTH), "--validation_split_percentage", "3"]  # as the plan trains on them
        done = subprocess.run([sys.executable, "-m", "prepare.wikipedia", *words])
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
