"""Does ``prepare.iwslt14`` give the published IWSLT'14 files? Line-by-line shares on local data.

    python -m benchmarks.iwslt14_parity [--data FOLDER] [--json] [--skip-learning]

FOLDER (default: ../shared/data beside the repository) holds iwslt14-de-en, mt-mix-de-en and
multi30k; none of their text is shown beyond a few differing lines on request (``--show N``).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from sacremoses import MosesTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from prepare import bpe, moses, ted
from prepare.files import PrepareError, read_lines

LANGS = ("de", "en")
DEFAULT_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
# The first of the two samples in train_sample ends here; it was not encoded with ``code``.
OTHER_CODES = 4582
_ENDING = re.compile(r" &apos;(?=[^\W\d_])")
_ENTITIES = (("&apos;", "'"), ("&quot;", '"'), ("&lt;", "<"), ("&gt;", ">"), ("&#91;", "["), ("&#93;", "]"))


@dataclass
class Row:
    """One check: how many of ``lines`` came out as published, and ``note`` on the rest."""

    check: str
    lines: int
    same: int
    note: str = ""

    @property
    def share(self) -> float:
        """``same`` / ``lines``, 1.0 where there are no lines."""
        return self.same / self.lines if self.lines else 1.0


def unescape(line: str) -> str:
    """The tokeniser's entities as the characters they stand for (``&amp;`` last)."""
    for entity, character in (*_ENTITIES, ("&#124;", "|"), ("&amp;", "&")):
        line = line.replace(entity, character)
    return line


def undo_bpe(line: str) -> str:
    """Subword units joined to words again."""
    return line.replace("@@ ", "")


def compare(check: str, ours: Iterable[str], theirs: Iterable[str], note: str = "", show: int = 0) -> Row:
    """A row that counts equal lines; ``show`` differing pairs go to stderr."""
    pairs = list(zip(ours, theirs, strict=True))
    different = [pair for pair in pairs if pair[0] != pair[1]]
    for mine, other in different[:show]:
        print(f"{check}\n  ours      {mine}\n  published {other}", file=sys.stderr)
    return Row(check, len(pairs), len(pairs) - len(different), note)


def words_of(folder: Path, name: str, lang: str) -> list[str]:
    """Tokenised text without BPE: tok/ where there is one, else the encoded file with BPE undone."""
    plain = folder / "tok" / f"{name}.{lang}"
    return read_lines(plain) if plain.exists() else [undo_bpe(line) for line in read_lines(folder / f"{name}.{lang}")]


def bpe_rows(folder: Path, show: int) -> list[Row]:
    """Published tokens + published codes -> published subword units."""
    codes = read_lines(folder / "code")
    rows = []
    for name in ("valid", "test", "train_sample"):
        for lang in LANGS:
            theirs = read_lines(folder / f"{name}.{lang}")
            ours = bpe.apply(codes, words_of(folder, name, lang), quiet=True)
            label = f"apply BPE, {name}.{lang}"
            if name == "train_sample":
                note = "this part was encoded with other codes"
                rows.append(compare(f"{label} to line {OTHER_CODES}", ours[:OTHER_CODES], theirs[:OTHER_CODES], note))
                ours, theirs, label = ours[OTHER_CODES:], theirs[OTHER_CODES:], f"{label} after it"
            rows.append(compare(label, ours, theirs, show=show))
    return rows


def untokenize(line: str) -> str:
    """Lower-case tokens with English endings ("it &apos;s") rejoined and entities undone; spaces stay."""
    return unescape(_ENDING.sub("&apos;", line))


def token_rows(folder: Path, show: int) -> list[Row]:
    """Published tokens, entities undone, tokenised and lower-cased again -> themselves.

    Abbreviations are listed with their capitals ("Nr", "Dr"), so in lower-case text they lose
    their full stop; the last row counts the lines that differ in no other way.
    """
    rows, rest = [], []
    for name in ("valid", "test", "train_sample"):
        for lang in LANGS:
            words = words_of(folder, name, lang)
            again = moses.tokenize_lines([untokenize(line) for line in words], lang, lower=True)
            rows.append(compare(f"tokenise again, {name}.{lang}", again, words, "the others: see below", show))
            rest += [pair for pair in zip(again, words, strict=True) if pair[0] != pair[1]]
    stops = sum(ours.replace(" .", ".") == theirs.replace(" .", ".") for ours, theirs in rest)
    return [*rows, Row("  the others: lower-cased abbreviations only", len(rest), stops)]


def last_stop_rows(folder: Path) -> list[Row]:
    """Published lines whose last word has lost its full stop, as our rule for the last word has it."""
    rows = []
    for name in ("valid", "test", "train_sample"):
        for lang in LANGS:
            ends = [line.split(" ")[-1] for line in words_of(folder, name, lang) if line.endswith(".")]
            split = sum(not word.strip(".") for word in ends)
            rows.append(Row(f"last full stop split, {name}.{lang}", len(ends), split))
    return rows


