"""Rows of a task out of a user's files (JSON lines, CSV, parquet) or the hub, and what a tokenizer makes of them."""

import copy
from pathlib import Path
from typing import Any, Callable, Optional, Sequence

from datasets import Dataset, load_dataset

from head_pruning import HeadPruningError
from head_pruning.errors import one_line

from ..command_line.fields import TableArguments
from .run import first_examples
from .tokenising import through_cache

_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def read_rows(data: TableArguments, split: str, columns: Sequence[str], cache_dir: Optional[str]) -> Dataset:
    """The rows of ``train``, ``validation`` or ``test``, as many as the options ask for.

    Args:
        data: names the files or the data set.
        split: which rows.
        columns: those that must be there.
        cache_dir: where ``datasets`` keeps what it read; None for its default.

    Raises:
        HeadPruningError: they are not named, cannot be read, are none, or lack a column.
    """
    name = getattr(data, f"{split}_file")
    if name is None and data.dataset_name is None:
        raise HeadPruningError(f"There is nothing to read for {split}; give --{split}_file, or --dataset_name.")
    place = name or f"{data.dataset_name} ({split})"
    try:
        if name is None:
            rows = load_dataset(str(data.dataset_name), data.dataset_config_name, split=split, cache_dir=cache_dir)
        else:
            rows = _read_file(Path(name), cache_dir)
    except HeadPruningError:
        raise
    except Exception as error:  # the readers, and the network libraries beneath, share no base class
        raise HeadPruningError(
            f"{place} cannot be read ({one_line(error):.200}); give JSON lines, CSV or parquet files, or the name of "
            "a data set."
        ) from error
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise HeadPruningError(
            f"{place} has no column {missing[0]}; it has {', '.join(rows.column_names)}, and {', '.join(columns)} "
            "are needed."
        )
    if not len(rows):
        raise HeadPruningError(f"{place} has no rows; give others.")
    most = {"train": data.max_train_samples, "validation": data.max_eval_samples}
    return first_examples(rows, most.get(split))


def _read_file(path: Path, cache_dir: Optional[str]) -> Dataset:
    if path.suffix not in _READERS:
        raise HeadPruningError(f"{path} ends in none of {', '.join(_READERS)}; convert it, or rename it.")
    if not path.is_file():
        raise HeadPruningError(f"There is no file {path}; correct its name.")
    return load_dataset(_READERS[path.suffix], data_files=str(path), split="train", cache_dir=cache_dir)


def tokenised(
    rows: Dataset,
    encode: Callable[[dict[str, list], Any], dict[str, list]],
    tokenizer: Any,
    *,
    name: str,
    data: TableArguments,
    cache_dir: Optional[str],
    key: Any = None,
) -> Dataset:
    """What ``encode(batch, tokenizer)`` makes of the rows of :func:`read_rows`, or the same out of the cache.

    Args:
        rows: of :func:`read_rows`.
        encode: a function at the top of a module, or a partial of one.
        tokenizer: a copy of it is handed on.
        name: of the cache's file.
        data: says whether the cache counts.
        cache_dir: where it lies; None for the default of ``datasets``.
        key: whatever else the outcome depends on.

    Raises:
        HeadPruningError: the cache cannot be written.
    """
    return through_cache(
        rows,
        encode,
        *(tokenizer, key),
        folder="tables-tokenised",
        name=name,
        what=name,
        cache_dir=cache_dir,
        overwrite=data.overwrite_cache,
        fn_kwargs={"tokenizer": copy.deepcopy(tokenizer)},
        remove_columns=rows.column_names,
    )
