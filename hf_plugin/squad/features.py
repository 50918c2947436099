"""Questions and their texts as windows of tokens, with the way back from tokens to characters."""

import copy
import logging
from functools import partial
from pathlib import Path
from typing import Any, Sequence

import numpy as np
from datasets import Dataset, Features, Value

from head_pruning import HeadPruningError

from ..scripts.tokenising import through_cache, usable_length

logger = logging.getLogger(__name__)

#: What ``make_features(..., with_text=True)`` adds to what the model reads.
TEXT_COLUMNS = ["example", "null", "first", "starts", "ends", "most_context"]


def make_features(
    rows: Dataset,
    tokenizer: Any,
    *,
    max_seq_length: int = 384,
    doc_stride: int = 128,
    max_query_length: int = 64,
    with_text: bool = False,
    cache_dir: "str | Path | None" = None,
    overwrite_cache: bool = False,
    name: str = "train",
) -> Dataset:
    """Tokenise questions with their texts; a text that does not fit becomes several windows.

    The question is cut to ``max_query_length`` tokens. Windows start every ``doc_stride`` tokens of the text (they
    overlap where that is less than what a window holds, and never leave a gap).

    Args:
        rows: as ``read_squad`` returns them.
        tokenizer: a transformers tokenizer of the fast kind.
        max_seq_length: tokens of a whole window, special ones included; lowered to the tokenizer's own limit.
        doc_stride: tokens of the text from one window's start to the next.
        max_query_length: tokens of the question.
        with_text: also say which characters the tokens stand for, as ``find_answers`` needs; the windows are then
            sorted, longest first, so that batches need little padding.
        cache_dir: where the windows are kept; None for the default of ``datasets``.
        overwrite_cache: tokenise again even if the cache has them.
        name: of the split, for the cache.

    Returns:
        One row per window, not padded: ``input_ids``, ``token_type_ids`` if the model reads them, ``start_positions``
        and ``end_positions`` (tokens of the first answer; both that of the null answer where the window lacks it).
        With text also ``example`` (row of the question), ``null`` (position of the null answer), ``first`` (position
        of the text's first token), ``starts`` and ``ends`` (the characters of the context that each token of the
        text begins and ends at), and ``most_context`` (1 for tokens that no other window shows with more context, see
        :func:`most_context`).

    Raises:
        HeadPruningError: the tokenizer is not of the fast kind, the lengths leave no room for text, or the cache
            cannot be written.
    """
    if not tokenizer.is_fast:
        raise HeadPruningError(
            f"{type(tokenizer).__name__} cannot tell where in the text its tokens stand; choose a model with a "
            f"tokenizer.json (a fast tokenizer)."
        )
    length = _usable_length(tokenizer, max_seq_length, max_query_length)
    settings: dict[str, Any] = {"length": length, "doc_stride": doc_stride, "max_query_length": max_query_length}
    with_types = "token_type_ids" in tokenizer.model_input_names
    columns = _columns(with_types, with_text)
    # A copy, because the tokenizer may have been saved with a length or a padding of its own.
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    work: Any = partial(
        _windows, backend=backend, null=tokenizer.cls_token_id, with_types=with_types, with_text=with_text, **settings
    )
    features = through_cache(
        rows,
        work,
        *(tokenizer, settings, columns),
        folder="squad-tokenised",
        name=name,
        what=f"SQuAD {name}",
        cache_dir=cache_dir,
        overwrite=overwrite_cache,
        with_indices=True,
        remove_columns=rows.column_names,
        features=columns,
    )
    if with_text:
        lengths = np.diff(ragged(features, "input_ids")[1])
        features = features.select(np.argsort(-lengths, kind="stable"))
    return features


def ragged(features: Dataset, column: str) -> tuple[np.ndarray, np.ndarray]:
    """A column of lists as one array of all values, and the offsets (rows + 1) at which each row begins."""
    lists = features.select_columns([column]).with_format("arrow")[:][column].combine_chunks()
    return lists.flatten().to_numpy(), np.concatenate([[0], np.cumsum(lists.value_lengths().to_numpy())])


def _columns(with_types: bool, with_text: bool) -> Features:
    number, numbers = Value("int32"), [Value("int32")]
    columns: dict[str, Any] = {"input_ids": numbers}
    if with_types:
        columns["token_type_ids"] = [Value("int8")]
    columns |= {"start_positions": number, "end_positions": number}
    if with_text:
        columns |= dict(zip(TEXT_COLUMNS, [number, number, number, numbers, numbers, [Value("int8")]], strict=True))
    return Features(columns)


