"""Batches of segment pairs with masked words; what is masked follows from the seed, the epoch and the pair's number.

So a resumed run masks what one never stopped would have, whatever was read ahead when it stopped.
"""

from dataclasses import dataclass
from typing import Any, Optional, Sequence

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainerCallback

from head_pruning import HeadPruningError

IGNORED = -100
# Of the masked words, the shares that become the mask, and any word (Devlin et al. 2019, section 3.1).
_MASK, _ANY = 0.8, 0.1


class Pairs(torch.utils.data.Dataset):
    """Segment pairs with their numbers.

    Args:
        table: of :func:`hf_plugin.pretraining.folder.open_pairs`, or a part of it.
        changing: whether other words are masked in every epoch, as in training.
    """

    def __init__(self, table: Dataset, *, changing: bool = False) -> None:
        self.table, self.changing = table.with_format("numpy"), changing
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # also for workers that were started before

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return {**self.table[place], "draw": (int(self.changing), int(self._epoch), place)}

    def enter_epoch(self, epoch: int) -> None:
        """The pairs from now on are of this epoch."""
        self._epoch.fill_(epoch if self.changing else 0)


class EpochTold(TrainerCallback):
    """Tells the training pairs of the epoch, also of one that is resumed in its middle."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs

    def on_epoch_begin(self, args, state, control, **kwargs):
        """An epoch begins, or goes on."""
        self.pairs.enter_epoch(int((state.epoch or 0) + 1e-6))


@dataclass(frozen=True)
class Template:
    """Where a tokenizer puts special tokens around two segments, and the types of all tokens.

    Args:
        parts: the special tokens before, between and after the segments.
        types: of those, and of each segment's tokens.
    """

    parts: tuple[list[int], list[int], list[int]]
    types: tuple[list[int], int, list[int], int, list[int]]

    @classmethod
    def of(cls, tokenizer: Any) -> "Template":
        """That of a tokenizer, read off two short texts."""
        found = tokenizer("a", "a", return_token_type_ids=True)
        owners, ids, types = found.sequence_ids(), found["input_ids"], found["token_type_ids"]
        first, second = owners.index(0), owners.index(1)
        ends = (first + owners.count(0), second + owners.count(1))
        spans = ((0, first), (ends[0], second), (ends[1], len(ids)))
        parts = [ids[begin:end] for begin, end in spans]
        a, b, c = (types[begin:end] for begin, end in spans)
        return cls((parts[0], parts[1], parts[2]), (a, types[first], b, types[second], c))

    def fill(self, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, types, and whether each is a word's, ``[tokens]`` each."""
        begin, middle, end = self.parts
        ids = np.concatenate([begin, first, middle, second, end]).astype(np.int64)
        a, of_first, b, of_second, c = self.types
        types = np.array([*a, *[of_first] * len(first), *b, *[of_second] * len(second), *c], dtype=np.int64)
        words = np.zeros(len(ids), dtype=bool)
        words[len(begin) : len(begin) + len(first)] = True
        words[len(ids) - len(end) - len(second) : len(ids) - len(end)] = True
        return ids, types, words


def word_starts(tokenizer: Any) -> np.ndarray:
    """``bool[vocabulary]``: whether a token begins a word.

    Raises:
        HeadPruningError: the vocabulary does not tell.
    """
    vocabulary = tokenizer.get_vocab()
    starts = np.zeros(max(vocabulary.values()) + 1, dtype=bool)
    # Some tokens of byte-level vocabularies begin with ## too: that of most tells.
    marks = {mark: sum(token.startswith(mark) for token in vocabulary) for mark in ("##", "\u0120", "\u2581")}
    mark = max(marks, key=lambda each: marks[each])
    if not marks[mark]:
        raise HeadPruningError(
            "--whole_word_mask needs a vocabulary that marks where words begin, which this tokenizer's does not; drop "
            "it."
        )
    for token, number in vocabulary.items():
        starts[number] = token.startswith(mark) != (mark == "##")
    return starts


class Masker:
    """Makes a batch of pairs, with some words masked.

    The batch has ``input_ids``, ``attention_mask`` and ``labels`` (:data:`IGNORED` where nothing is masked), all
    ``[B, T]``, ``label_rows`` (``int64[M]``, the places of the masked words in the flattened batch, so that no device
    is asked for them), and, where the model takes them, ``token_type_ids`` ``[B, T]`` and ``next_sentence_label``
    ``[B]`` (0: the second segment follows, 1: it is random).

    Args:
        tokenizer: whose mask and padding token are used.
        takes: what the model's ``forward`` takes.
        seed: of what is masked.
        probability: share of the words that are masked.
        whole_words: mask whole words, not single tokens.
        multiple: pad to a multiple of so many tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        takes: Sequence[str],
        *,
        seed: int,
        probability: float = 0.15,
        whole_words: bool = False,
        multiple: int = 1,
    ) -> None:
        if tokenizer.mask_token_id is None:
            raise HeadPruningError(
                f"The tokenizer of {tokenizer.name_or_path} has no mask token; take that of a masked language model."
            )
        self.mask, self.padding, self.words = tokenizer.mask_token_id, tokenizer.pad_token_id, len(tokenizer)
        self.template, self.takes = Template.of(tokenizer), frozenset(takes)
        self.seed, self.probability, self.multiple = seed, probability, multiple
        self.starts: Optional[np.ndarray] = word_starts(tokenizer) if whole_words else None

    def masked(self, ids: np.ndarray, words: np.ndarray, draw: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """What the model reads of a pair, and where it is asked for what was there, ``[tokens]`` each."""
        numbers = np.random.default_rng([self.seed, *draw]).random((3, len(ids)))
        chosen = numbers[0]
        if self.starts is not None:
            begins = self.starts[ids] | np.diff(words, prepend=False)
            chosen = chosen[np.maximum.accumulate(np.where(begins, np.arange(len(ids)), 0))]
        asked = words & (chosen < self.probability)
        shown = np.where(asked & (numbers[1] < _MASK), self.mask, ids)
        other = asked & (numbers[1] >= _MASK) & (numbers[1] < _MASK + _ANY)
        return np.where(other, (numbers[2] * self.words).astype(np.int64), shown), asked

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pairs = [self.template.fill(example["first"], example["second"]) for example in examples]
        longest = max(len(ids) for ids, _, _ in pairs)
        shape = len(pairs), -(-longest // self.multiple) * self.multiple
        batch: dict[str, np.ndarray] = {
            "input_ids": np.full(shape, self.padding, dtype=np.int64),
            "attention_mask": np.zeros(shape, dtype=np.int64),
            "token_type_ids": np.zeros(shape, dtype=np.int64),
            "labels": np.full(shape, IGNORED, dtype=np.int64),
        }
        for i, ((ids, types, words), example) in enumerate(zip(pairs, examples)):
            shown, asked = self.masked(ids, words, example["draw"])
            batch["input_ids"][i, : len(ids)], batch["token_type_ids"][i, : len(ids)] = shown, types
            batch["attention_mask"][i, : len(ids)] = 1
            batch["labels"][i, : len(ids)][asked] = ids[asked]
        batch["label_rows"] = np.flatnonzero(batch["labels"] != IGNORED)
        batch["next_sentence_label"] = np.array([int(example["random"]) for example in examples])
        optional = {"token_type_ids", "next_sentence_label"} - self.takes
        return {name: torch.from_numpy(value) for name, value in batch.items() if name not in optional}
