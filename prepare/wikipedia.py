"""Segment pairs for pretraining, out of English Wikipedia or a corpus of your own: ``python -m prepare.wikipedia``.

    python -m prepare.wikipedia --data_dir data/wikipedia --tokenizer bert-base-uncased --workers 16
    python -m prepare.wikipedia --data_dir data/own --tokenizer bert-base-uncased --corpus FOLDER

Documents are read one at a time, cut into sentences, tokenised, and made into pairs in shards, which do not depend on
how many processes work. A shard that is there is kept, so a run that was stopped goes on where it was. The folder is
what ``python -m hf_plugin.run_pretraining --data_dir`` reads.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from head_pruning import HeadPruningError
from head_pruning.files import read_json
from head_pruning.progress import bar_options
from prepare.command import run
from prepare.corpus import WIKIPEDIA, Corpus, local_files, sentences_of, splitter
from prepare.files import PrepareError, atomic_text, part_path
from prepare.parallel import default_workers, leave_with_parent
from prepare.segment_pairs import PairOptions, pairs_of_shard
from prepare.spread import documents_of, spread, spread_path
from prepare.stages import only_run

# Documents between two reports of a worker.
_TOLD = 64


@dataclass(frozen=True)
class Options:
    """What a run is asked to do.

    ``data_dir``: the folder of the shards. ``corpus``: where documents are read. ``tokenizer``: its folder or name.
    ``pairs``: what they look like; ``max_length`` 0: the tokenizer's limit, at most 512. ``shards``: None for the
    corpus' own number. ``sentences``, ``language``: see :func:`prepare.corpus.splitter`. ``workers``: processes.
    """

    data_dir: Path
    corpus: Corpus
    tokenizer: str
    pairs: PairOptions
    shards: int | None = None
    sentences: str = "sentencex"
    language: str = "en"
    workers: int = 1
    quiet: bool = False


def prepare(options: Options) -> list[Path]:
    """Write the shards that are missing, then what they hold; returns the folder.

    PrepareError if the corpus cannot be read or is empty, or the folder holds pairs made otherwise; HeadPruningError
    if the tokenizer cannot be read, or the folder is damaged.
    """
    from hf_plugin.pretraining.folder import ABOUT, FORMAT, fingerprint, statistics

    splitter(options.sentences, options.language)  # told before anything is read
    tokenizer = _tokenizer(options.tokenizer)
    limit = min(512, tokenizer.model_max_length)
    pairs = PairOptions(
        **{
            **asdict(options.pairs),
            "max_length": options.pairs.max_length or limit,
            "specials": tokenizer.num_special_tokens_to_add(pair=True),
        }
    )
    if pairs.max_length - pairs.specials < 2:
        raise PrepareError(f"--max_seq_length {pairs.max_length} leaves no room for two segments; give a larger one.")
    about: dict[str, Any] = {
        "format": FORMAT,
        "corpus": options.corpus.told(),
        "tokenizer": fingerprint(tokenizer),
        **asdict(pairs),
        "sentences": f"{options.sentences} {_version(options.sentences)} {options.language}",
        "shards": options.shards or options.corpus.shards(),
    }
    options.data_dir.mkdir(parents=True, exist_ok=True)
    with only_run(options.data_dir / ".prepare-wikipedia.lock"):
        path = options.data_dir / ABOUT
        _refuse_other(path, about)
        _write(path, about)
        shards = about["shards"]
        missing = [i for i in range(shards) if not all(path.is_file() for path in _paths(options.data_dir, i, shards))]
        _work(options, pairs, shards, missing)
        for shard in range(shards):  # of a shard that was written just before a kill
            spread_path(options.data_dir, shard, shards).unlink(missing_ok=True)
        found = statistics(options.data_dir, about)
        if not found["pairs"]:
            raise PrepareError(
                "The corpus has no sentence in it, so there are no pairs; give --corpus another folder."
            )
        _write(path, {**about, "statistics": found})
    if not options.quiet:
        share = found["random_pairs"] / max(1, found["pairs"])
        mean = found["tokens"] / max(1, found["pairs"])
        print(
            f"{found['pairs']} pairs, {share:.4f} of them random; {mean:.1f} tokens on average, {found['longest']} at "
            f"most, without {pairs.specials} special ones",
            file=sys.stderr,
        )
    return [options.data_dir]


def _version(package: str) -> str:
    return importlib.metadata.version("nltk" if package == "punkt" else package)


def _write(path: Path, about: dict[str, Any]) -> None:
    with atomic_text(path) as handle:
        json.dump(about, handle, indent=1)
        handle.write("\n")


def _refuse_other(path: Path, about: dict[str, Any]) -> None:
    if not path.is_file():
        return
    theirs = read_json(path, dict, cure="remove the folder and run again")
    for name, value in about.items():
        if theirs.get(name) != value:
            raise PrepareError(
                f"{path.parent} holds pairs with another {name} ({theirs.get(name)!r}, not {value!r}); choose another "
                "--data_dir."
            )


def _paths(folder: Path, shard: int, shards: int) -> list[Path]:
    """The files of a shard: to train on, and to validate with."""
    from hf_plugin.pretraining.folder import shard_name

    return [folder / shard_name(shard, shards, validation) for validation in (False, True)]


def _tokenizer(name: str) -> Any:
    from hf_plugin.command_line.fields import ModelArguments
    from hf_plugin.scripts.models import load_tokenizer

    return load_tokenizer(ModelArguments(model_name_or_path=name), "--tokenizer")


class _Shards:
    """Writes shards; the same object serves in this process and, copied, in each of the others."""

    def __init__(self, options: Options, pairs: PairOptions, shards: int) -> None:
        self.options, self.pairs, self.shards = options, pairs, shards
        self._tools: tuple[Any, Callable[[str], list[str]]] | None = None

    def _texts(self, shard: int) -> Iterator[str]:
        path = spread_path(self.options.data_dir, shard, self.shards)
        return documents_of(path) if path.is_file() else self.options.corpus.documents(shard, self.shards)

    def documents(self, shard: int, tell: Callable[[int], None]) -> Iterator[list[list[int]]]:
        """The token numbers of the sentences of each document."""
        if self._tools is None:
            split = splitter(self.options.sentences, self.options.language)
            self._tools = _tokenizer(self.options.tokenizer), split
        tokenizer, split = self._tools
        told = seen = 0
        for seen, text in enumerate(self._texts(shard), 1):
            if seen % _TOLD == 0:
                tell(seen - told)
                told = seen
            sentences = sentences_of(text, split)
            if not sentences:
                continue
            found = tokenizer(sentences, add_special_tokens=False, return_attention_mask=False, verbose=False)
            document = [ids for ids in found["input_ids"] if ids]
            if document:
                yield document
        tell(seen - told)

    def write(self, shard: int, tell: Callable[[int], None]) -> None:
        """Write one shard; each of its files appears whole or not at all."""
        from hf_plugin.pretraining.folder import write_shard

        paths = _paths(self.options.data_dir, shard, self.shards)
        parts = [part_path(path) for path in paths]
        try:
            write_shard(parts, pairs_of_shard(self.documents(shard, tell), self.pairs, shard))
            for part, path in zip(parts, paths):
                os.replace(part, path)
            spread_path(self.options.data_dir, shard, self.shards).unlink(missing_ok=True)
        finally:
            for part in parts:
                part.unlink(missing_ok=True)


_worker: tuple[_Shards, Any] | None = None


def _begin(shards: _Shards, counter: Any) -> None:
    """What a worker process starts with."""
    global _worker
    leave_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = shards, counter


def _write_in_worker(shard: int) -> None:
    assert _worker is not None
    shards, counter = _worker

    def tell(number: int) -> None:
        with counter.get_lock():
            counter.value += number

    shards.write(shard, tell)


def _spread(options: Options, number: int, missing: list[int], shown: dict[str, Any]) -> None:
    """Read the corpus once for all missing shards, where they are not of whole files."""
    if not missing or options.corpus.whole_files(number):
        return
    wanted = [shard for shard in missing if not spread_path(options.data_dir, shard, number).is_file()]
    if wanted:
        with tqdm(desc="reading", unit="document", disable=options.quiet, **shown) as bar:
            spread(options.corpus.documents(), options.data_dir, wanted, number, bar.update)


def _work(options: Options, pairs: PairOptions, number: int, missing: list[int]) -> None:
    """Write the missing shards."""
    shards = _Shards(options, pairs, number)
    shown = {"mininterval": 0.5, **bar_options()}
    _spread(options, number, missing, shown)
    with tqdm(desc="documents", unit="document", disable=options.quiet or not missing, **shown) as bar:
        if options.workers <= 1 or len(missing) < 2:
            for shard in missing:
                shards.write(shard, bar.update)
            return
        counter = multiprocessing.Value("q", 0)
        pool = ProcessPoolExecutor(min(options.workers, len(missing)), initializer=_begin, initargs=(shards, counter))
        try:
            waiting: set[Future] = {pool.submit(_write_in_worker, shard) for shard in missing}
            while waiting:
                done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                bar.update(counter.value - bar.n)
                for future in done:
                    future.result()
        except BrokenProcessPool:
            raise PrepareError("A worker process died (for want of memory, say); try fewer --workers.") from None
        finally:
            pool.shutdown(cancel_futures=True)


def parse(arguments: Sequence[str] | None) -> Options:
    """The options of a command line; SystemExit (status 2) if they are wrong."""
    plain = PairOptions()
    parser = argparse.ArgumentParser(prog="python -m prepare.wikipedia", description=__doc__.partition(":")[0])

    def add(name: str, **about: Any) -> None:
        parser.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), **about)

    add("data_dir", type=Path, default=Path("data/wikipedia"), help="folder to write (default %(default)s)")
    add("tokenizer", default="bert-base-uncased", help="folder or hub name of a tokenizer (default %(default)s)")
    add("corpus", type=Path, help="file or folder of .txt (a blank line parts documents), .parquet or .jsonl")
    add("dataset", help=f"NAME:CONFIG of a data set on the hub, which is streamed (default {WIKIPEDIA})")
    add("text_column", default="text", help="of parquet and JSON lines (default %(default)s)")
    add("cache_dir", help="for what the hub sends (default: that of datasets)")
    add("max_seq_length", type=int, default=0, help="tokens of a pair (default: the tokenizer's limit, at most 512)")
    add(
        "short_seq_probability",
        type=float,
        default=plain.short_probability,
        help="share of shorter pairs (default %(default)s)",
    )
    add(
        "nsp_probability",
        type=float,
        default=plain.random_probability,
        help="share of random pairs (default %(default)s)",
    )
    add(
        "validation_split_percentage",
        type=float,
        default=plain.validation_percentage,
        help="share of the documents to validate with (default %(default)s)",
    )
    add("seed", type=int, default=plain.seed, help="of all draws (default %(default)s)")
    add("shards", type=int, help="files to write (default: as many as the hub's, or one for 64 MiB of local files)")
    add(
        "sentences",
        choices=("sentencex", "punkt"),
        default="sentencex",
        help="what finds sentences (default %(default)s)",
    )
    add("language", default="en", help="of the text, as a code such as de (default %(default)s)")
    add("workers", type=int, default=default_workers(), help="processes (default: all cores, %(default)s)")
    add("quiet", action="store_true", help="no progress, only warnings and errors")
    given = parser.parse_args(arguments)
    if given.corpus is not None and given.dataset is not None:
        parser.error("--corpus reads local files, --dataset the hub's: give one of them")
    for name in ("short_seq_probability", "nsp_probability"):
        if not 0 <= getattr(given, name) <= 1:
            parser.error(f"--{name} must be from 0 to 1")
    if not 0 <= given.validation_split_percentage < 100:
        parser.error("--validation_split_percentage must be from 0 to below 100")
    if given.workers < 1:
        parser.error("--workers must be at least 1")
    if given.shards is not None and given.shards < 1 or given.max_seq_length < 0 or given.seed < 0:
        parser.error("--shards must be 1 or more, --max_seq_length and --seed 0 or more")
    try:
        files = () if given.corpus is None else local_files(given.corpus)
    except PrepareError as error:
        parser.error(str(error))
    return Options(
        data_dir=given.data_dir,
        corpus=Corpus(files, given.dataset or WIKIPEDIA, given.text_column, given.cache_dir),
        tokenizer=given.tokenizer,
        pairs=PairOptions(
            max_length=given.max_seq_length,
            short_probability=given.short_seq_probability,
            random_probability=given.nsp_probability,
            seed=given.seed,
            validation_percentage=given.validation_split_percentage,
        ),
        shards=given.shards,
        sentences=given.sentences,
        language=given.language,
        workers=given.workers,
        quiet=given.quiet,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status: 0, 1 after an error (one sentence on stderr), 130 if interrupted."""
    options = parse(arguments)
    return run("prepare-wikipedia", lambda: prepare(options), quiet=options.quiet, errors=(HeadPruningError,))


if __name__ == "__main__":
    sys.exit(main())
