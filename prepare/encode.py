"""From sentence pairs to the binarised, subword-encoded data set that ``fairseq-train`` reads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from prepare import bpe
from prepare.files import PrepareError, write_lines
from prepare.moses import tokenize_lines
from prepare.pairs import Splits

LANGUAGES = ("de", "en")


def encode(splits: Splits, folder: Path, operations: int) -> Path:
    """Write every split, tokenised, lower-cased and cut into subwords, to ``folder``; return its ``data-bin``.

    ``operations`` is the number of byte-pair merges, learnt on both languages of the training split together and kept
    in ``folder/code``. PrepareError when fairseq cannot binarise the result.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = {
        (name, language): tokenize_lines([pair[side] for pair in pairs], language, lower=True)
        for name, pairs in (("train", splits.train), ("valid", splits.valid), ("test", splits.test))
        for side, language in enumerate(LANGUAGES)
    }
    codes = bpe.learn([line for language in LANGUAGES for line in text["train", language]], operations, quiet=True)
    write_lines(folder / "code", codes)
    for (name, language), lines in text.items():
        write_lines(folder / f"{name}.{language}", bpe.apply(codes, lines, quiet=True))
    _binarise(folder)
    return folder / "data-bin"


def _binarise(folder: Path) -> None:
    command = [sys.executable, "-m", "fairseq_cli.preprocess", "--joined-dictionary", "--destdir", "data-bin"]
    command += ["--source-lang", LANGUAGES[0], "--target-lang", LANGUAGES[1]]
    command += [word for name in ("train", "valid", "test") for word in (f"--{name}pref", name)]
    # One thread: fairseq would otherwise have torch's threads wait for each other over so small a text.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise PrepareError(f"fairseq-preprocess failed: {(done.stderr or done.stdout).strip()[-2000:]}")
