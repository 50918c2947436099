"""A folder of segment pairs: shards in Arrow's stream format, which are mapped into memory, and what they are of."""

import contextlib
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any, Iterable, Iterator

import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from head_pruning import HeadPruningError
from head_pruning.compact.shapes import Whole
from head_pruning.errors import one_line
from head_pruning.files import read_json

ABOUT = "pairs.json"
FORMAT = 1
#: Of a shard: the tokens of both segments without special ones, and whether the second is a random one.
SCHEMA = pa.schema([("first", pa.list_(pa.int32())), ("second", pa.list_(pa.int32())), ("random", pa.bool_())])
# Pairs in a batch of the file, and of the statistics.
_ROWS = 1000
_CURE = "run python -m prepare.wikipedia again"


def shard_name(shard: int, shards: int) -> str:
    """The file of a shard."""
    return f"pairs-{shard:05d}-of-{shards:05d}.arrow"


def write_shard(path: "str | Path", pairs: Iterable[Any]) -> None:
    """Write objects with ``first``, ``second`` and ``random`` into a file."""
    waiting = []
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as stream:
        for pair in pairs:
            waiting.append(pair)
            if len(waiting) == _ROWS:
                stream.write_batch(_batch(waiting))
                waiting = []
        if waiting:
            stream.write_batch(_batch(waiting))


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
    about = read_json(
        path, {"format": Whole(), "tokenizer": str, "max_length": Whole(), "shards": Whole()}, cure=_CURE
    )
    if about["format"] != FORMAT:
        raise HeadPruningError(f"{path} is of another version; {_CURE} into another folder.")
    missing = [name for name in shard_names(about) if not (path.parent / name).is_file()]
    if missing:
        raise HeadPruningError(
            f"{folder} lacks {missing[0]} ({len(missing)} of {about['shards']} shards); {_CURE}, which goes on where "
            "it was stopped."
        )
    return about


def shard_names(about: dict[str, Any]) -> list[str]:
    """The files of all shards."""
    return [shard_name(shard, about["shards"]) for shard in range(about["shards"])]


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Inside the block a shard is read; what goes wrong becomes a HeadPruningError."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        raise HeadPruningError(f"{path} is damaged ({one_line(error):.200}); remove it and {_CURE}.") from error


def open_pairs(folder: "str | Path", about: dict[str, Any]) -> Dataset:
    """All pairs, mapped into memory. Raises HeadPruningError for a damaged shard."""
    parts = []
    for name in shard_names(about):
        with _reading(Path(folder) / name):
            parts.append(Dataset.from_file(str(Path(folder) / name)))
        if parts[-1].column_names != SCHEMA.names:
            raise HeadPruningError(f"{Path(folder) / name} holds no segment pairs; remove it and {_CURE}.")
    return concatenate_datasets(parts)


def _batches(folder: Path, about: dict[str, Any]) -> Iterator[pa.RecordBatch]:
    for name in shard_names(about):
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
