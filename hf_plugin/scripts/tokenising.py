"""Rows through a tokenizer, or out of the cache of those that went before."""

import logging
from pathlib import Path
from typing import Any, Callable, Optional

import datasets
from datasets import Dataset
from datasets.fingerprint import Hasher

from head_pruning import HeadPruningError

logger = logging.getLogger(__name__)


def through_cache(
    rows: Dataset,
    encode: Callable,
    *key: Any,
    folder: str,
    name: str,
    what: str,
    cache_dir: "str | Path | None",
    overwrite: bool,
    **options: Any,
) -> Dataset:
    """What ``encode`` makes of batches of rows, or the same out of the cache.

    Args:
        rows: the rows; the cache file's name holds a digest of them and of ``key``.
        encode: gives a batch's columns; it must keep its own copy of a tokenizer, which would keep a length that it
            is called with, and be saved with it.
        *key: all that the outcome depends on beside the rows.
        folder: of the cache.
        name: what the cache file's name begins with.
        what: is tokenised, for the progress bar.
        cache_dir: where the cache lies; None for the default of ``datasets``.
        overwrite: tokenise again even if the cache has it.
        **options: of ``Dataset.map``.

    Raises:
        HeadPruningError: the cache cannot be written.
    """
    digest = Hasher.hash((rows._fingerprint, *key))
    place = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / folder
    try:
        place.mkdir(parents=True, exist_ok=True)
        return rows.map(
            encode,
            batched=True,
            cache_file_name=str(place / f"{name}-{digest}.arrow"),
            load_from_cache_file=False if overwrite else None,
            new_fingerprint=digest,
            desc=f"Tokenising {what}",
            **options,
        )
    except OSError as error:
        raise HeadPruningError(
            f"The tokenised data cannot be written to {place} ({error.strerror or error}); "
            f"give --cache_dir with a folder that can be written."
        ) from error


def usable_length(tokenizer: Any, wanted: int, least: Optional[int] = None) -> int:
    """``wanted`` tokens, or the tokenizer's limit if that is lower. Raises HeadPruningError below ``least``."""
    length = min(wanted, tokenizer.model_max_length)
    if length < wanted:
        logger.warning("max_seq_length %d is above the tokenizer's limit; %d is used.", wanted, length)
    if least is not None and length < least:
        raise HeadPruningError(f"--max_seq_length is {wanted}, but {least} tokens or more are needed; raise it.")
    return length
