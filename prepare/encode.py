"""From sentence pairs to the binarised, subword-encoded data set that ``fairseq-train`` reads."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sacremoses import MosesTokenizer
from subword_nmt.apply_bpe import BPE
from subword_nmt.learn_bpe import learn_bpe

from prepare.catalogues import Pair
from prepare.pairs import Splits

LANGUAGES = ("de", "en")


class BinariseError(RuntimeError):
    """``fairseq-preprocess`` failed; the message holds the end of what it wrote."""


def tokenise(sentences: Sequence[str], language: str) -> list[str]:
    """Moses-tokenised, lower-cased ``sentences``, tokens joined by spaces and nothing escaped."""
    tokeniser = MosesTokenizer(lang=language)
    return [tokeniser.tokenize(sentence, return_str=True, escape=False).lower() for sentence in sentences]


def encode(splits: Splits, folder: Path, operations: int) -> Path:
    """Write every split, tokenised and cut into joint subwords, to ``folder``; return ``folder``'s ``data-bin``.

    ``operations`` is the number of byte-pair merges, learnt on both languages of the training split together. Also
    written: ``codes``, the merges. Raises :class:`BinariseError` when fairseq cannot binarise the result.
    """
    folder.mkdir(parents=True, exist_ok=True)
    named: dict[str, list[Pair]] = {"train": splits.train, "valid": splits.valid, "test": splits.test}
    text = {
        (name, language): tokenise([pair[side] for pair in pairs], language)
        for name, pairs in named.items()
        for side, language in enumerate(LANGUAGES)
    }
    codes = io.StringIO()
    learn_bpe([line for language in LANGUAGES for line in text["train", language]], codes, operations)
    (folder / "codes").write_text(codes.getvalue(), encoding="utf-8")
    codes.seek(0)
    bpe = BPE(codes)
    for (name, language), lines in text.items():
        encoded = "".join(f"{bpe.process_line(line)}\n" for line in lines)
        (folder / f"{name}.{language}").write_text(encoded, encoding="utf-8")
    _binarise(folder)
    return folder / "data-bin"


def _binarise(folder: Path) -> None:
    command = [sys.executable, "-m", "fairseq_cli.preprocess", "--joined-dictionary", "--destdir", "data-bin"]
    command += ["--source-lang", LANGUAGES[0], "--target-lang", LANGUAGES[1]]
    command += [word for name in ("train", "valid", "test") for word in (f"--{name}pref", name)]
    # One thread: the texts are small, and fairseq would otherwise keep torch's threads waiting for each other.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise BinariseError(f"fairseq-preprocess failed: {(done.stderr or done.stdout).strip()[-2000:]}")
