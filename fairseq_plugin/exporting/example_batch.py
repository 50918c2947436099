"""Inputs of the right shape for a fairseq model, made of random tokens."""

from typing import Any, Optional

import torch
from fairseq.models import BaseFairseqModel, FairseqEncoderDecoderModel

from head_pruning import HeadPruningError

SPECIALS = 4  # what every dictionary begins with: <s>, <pad>, </s>, <unk>


def positions(model: BaseFairseqModel) -> tuple[Optional[int], ...]:
    """How many tokens of the source, or of the text, and of the target a model has positions for; None: any number."""
    found: Any = model.max_positions()
    source, target = found if isinstance(found, tuple) else (found, found)
    # Models of several languages have a limit for each, by name, and fairseq's base classes a million as a float.
    return tuple(int(limit) if isinstance(limit, (int, float)) else None for limit in (source, target))


def longest(model: BaseFairseqModel) -> Optional[int]:
    """The tokens that :func:`example` can make of source and target alike; None: any number."""
    return min((limit for limit in positions(model) if limit is not None), default=None)


def _check_lengths(model: BaseFairseqModel, *lengths: int) -> None:
    for length, limit in zip(lengths, positions(model)):
        if limit is not None and length > limit:
            raise HeadPruningError(f"The model has {limit} positions; --length {length} is more, give less.")


def example(
    model: BaseFairseqModel, batch: int, length: int, target_length: Optional[int] = None, *, padded: bool = False
) -> dict[str, torch.Tensor]:
    """Arguments of one forward pass, of a translation model with the target known; the same on every call.

    Args:
        model: reads tokens.
        batch: sentences.
        length: tokens of the source, or of the text.
        target_length: tokens of the target; default: as many as the source.
        padded: whether every second sentence is shorter than the batch: sources on the left, as fairseq pads them,
            other texts on the right.

    Returns:
        ``src_tokens`` ``[batch, length]``, and for a translation model ``src_lengths`` ``[batch]`` and
        ``prev_output_tokens`` ``[batch, target_length]``, all int64.

    Raises:
        HeadPruningError: the model reads something else, or not so many tokens.
    """
    parts = [getattr(model, part) for part in ("encoder", "decoder") if hasattr(model, part)]
    dictionaries: list[Any] = [getattr(part, "dictionary", None) for part in parts]
    if not dictionaries or any(words is None for words in dictionaries):
        raise HeadPruningError(f"It is not known what {type(model).__name__} reads; models of written language are.")
    known, pad = min(map(len, dictionaries)), dictionaries[0].pad()
    target_length = length if target_length is None else target_length
    translates = isinstance(model, FairseqEncoderDecoderModel)
    _check_lengths(model, length, *[target_length] * translates)
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.randint(SPECIALS, known, (batch, n), generator=generator) for n in (length, target_length))
    if padded:
        gone = length // 3
        source[::2, slice(0, gone) if translates else slice(length - gone, length)] = pad
        target[1::2, target_length - target_length // 3 :] = pad
    if not translates:
        return {"src_tokens": source}
    return {"src_tokens": source, "src_lengths": source.ne(pad).sum(1), "prev_output_tokens": target}
