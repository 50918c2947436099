"""Byte pair encoding with the subword-nmt library."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache, partial

from subword_nmt import learn_bpe as subword_learn
from subword_nmt.apply_bpe import BPE
from tqdm import tqdm

from head_pruning.progress import bar_options
from prepare.files import PrepareError
from prepare.parallel import map_lines


def learn(lines: Iterable[str], operations: int = 10000, quiet: bool = False) -> list[str]:
    """The lines of a ``code`` file: a version line, then one merge per line, best first.

    ``lines``: tokenised text of all languages together (joint BPE). At most ``operations``
    merges; fewer where no pair of symbols occurs twice. Deterministic, whatever the line order.
    PrepareError if the text has no word of two characters.
    """
    counts = Counter(word for line in lines for word in line.split(" ") if word)
    if not any(len(word) > 1 for word in counts):
        raise PrepareError("No BPE can be learnt: the training text has no word of two characters.")
    codes = io.StringIO()
    words = (f"{word} {count}" for word, count in counts.items())
    # The library draws its own bar; this is the only way to hide it.
    shown = subword_learn.tqdm
    subword_learn.tqdm = partial(tqdm, disable=quiet, desc="learn-bpe", unit="merge", **bar_options())
    try:
        subword_learn.learn_bpe(words, codes, operations, is_dict=True)
    except ValueError as error:
        # Where the text is too small for so many merges, the library's max() finds no pair left.
        if "empty" not in str(error):
            raise
    finally:
        subword_learn.tqdm = shown
    return codes.getvalue().removesuffix("\n").split("\n")


@lru_cache(maxsize=2)
def _model(codes: tuple[str, ...]) -> BPE:
    try:
        return BPE(io.StringIO("\n".join(codes)))
    except SystemExit:
        raise PrepareError("The BPE codes hold a line that is not two symbols with a space between them.") from None


def _segment(codes: tuple[str, ...], lines: list[str]) -> list[str]:
    model = _model(codes)
    return [model.process_line(line) for line in lines]


def apply(codes: list[str], lines: list[str], workers: int = 1, label: str = "", quiet: bool = False) -> list[str]:
    """``lines`` in subword units (n lines in, n out); ``@@`` ends each unit that is not a word's last.

    ``codes``: the lines of a ``code`` file, as ``learn`` returns them (PrepareError if they are no
    such lines). ``workers`` processes share the work; ``label`` and ``quiet`` as in
    ``prepare.parallel.map_lines``.
    """
    return map_lines(partial(_segment, tuple(codes)), lines, workers, label, quiet)