def clean_rows(folder: Path) -> list[Row]:
    """Pairs that pass the length filter; all of valid and train have passed it already."""
    rows = []
    for name in ("valid", "train_sample", "test"):
        pairs = list(zip(*(words_of(folder, name, lang) for lang in LANGS), strict=True))
        note = "not filtered in the pipeline" if name == "test" else ""
        rows.append(Row(f"passes the filter, {name}", len(pairs), sum(moses.keep_pair(*pair) for pair in pairs), note))
    return rows


def raw_rows(data: Path, show: int) -> list[Row]:
    """Raw-case text, tokenised, lower-cased and encoded -> a set that others made with plain sacremoses.

    The raw lines pass as dev/test segments, since that set had the same apostrophe replacement.
    """
    folder = data / "iwslt14-de-en"
    codes = read_lines(folder / "code")
    known = set(zip(*(read_lines(data / "mt-mix-de-en" / f"train.{lang}") for lang in LANGS), strict=True))
    raw = []
    for lang in LANGS:
        lines = read_lines(folder / "ted_extra_raw" / f"ted_extra.{lang}")
        raw.append(ted.segment_text([f'<seg id="1"> {line} </seg>' for line in lines]))

    def encoded(tokenize: Callable[[str, str], str]) -> list[tuple[str, str]]:
        sides = (
            [moses.lowercase(tokenize(line, lang)) for line in side] for side, lang in zip(raw, LANGS, strict=True)
        )
        return list(zip(*(bpe.apply(codes, side, quiet=True) for side in sides), strict=True))

    plain = {lang: MosesTokenizer(lang) for lang in LANGS}
    theirs = encoded(lambda line, lang: plain[lang].tokenize(line, return_str=True))
    ours = encoded(moses.tokenize)
    found = [pair for pair in zip(ours, theirs, strict=True) if pair[1] in known]
    rest = [(mine, other) for mine, other in found if mine not in known]
    for pair in rest[:show]:
        print(*pair, sep="\n", file=sys.stderr)
    explained = sum(all(_last_stop(*sides) for sides in zip(*pair, strict=True)) for pair in rest)
    return [
        Row(
            "raw text, pairs in mt-mix, plain sacremoses",
            len(theirs),
            len(found),
            "the others were left out of mt-mix",
        ),
        Row("  of these, ours the same", len(found), len(found) - len(rest), "the others: next row"),
        Row("  the others differ in the last full stop only", len(rest), explained),
    ]


def _last_stop(ours: str, theirs: str) -> bool:
    """Equal but for a full stop that ours has split off the last word (BPE undone)."""
    mine, other = undo_bpe(ours), undo_bpe(theirs)
    return mine == other or (mine.endswith(" .") and mine.removesuffix(" .") + "." == other)


def learning_row(data: Path) -> Row:
    """Joint BPE learnt on a training text -> codes that the subword-nmt command learnt on it."""
    folder = data / "multi30k" / "bpe6000"
    text = [undo_bpe(line) for lang in LANGS for line in read_lines(folder / f"train.{lang}")]
    theirs = read_lines(folder / "code")
    ours = bpe.learn(text, len(theirs) - 1, quiet=True)
    ours += [""] * (len(theirs) - len(ours))
    return compare("learn BPE, multi30k code", ours, theirs)


def run(data: Path, show: int = 0, learning: bool = True) -> list[Row]:
    """All rows for the data folder; PrepareError if a file is missing."""
    folder = data / "iwslt14-de-en"
    steps: list[Callable[[], list[Row]]] = [
        partial(bpe_rows, folder, show),
        partial(token_rows, folder, show),
        partial(last_stop_rows, folder),
        partial(clean_rows, folder),
        partial(raw_rows, data, show),
    ]
    rows = [row for step in steps for row in step()]
    return [*rows, learning_row(data)] if learning else rows


def main() -> int:
    """The command; 1 if the data are not there."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of the data sets")
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    parser.add_argument("--show", type=int, default=0, help="print this many differing lines per check")
    parser.add_argument("--skip-learning", action="store_true", help="leave out the slowest check")
    options = parser.parse_args()
    try:
        rows = run(options.data, options.show, not options.skip_learning)
    except PrepareError as error:
        print(f"iwslt14_parity: error: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps([asdict(row) | {"share": row.share} for row in rows], indent=1))
    else:
        for row in rows:
            print(
                f"{row.check:47} {row.same:6} of {row.lines:6}  {row.share:8.3%}  {row.note if row.share < 1 else ''}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
