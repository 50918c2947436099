"""Inputs of the right shape for a fairseq model, made of random tokens."""

from typing import Optional

import torch
from fairseq.models import BaseFairseqModel, FairseqEncoderDecoderModel

from head_pruning import HeadPruningError

SPECIALS = 4  # what every dictionary begins with: <s>, <pad>, </s>, <unk>


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
        HeadPruningError: the model reads something else.
    """
    parts = [getattr(model, part) for part in ("encoder", "decoder") if hasattr(model, part)]
    dictionaries = [getattr(part, "dictionary", None) for part in parts]
    if not dictionaries or any(words is None for words in dictionaries):
        raise HeadPruningError(f"It is not known what {type(model).__name__} reads; models of written language are.")
    known, pad = min(map(len, dictionaries)), dictionaries[0].pad()
    target_length = length if target_length is None else target_length
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.randint(SPECIALS, known, (batch, n), generator=generator) for n in (length, target_length))
    translates = isinstance(model, FairseqEncoderDecoderModel)
    if padded:
        gone = length // 3
        source[::2, slice(0, gone) if translates else slice(length - gone, length)] = pad
        target[1::2, target_length - target_length // 3 :] = pad
    if not translates:
        return {"src_tokens": source}
    return {"src_tokens": source, "src_lengths": source.ne(pad).sum(1), "prev_output_tokens": target}
