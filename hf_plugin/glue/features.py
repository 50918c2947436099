"""A GLUE task, tokenised: what a Trainer is given."""

import copy
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Optional

from datasets import Dataset

from head_pruning import HeadPruningError

from ..scripts.tokenising import through_cache, usable_length
from .hub import hub_split, load_hub
from .reading import check_tsv, read_split, split_path
from .tasks import HUB_REPOSITORY, TASKS, GlueTask, Split, find_task, plain_name

logger = logging.getLogger(__name__)

KINDS = ("train", "validation", "test")


@dataclass(frozen=True)
class TaskData:
    """The tokenised splits of a task.

    Each dataset has the columns that the tokenizer makes (lists of numbers, not padded) and, save for test, ``label``.

    Attributes:
        task: the task.
        train: None unless asked for.
        validation: by name, the task's, or ``mnli`` (matched) and ``mnli-mm``; empty unless asked for.
        test: likewise; without labels.
        ids: for each test set GLUE's numbers of its rows, in their order, as ``write_predictions`` takes them.
    """

    task: GlueTask
    train: "Dataset | None" = None
    validation: dict[str, Dataset] = field(default_factory=dict)
    test: dict[str, Dataset] = field(default_factory=dict)
    ids: dict[str, list[int]] = field(default_factory=dict)


def check_files(task: GlueTask, data_dir: "str | Path", splits: Sequence[str]) -> None:
    """Look at the first lines of the files of ``splits`` in a folder in GLUE's layout: before a model is loaded.

    Raises:
        HeadPruningError: the folder or a file is another task's, a file is missing or has no rows.
    """
    _check_folder(task, data_dir)
    groups = {"train": (task.train,), "validation": task.validation, "test": task.test}
    for kind in splits:
        for split in groups[kind]:
            check_tsv(split_path(task, split, data_dir), task, split.labelled)


def load_task(
    name: "str | GlueTask",
    *,
    tokenizer: Any,
    data_dir: "str | Path | None" = None,
    cache_dir: "str | Path | None" = None,
    max_seq_length: int = 128,
    overwrite_cache: bool = False,
    splits: Optional[Sequence[str]] = None,
    repository: str = HUB_REPOSITORY,
) -> TaskData:
    """Read and tokenise a GLUE task.

    Args:
        name: the task, in any usual spelling.
        tokenizer: a transformers tokenizer.
        data_dir: the task's folder in GLUE's TSV layout (nothing is written there and no network is used); None to
            load the task from the hub.
        cache_dir: where downloads and tokenised splits are kept; None for the default of ``datasets``.
        max_seq_length: longer examples are cut to that many tokens; lowered to the tokenizer's own limit.
        overwrite_cache: tokenise again even if the cache has it.
        splits: which of ``train``, ``validation`` and ``test``, all of whose files must be there; None for train,
            validation and those test sets that are there.
        repository: the dataset on the hub.

    Raises:
        HeadPruningError: no such task, the data cannot be had, are malformed or another task's, the length is too
            small, or the cache cannot be written.
    """
    task = find_task(name)
    kinds = KINDS if splits is None else splits
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise HeadPruningError(f"There is no split {unknown[0]!r}; choose among {', '.join(KINDS)}.")
    length = _usable_length(task, tokenizer, max_seq_length)
    cache = None if cache_dir is None else str(cache_dir)
    tables = load_hub(task, repository, cache) if data_dir is None else None

    def there(split: Split) -> bool:
        if tables is not None:
            return split.hub in tables
        return data_dir is not None and (Path(data_dir) / split.file).is_file()

    groups = {"train": (task.train,), "validation": task.validation, "test": task.test}
    chosen = [(kind, split) for kind in KINDS if kind in kinds for split in groups[kind]]
    if splits is None:
        chosen = [(kind, split) for kind, split in chosen if kind != "test" or there(split)]
    if data_dir is not None:
        _check_folder(task, data_dir)
        # Tokenising can take long: what is missing is said before.
        for _, split in chosen:
            split_path(task, split, data_dir)
    found: dict[str, dict[str, Dataset]] = {kind: {} for kind in KINDS}
    ids = {}
    for kind, split in chosen:
        raw = hub_split(task, split, tables, repository) if data_dir is None else read_split(task, split, data_dir)
        found[kind][split.key] = tokenise(raw, task, split, tokenizer, length, cache, overwrite_cache)
        if kind == "test":
            ids[split.key] = raw["idx"][:]
    return TaskData(task, found["train"].get(task.train.key), found["validation"], found["test"], ids)


def _check_folder(task: GlueTask, data_dir: "str | Path") -> None:
    """Raise HeadPruningError where the folder has another task's name: the columns alone cannot tell some apart."""
    name = plain_name(os.path.basename(os.path.abspath(data_dir)))
    for other in TASKS.values():
        if name == plain_name(other.name) != plain_name(task.name):
            raise HeadPruningError(
                f"{data_dir} is the folder of {other.folder}, but the task is {task.folder}; give --data_dir with the "
                f"folder of {task.folder}, or --task_name {other.folder}."
            )


def tokenise(
    raw: Dataset,
    task: GlueTask,
    split: Split,
    tokenizer: Any,
    max_seq_length: int,
    cache_dir: "str | None",
    overwrite_cache: bool,
) -> Dataset:
    """``raw`` (as ``read_tsv`` returns it) through ``tokenizer``, or the same out of the cache.

    Raises:
        HeadPruningError: the cache cannot be written.
    """
    texts = [name for name in ("sentence1", "sentence2") if name in raw.column_names]
    work = partial(_encode, tokenizer=copy.deepcopy(tokenizer), texts=texts, max_seq_length=max_seq_length)
    return through_cache(
        raw,
        work,
        *(tokenizer, texts, max_seq_length),
        folder="glue-tokenised",
        name=f"{task.name}-{split.hub}",
        what=f"{task.folder} {split.hub}",
        cache_dir=cache_dir,
        overwrite=overwrite_cache,
        remove_columns=[*texts, "idx"],
    )


def _encode(batch: dict, tokenizer: Any, texts: list[str], max_seq_length: int) -> dict:
    return dict(tokenizer(*(batch[name] for name in texts), truncation=True, max_length=max_seq_length))


def _usable_length(task: GlueTask, tokenizer: Any, wanted: int) -> int:
    """``wanted``, or the tokenizer's limit if that is lower."""
    length = usable_length(tokenizer, wanted)
    # At least one token of each text beside the special ones.
    least = tokenizer.num_special_tokens_to_add(pair=len(task.columns) == 2) + len(task.columns)
    if length < least:
        raise HeadPruningError(
            f"max_seq_length is {wanted}, but {task.folder} needs {least} tokens or more; raise it (default 128)."
        )
    return length
