"""A folder of segment pairs: shards in Arrow's stream format, which are mapped into memory, and what they are of."""

import contextlib
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any, Iterable, Iterator, Sequence

import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from head_pruning import HeadPruningError
from head_pruning.compact.shapes import Number, Whole
from head_pruning.errors import one_line
from head_pruning.files import read_json

ABOUT = "pairs.json"
FORMAT = 2  # of 1 no document is kept back for validation
#: Of a shard: the tokens of both segments without special ones, and whether the second is a random one.
SCHEMA = pa.schema([("first", pa.list_(pa.int32())), ("second", pa.list_(pa.int32())), ("random", pa.bool_())])
# Pairs in a batch of the file, and of the statistics.
_ROWS = 1000
_CURE = "run python -m prepare.wikipedia again"


def shard_name(shard: int, shards: int, validation: bool = False) -> str:
    """The file of a shard's pairs to train on, or of those to validate with."""
    return f"{'validation' if validation else 'pairs'}-{shard:05d}-of-{shards:05d}.arrow"


def write_shard(paths: "Sequence[str | Path]", pairs: Iterable[Any]) -> None:
    """Write objects with ``first``, ``second``, ``random`` and ``validation``: those to train on into the first of two
    files, those to validate with into the second.
    """
    with contextlib.ExitStack() as stack:
        sinks = [stack.enter_context(pa.OSFile(str(path), "wb")) for path in paths]
        streams = [stack.enter_context(pa.ipc.new_stream(sink, SCHEMA)) for sink in sinks]
        waiting: tuple[list[Any], list[Any]] = [], []
        for pair in pairs:
            mine = waiting[pair.validation]
            mine.append(pair)
            if len(mine) == _ROWS:
                streams[pair.validation].write_batch(_batch(mine))
                mine.clear()
        for stream, rest in zip(streams, waiting):
            if rest:
                stream.write_batch(_batch(rest))


def _batch(pairs: list[Any]) -> pa.RecordBatch:
    columns = [[getattr(pair, name) for pair in pairs] for name in SCHEMA.names]
    return pa.RecordBatch.from_arrays([pa.array(c, t) for c, t in zip(columns, SCHEMA.types)], schema=SCHEMA)


def fingerprint(tokenizer: Any) -> str:
    """What tells a tokenizer's numbering of words from another's."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


def read_about(folder: "str | Path") -> dict[str, Any]:
    """What ``pairs.json`` says.

    Raises:
        HeadPruningError: there is none, it is damaged, or the folder was not finished.
    """
    path = Path(folder) / ABOUT
    if not path.is_file():
        raise HeadPruningError(
            f"{folder} holds no segment pairs ({ABOUT}); make them: python -m prepare.wikipedia --data_dir {folder}."
        )
    shape = {"format": Whole(), "tokenizer": str, "max_length": Whole(), "shards": Whole()}
    about = read_json(path, {**shape, "validation_percentage?": Number(0, 100)}, cure=_CURE)
    if about["format"] not in (1, FORMAT):
        raise HeadPruningError(f"{path} is of another version; {_CURE} into another folder.")
    names = [name for validation in splits(about) for name in shard_names(about, validation)]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise HeadPruningError(
            f"{folder} lacks {missing[0]} ({len(missing)} of {len(names)} files); {_CURE}, which goes on where "
            "it was stopped."
        )
    return about


def splits(about: dict[str, Any]) -> tuple[bool, ...]:
    """Whether files are of pairs to validate with: of both kinds, but in folders that earlier versions wrote."""
    return (False, True) if about["format"] > 1 else (False,)


def shard_names(about: dict[str, Any], validation: bool = False) -> list[str]:
    """The files of all shards, of one kind."""
    return [shard_name(shard, about["shards"], validation) for shard in range(about["shards"])]


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Inside the block a shard is read; what goes wrong becomes a HeadPruningError."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        raise HeadPruningError(f"{path} is damaged ({one_line(error):.200}); remove it and {_CURE}.") from error


def open_pairs(folder: "str | Path", about: dict[str, Any], validation: bool = False) -> Dataset:
    """All pairs of one kind, mapped into memory. Raises HeadPruningError for a damaged shard."""
    parts = []
    for name in shard_names(about, validation):
        with _reading(Path(folder) / name):
            parts.append(Dataset.from_file(str(Path(folder) / name)))
        if parts[-1].column_names != SCHEMA.names:
            raise HeadPruningError(f"{Path(folder) / name} holds no segment pairs; remove it and {_CURE}.")
    return concatenate_datasets(parts)


def _batches(folder: Path, about: dict[str, Any]) -> Iterator[pa.RecordBatch]:
    for name in (name for validation in splits(about) for name in shard_names(about, validation)):
        path = folder / name
        with _reading(path), pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
            yield from stream


def statistics(folder: "str | Path", about: dict[str, Any]) -> dict[str, Any]:
    """Counts of what the shards hold, read from them. Raises HeadPruningError for a damaged one.

    Returns:
        ``pairs``, ``random_pairs``, ``tokens`` (special ones not counted), ``longest``, and ``lengths``: how many
        pairs have up to so many tokens, in sixteenths of the limit.
    """
    pairs = random = tokens = longest = 0
    step, lengths = max(1, about["max_length"] // 16), Counter[int]()
    for batch in _batches(Path(folder), about):
        first, second = (batch.column(i).value_lengths().to_numpy() for i in (0, 1))
        both = first + second
        pairs, random, tokens = pairs + len(both), random + batch.column(2).true_count, tokens + int(both.sum())
        longest = max(longest, int(both.max(initial=0)))
        lengths.update((-(-both // step) * step).tolist())
    return {
        "pairs": pairs,
        "random_pairs": random,
        "tokens": tokens,
        "longest": longest,
        "lengths": {str(upto): lengths[upto] for upto in sorted(lengths)},
    }
