"""Documents to pairs of segments for masked language modelling with next-sentence prediction (BERT, section A.2).

A document is a list of sentences, a sentence a list of token numbers. Sentences are collected until they fill a pair;
the pair is cut between two of them, and its second part is either what follows or, labelled so, the beginning of
another document's part. What a random second part leaves unused is put back. Some documents are kept back for
validation; other ones are taken from among them, and never for them, so that no sentence is in both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from prepare.files import PrepareError

#: Documents that a random second part may come from: those of one batch.
BATCH = 1000
# Batches of fewer are joined to the one before.
_LEAST = 10


@dataclass(frozen=True)
class PairOptions:
    """What pairs look like.

    ``max_length``: tokens of a pair, special ones included. ``specials``: how many of these there are.
    ``short_probability``: share of pairs that aim at a random shorter length. ``random_probability``: share of pairs
    whose second part is random. ``seed``: of all draws. ``validation_percentage``: of the documents, how many are kept
    back, see :func:`kept_back`.
    """

    max_length: int = 512
    specials: int = 3
    short_probability: float = 0.1
    random_probability: float = 0.5
    seed: int = 42
    validation_percentage: float = 5.0


@dataclass(frozen=True)
class Plan:
    """Which sentences a pair is made of.

    ``first``: document, first sentence, and the sentence after the last. ``second``: the same. ``random``: whether
    the second part does not follow the first.
    """

    first: tuple[int, int, int]
    second: tuple[int, int, int]
    random: bool


@dataclass(frozen=True)
class Pair:
    """Two segments, without special tokens, whether the second does not follow the first, and whether both are of
    documents that are kept back.
    """

    first: list[int]
    second: list[int]
    random: bool
    validation: bool = False


def plan_pairs(lengths: Sequence[Sequence[int]], options: PairOptions, draw: np.random.Generator) -> Iterator[Plan]:
    """Pairs for one batch of documents, in a random order of the documents.

    Every sentence is in a first part, or in a second one that follows its first, exactly once. A pair of a single
    sentence has nothing that follows, so its second part is random even where that was not drawn; the next drawn
    random one is then not, so that the shares come out as asked for.

    ``lengths``: tokens of each sentence of each document; two documents or more, none of them empty. ``draw``: it
    alone decides.
    """
    owed, most = 0, options.max_length - options.specials
    for document in draw.permutation(len(lengths)).tolist():
        mine, begin = lengths[document], 0
        while begin < len(mine):
            target = most if draw.random() >= options.short_probability else int(draw.integers(2, most + 1))
            end, total = begin + 1, mine[begin]
            while end < len(mine) and total < target:
                total += mine[end]
                end += 1
            middle = begin + (int(draw.integers(1, end - begin)) if end - begin > 1 else 1)
            random, can_follow = bool(draw.random() < options.random_probability), end - begin > 1
            if not random and not can_follow:
                random, owed = True, owed + 1
            elif random and can_follow and owed:
                random, owed = False, owed - 1
            if not random:
                yield Plan((document, begin, middle), (document, middle, end), False)
                begin = end
                continue
            other = int(draw.integers(len(lengths) - 1))
            other += other >= document
            start = int(draw.integers(len(lengths[other])))
            stop, room = start + 1, target - sum(mine[begin:middle]) - lengths[other][start]
            while stop < len(lengths[other]) and room > 0:
                room -= lengths[other][stop]
                stop += 1
            yield Plan((document, begin, middle), (other, start, stop), True)
            begin = middle


def shortened(first: list[int], second: list[int], most: int) -> tuple[list[int], list[int]]:
    """Both cut to ``most`` tokens together, the longer one first, from their ends."""
    over = len(first) + len(second) - most
    if over <= 0:
        return first, second
    longer, gap = max(len(first), len(second)), abs(len(first) - len(second))
    cut = min(over, gap)
    sizes = [min(len(each), longer - cut) for each in (first, second)]
    left = over - cut
    return first[: sizes[0] - left // 2], second[: sizes[1] - (left - left // 2)]


def pairs_of(
    documents: Sequence[Sequence[list[int]]], options: PairOptions, draw: np.random.Generator
) -> Iterator[Pair]:
    """The pairs of one batch of documents, see :func:`plan_pairs`."""
    lengths = [[len(sentence) for sentence in document] for document in documents]
    for plan in plan_pairs(lengths, options, draw):
        parts = [[t for sentence in documents[d][i:j] for t in sentence] for d, i, j in (plan.first, plan.second)]
        yield Pair(*shortened(*parts, options.max_length - options.specials), plan.random)


def batches(documents: Iterator[list[list[int]]], size: int = BATCH) -> Iterator[list[list[list[int]]]]:
    """Documents in batches of ``size``, the last of which may be smaller, or a little larger than that."""
    waiting: list[list[list[int]]] = []
    for document in documents:
        waiting.append(document)
        if len(waiting) == size + _LEAST:
            yield waiting[:size]
            waiting = waiting[size:]
    if waiting:
        yield waiting


def kept_back(documents: int, percentage: float) -> int:
    """How many of a batch's documents are kept back: where any are, two or more, as each needs another one, and so are
    those that are left.
    """
    wanted = round(documents * percentage / 100)
    return max(2, min(wanted, documents - 2)) if percentage and documents >= 4 else 0


def pairs_of_shard(documents: Iterator[list[list[int]]], options: PairOptions, shard: int) -> Iterator[Pair]:
    """The pairs of a shard's documents; they follow from the documents, the options and the shard's number alone.

    PrepareError where there is one only.
    """
    draw = np.random.default_rng([options.seed, shard])
    for batch in batches(documents):
        if len(batch) < 2:
            raise PrepareError(
                f"Shard {shard} has one document, so none is another; give fewer --shards, and in text a blank line "
                "between documents."
            )
        back = kept_back(len(batch), options.validation_percentage)
        chosen = set(draw.permutation(len(batch))[:back].tolist()) if back else set()
        for validation in (False, True):
            part = [document for i, document in enumerate(batch) if (i in chosen) == validation]
            if part:
                yield from (replace(pair, validation=validation) for pair in pairs_of(part, options, draw))