def _windows(
    batch: dict[str, list],
    rows: list[int],
    *,
    backend: Any,
    null: "int | None",
    length: int,
    doc_stride: int,
    max_query_length: int,
    with_types: bool,
    with_text: bool,
) -> dict[str, list]:
    """The windows of a batch of questions, as columns."""
    texts = list(dict.fromkeys(batch["context"]))  # several questions share a text
    encoded = dict(zip(texts, backend.encode_batch(texts, add_special_tokens=False)))
    # Some questions of SQuAD begin with many spaces.
    questions = backend.encode_batch([question.strip() for question in batch["question"]], add_special_tokens=False)
    columns: dict[str, list] = {name: [] for name in _columns(with_types, with_text)}
    for i, question in enumerate(questions):
        text = encoded[batch["context"][i]]
        starts, ends = (list(side) for side in zip(*text.offsets)) if text.offsets else ([], [])
        question.truncate(max_query_length)
        pair = backend.post_process(question, text, True)
        first = pair.sequence_ids.index(1) if starts else len(pair.ids)
        after = first + len(starts)
        room = length - (len(pair.ids) - len(starts))
        answer = _answer_tokens(batch, i, starts, ends)
        begins = _begins(len(starts), room, min(doc_stride, room))
        owners = (
            most_context([(begin, min(begin + room, len(starts))) for begin in begins]) if with_text else np.zeros(0)
        )
        for number, begin in enumerate(begins):
            stop = min(begin + room, len(starts))
            part = slice(first + begin, first + stop)

            def window(values: list[int], part: slice = part, first: int = first, after: int = after) -> list[int]:
                return values[:first] + values[part] + values[after:]

            ids = window(pair.ids)
            nothing = ids.index(null) if null in ids else 0
            inside = answer is not None and begin <= answer[0] and answer[1] < stop
            columns["input_ids"].append(ids)
            if with_types:
                columns["token_type_ids"].append(window(pair.type_ids))
            columns["start_positions"].append(first + answer[0] - begin if answer and inside else nothing)
            columns["end_positions"].append(first + answer[1] - begin if answer and inside else nothing)
            if with_text:
                columns["example"].append(rows[i])
                columns["null"].append(nothing)
                columns["first"].append(first)
                columns["starts"].append(starts[begin:stop])
                columns["ends"].append(ends[begin:stop])
                columns["most_context"].append((owners[begin:stop] == number).astype(np.int8))
    return columns


def most_context(windows: Sequence[tuple[int, int]]) -> np.ndarray:
    """For each token the window that shows it with the most context, as in the published script.

    That is the smaller of the tokens to its left and to its right in the window, plus a hundredth of the window's
    length; of equals the first.

    Args:
        windows: first token, and the token after the last, of each; in order and without gaps.

    Returns:
        ``int64[tokens]``: numbers of windows.
    """
    owners = np.zeros(max(stop for _, stop in windows), dtype=np.int64)
    best = np.full(len(owners), -1.0)
    for number, (begin, stop) in enumerate(windows):
        place = np.arange(stop - begin)
        context = np.minimum(place, place[::-1]) + 0.01 * len(place)
        more = context > best[begin:stop]
        owners[begin:stop][more] = number
        best[begin:stop][more] = context[more]
    return owners


def _begins(tokens: int, room: int, step: int) -> range:
    """Where windows of ``room`` tokens begin, until one holds the last token."""
    more = max(0, tokens - room)
    return range(0, -(-more // step) * step + 1, step)


def _answer_tokens(batch: dict[str, list], i: int, starts: list[int], ends: list[int]) -> "tuple[int, int] | None":
    """The first and last token of a text that touch its first answer; None if there is no answer."""
    if not batch["answers"][i]:
        return None
    begin = batch["starts"][i][0]
    end = begin + len(batch["answers"][i][0])
    first, last = int(np.searchsorted(ends, begin, side="right")), int(np.searchsorted(starts, end, side="left")) - 1
    return (first, last) if first <= last else None


def _usable_length(tokenizer: Any, wanted: int, max_query_length: int) -> int:
    """``wanted``, or the tokenizer's limit if that is lower."""
    length = usable_length(tokenizer, wanted)
    least = max_query_length + tokenizer.num_special_tokens_to_add(pair=True) + 1
    if length < least:
        raise HeadPruningError(
            f"A window of {length} tokens has no room for text beside a question of {max_query_length} and the "
            f"special tokens; raise --max_seq_length to {least} or more, or lower --max_query_length."
        )
    return length
