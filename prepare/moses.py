"""Moses' tokeniser, lower-casing and corpus cleaning, on top of sacremoses.

The aim is the output of Moses' Perl scripts in the version the published IWSLT'14 files were made
with. sacremoses differs from that version in one rule that shows in real text (see
``Tokenizer.handles_nonbreaking_prefixes``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache

from sacremoses import MosesTokenizer

# Control characters that are no white space to Perl. Taken out first: sacremoses would make spaces
# of some (Python's \s) and leave doubled spaces where others stood, which hides abbreviations.
_JUNK = dict.fromkeys([*range(0x09), *range(0x0E, 0x20)])
_NUMERIC_ONLY = "#NUMERIC_ONLY#"


class Tokenizer(MosesTokenizer):
    """sacremoses' tokeniser with Moses' present rule for the full stop that ends a line."""

    def __init__(self, lang: str) -> None:
        """``lang``: the language code, which picks the apostrophe rules and the abbreviations."""
        super().__init__(lang=lang)
        numeric = {word.partition(" ")[0] for word in self.NONBREAKING_PREFIXES if _NUMERIC_ONLY in word}
        self._abbreviations = frozenset(self.NONBREAKING_PREFIXES) - numeric
        self._numeric_abbreviations = frozenset(numeric)
        self._letters = frozenset(self.IsAlpha)
        self._lower = frozenset(self.IsLower)

    def handles_nonbreaking_prefixes(self, text: str) -> str:
        """Split the full stop off each word of ``text`` unless it marks an abbreviation.

        The last word always loses its full stop ("the u.s." -> "the u.s ."). Moses does so
        since late 2018, and so do all lines of the published files; sacremoses has kept the
        older behaviour on purpose.
        """
        # Single-space split: an empty "next word" is not lower-case, as in the Perl script.
        words = re.split(r"\s", text.rstrip())
        for i, word in enumerate(words):
            stem = word[:-1]
            if not stem or word[-1] != ".":
                continue
            if i + 1 < len(words) and self._keeps_full_stop(stem, words[i + 1]):
                continue
            words[i] = stem + " ."
        return " ".join(words)

    def _keeps_full_stop(self, stem: str, following: str) -> bool:
        if "." in stem and not self._letters.isdisjoint(stem):
            return True
        if stem in self._abbreviations or following[:1] in self._lower:
            return True
        return stem in self._numeric_abbreviations and following[:1] in set("0123456789")


@cache
def _tokenizer(lang: str) -> Tokenizer:
    return Tokenizer(lang)


def tokenize(line: str, lang: str) -> str:
    """One line of raw text as tokens joined by single spaces, special characters escaped.

    ``lang``: "de", "en", ... Hyphens are not split, ``& | < > ' " [ ]`` become entities
    (``&apos;`` and so on), the case is kept. A line of white space only is returned as it is.
    """
    text = line.translate(_JUNK)
    if not text.strip():
        return line if text == line else ""
    return _tokenizer(lang).tokenize(text, aggressive_dash_splits=False, return_str=True, escape=True)


def tokenize_lines(lines: list[str], lang: str, lower: bool = False) -> list[str]:
    """``tokenize`` on each of ``lines`` (n lines in, n out), then lower-cased if ``lower``."""
    tokens = [tokenize(line, lang) for line in lines]
    return [lowercase(line) for line in tokens] if lower else tokens


def lowercase(line: str) -> str:
    """``line`` in lower case by Perl's rule: character by character, so no final sigma."""
    return line.replace("Σ", "σ").lower()


def keep_pair(source: str, target: str, ratio: float = 1.5, shortest: int = 1, longest: int = 175) -> bool:
    """Whether clean-corpus-n keeps this pair of tokenised lines.

    Kept if both sides have ``shortest`` to ``longest`` tokens, neither has more than ``ratio``
    times the tokens of the other, and no token is longer than 1000 characters.
    """
    sides = source.split(), target.split()
    counts = [len(side) for side in sides]
    low, high = min(counts), max(counts)
    if low < max(shortest, 1) or high > longest or high / low > ratio:
        return False
    return all(len(word) <= 1000 for side in sides for word in side)


def clean_pairs(
    pairs: Iterable[tuple[str, str]], ratio: float = 1.5, shortest: int = 1, longest: int = 175
) -> Iterator[tuple[str, str]]:
    """The pairs that ``keep_pair`` keeps, in order, with white space made single spaces.

    Meant for tokenised text: ``|`` is taken as an ordinary character because the tokeniser has
    escaped it, where Moses would look for word factors.
    """
    for source, target in pairs:
        if keep_pair(source, target, ratio, shortest, longest):
            yield " ".join(source.split()), " ".join(target.split())
