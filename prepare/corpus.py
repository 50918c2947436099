"""Documents out of the hub's data sets and out of local text, parquet and JSON lines, one at a time."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from prepare.files import PrepareError

if TYPE_CHECKING:
    from datasets import IterableDataset

#: English Wikipedia as parquet; the data set that scripts load is no more.
WIKIPEDIA = "wikimedia/wikipedia:20231101.en"
# What ends so is read by which loader.
_KINDS = {".txt": "text", ".parquet": "parquet", ".jsonl": "json", ".json": "json"}
_SHARD_BYTES = 2**26
#: The languages of NLTK's punkt by their codes.
PUNKT_LANGUAGES = {
    "cs": "czech", "da": "danish", "de": "german", "el": "greek", "en": "english", "es": "spanish", "et": "estonian",
    "fi": "finnish", "fr": "french", "it": "italian", "ml": "malayalam", "nl": "dutch", "no": "norwegian",
    "pl": "polish", "pt": "portuguese", "ru": "russian", "sl": "slovene", "sv": "swedish", "tr": "turkish",
}  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """Where documents are read from.

    ``files``: local ones, in order; empty for the hub. ``dataset``: NAME:CONFIG on the hub. ``column``: of the text.
    ``cache_dir``: for what the hub sends, None for the default.
    """

    files: tuple[Path, ...] = ()
    dataset: str = WIKIPEDIA
    column: str = "text"
    cache_dir: str | None = None

    def told(self) -> dict[str, object]:
        """What tells it from another one."""
        files = [[path.name, path.stat().st_size] for path in self.files]
        return {"files": files, "column": self.column} if files else {"dataset": self.dataset, "column": self.column}

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Inside the block what loaders say, at the start or on the way, becomes a PrepareError."""
        try:
            yield
        except PrepareError:
            raise
        except Exception as error:  # each loader fails in its own way
            reason = " ".join(str(error).split())[:300].rstrip(".")
            place = f"A file in {self.files[0].parent}" if len(self.files) > 1 else "".join(map(str, self.files))
            raise PrepareError(
                f"{place or self.dataset} cannot be read ({reason}); give --corpus a folder of text in UTF-8, parquet "
                "or JSON lines."
            ) from error

    def open(self) -> IterableDataset:
        """Its rows, streamed. PrepareError if it cannot be had."""
        from datasets import load_dataset

        with self._reading():
            if not self.files:
                name, _, config = self.dataset.partition(":")
                return load_dataset(name, config or None, split="train", streaming=True, cache_dir=self.cache_dir)
            kind = _KINDS[self.files[0].suffix.lower()]
            # A blank line parts documents of text.
            own = {"sample_by": "paragraph"} if kind == "text" else {}
            files = [str(path) for path in self.files]
            return load_dataset(kind, data_files=files, split="train", streaming=True, cache_dir=self.cache_dir, **own)

    def shards(self) -> int:
        """Into how many parts it is cut unless the user says: those of the hub, or of 64 MiB of local files."""
        if not self.files:
            return self.open().num_shards
        return max(1, math.ceil(sum(path.stat().st_size for path in self.files) / _SHARD_BYTES))

    def whole_files(self, shards: int) -> bool:
        """Whether there are files enough for so many parts of whole ones."""
        return shards == 1 or self.open().num_shards >= shards

    def documents(self, shard: int = 0, shards: int = 1) -> Iterator[str]:
        """The texts of all files, or of one of several parts of whole ones, see :meth:`whole_files`.

        A row whose text is null is an empty one. PrepareError if rows cannot be read, or have no text.
        """
        rows = self.open()
        if shards > 1:
            rows = rows.shard(num_shards=shards, index=shard, contiguous=False)
        with self._reading():
            for row in rows:
                text = row.get(self.column, 0)
                if not isinstance(text, str | None):
                    raise PrepareError(
                        f"The corpus has no text in {self.column!r} (it has {', '.join(row)}); give --text_column."
                    )
                yield text or ""


def local_files(corpus: Path) -> tuple[Path, ...]:
    """The files of a folder that are read, or the file itself. PrepareError if there are none, or several kinds."""
    found = [corpus] if corpus.is_file() else sorted(path for path in corpus.rglob("*") if path.is_file())
    known = [path for path in found if path.suffix.lower() in _KINDS]
    if not known:
        raise PrepareError(f"{corpus} holds no file that ends in {', '.join(_KINDS)}; give --corpus another folder.")
    kinds = sorted({_KINDS[path.suffix.lower()] for path in known})
    if len(kinds) > 1:
        raise PrepareError(f"{corpus} holds files of several kinds ({' and '.join(kinds)}); keep those of one kind.")
    return tuple(known)


def splitter(name: str, language: str) -> Callable[[str], list[str]]:
    """Cuts a line of text into sentences. PrepareError where the tool or its data are not there, or it does not know
    the language.

    ``name``: ``sentencex`` (rules, no download) or ``punkt`` (NLTK's, whose data must be there). ``language``: its
    code, such as en; punkt takes NLTK's own names, too.
    """
    if name == "punkt" and language not in {*PUNKT_LANGUAGES, *PUNKT_LANGUAGES.values()}:
        raise PrepareError(
            f"NLTK's punkt does not know the language {language!r}; give --language one of "
            f"{', '.join(PUNKT_LANGUAGES)}, or choose --sentences sentencex."
        )
    package = "sentencex" if name == "sentencex" else "nltk"
    if importlib.util.find_spec(package) is None:
        raise PrepareError(f"Sentences are found by {name}, which is not installed; pip install {package}.")
    if name == "sentencex":
        import sentencex

        return partial(sentencex.segment, language)
    import nltk

    theirs = PUNKT_LANGUAGES.get(language, language)
    try:
        return nltk.PunktTokenizer(theirs).tokenize
    except LookupError:
        raise PrepareError(
            f"The data of NLTK's punkt are not there for {theirs}; download them (python -m nltk.downloader "
            "punkt_tab), or choose --sentences sentencex."
        ) from None


def sentences_of(text: str, split: Callable[[str], list[str]]) -> list[str]:
    """The sentences of a document; a line's end ends one, too."""
    found = (" ".join(sentence.split()) for line in text.splitlines() if line.strip() for sentence in split(line))
    return [sentence for sentence in found if sentence]
