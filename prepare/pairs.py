"""Choosing, cleaning and splitting sentence pairs so that what is tested was not seen in training."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from prepare.catalogues import Pair
from prepare.files import PrepareError

_TAG = re.compile(r"<[^<>]*>")
_PLACEHOLDER = re.compile(
    r"\{+[^{}]*\}+"  # {name}, {0:.2f}, {{ name }}
    r"|%\([^()]*\)[#0\- +]?[\d.*]*[a-zA-Z]"  # %(name)s
    r"|%\d*\$?[-+0#]?[\d.]*[a-zA-Z]\b"  # %s, %1$d
    r"|\$\w+|\$\{[^{}]*\}"
)
_NOISE = re.compile(r"https?:|www\.|[<>|\\`*#\[\]]|\n\s*\n|\{[^{}]*\{")
_QUOTES = str.maketrans({"„": '"', "“": '"', "”": '"', "«": '"', "»": '"', "‚": "'", "‘": "'", "’": "'", "…": "..."})


@dataclass(frozen=True)
class Limits:
    """What a pair must meet to be kept.

    ``shortest`` and ``longest`` bound the words of either side (defaults 4 and 24), ``ratio`` how many times as many
    characters as the other a side may have (default 2.5).
    """

    shortest: int = 4
    longest: int = 24
    ratio: float = 2.5


@dataclass(frozen=True)
class Splits:
    """Pairs for training, validation and test; no two, within or across them, share a template on either side."""

    train: list[Pair]
    valid: list[Pair]
    test: list[Pair]


def clean(text: str) -> str:
    """``text`` on one line, without markup tags, with plain quotation marks and single spaces."""
    return " ".join(_TAG.sub(" ", text).translate(_QUOTES).split())


def template(text: str) -> str:
    """``text`` with case, placeholders, numbers and punctuation taken away: the words that are left, space-joined."""
    return " ".join(re.findall(r"[^\W\d_]+", _PLACEHOLDER.sub(" ", text.casefold())))


def keep(pair: Pair, limits: Limits) -> bool:
    """Whether both sides of a cleaned ``pair`` are text of the right length, and different from each other."""
    german, english = pair
    if any(_NOISE.search(side) for side in pair):
        return False
    # Words are counted in the template: a string of placeholders has nothing to translate.
    counts = [len(template(side).split()) for side in pair]
    if min(counts) < limits.shortest or max(len(side.split()) for side in pair) > limits.longest:
        return False
    shorter, longer = sorted((len(german), len(english)))
    return longer <= limits.ratio * shorter and template(german) != template(english)


def distinct(pairs: Iterable[Pair]) -> list[Pair]:
    """The pairs of which neither side has the template of an earlier pair that was taken, in the order given."""
    seen: tuple[set[str], set[str]] = set(), set()
    taken = []
    for pair in pairs:
        templates = [template(side) for side in pair]
        if not any(key in known for key, known in zip(templates, seen)):
            taken.append(pair)
            for key, known in zip(templates, seen):
                known.add(key)
    return taken


def split(pairs: Iterable[Pair], valid: int, test: int) -> Splits:
    """Split the :func:`distinct` pairs into ``test`` pairs, ``valid`` pairs and the rest.

    Which pair goes where follows from a digest of its German template alone, so it is the same on every machine.
    PrepareError when nothing would be left for training.
    """
    order = sorted(distinct(pairs), key=lambda pair: hashlib.sha256(template(pair[0]).encode()).digest())
    if len(order) <= valid + test:
        raise PrepareError(
            f"{len(order)} distinct pairs are too few for {valid} to validate, {test} to test and a rest."
        )
    return Splits(train=order[valid + test :], valid=order[test : valid + test], test=order[:test])
