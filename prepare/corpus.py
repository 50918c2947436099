"""Documents out of the hub's data sets and out of local text, parquet and JSON lines, one at a time."""

from __future__ import annotations

import importlib.util
import itertools
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

    def documents(self, shard: int, shards: int) -> Iterator[str]:
        """The texts of one part: of whole files where there are enough of them, else every so many-th row.

        A row whose text is null is an empty one. PrepareError if rows cannot be read, or have no text.
        """
        rows = self.open()
        if rows.num_shards >= shards > 1:
            mine = iter(rows.shard(num_shards=shards, index=shard, contiguous=False))
        else:
            mine = itertools.islice(rows, shard, None, shards)
        with self._reading():
            for row in mine:
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
    """Cuts a line of text into sentences. PrepareError where the tool, or its data, is not there.

    ``name``: ``sentencex`` (rules, no download) or ``punkt`` (NLTK's, whose data must be there). ``language``: its
    code, such as en.
    """
    if importlib.util.find_spec("sentencex" if name == "sentencex" else "nltk") is None:
        raise PrepareError(f"Sentences are found by {name}, which is not installed; pip install it.")
    if name == "sentencex":
        import sentencex

        return partial(sentencex.segment, language)
    import nltk

    try:
        return nltk.PunktTokenizer({"en": "english"}.get(language, language)).tokenize
    except LookupError:
        raise PrepareError("The data of NLTK's punkt are not there; choose --sentences sentencex.") from None


def sentences_of(text: str, split: Callable[[str], list[str]]) -> list[str]:
    """The sentences of a document; a line's end ends one, too."""
    found = (" ".join(sentence.split()) for line in text.splitlines() if line.strip() for sentence in split(line))
    return [sentence for sentence in found if sentence]
