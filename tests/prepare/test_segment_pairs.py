"""Pairs of segments: properties that hold for all documents, and the shares of labels."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prepare.files import PrepareError
from prepare.segment_pairs import PairOptions, batches, pairs_of, pairs_of_shard, plan_pairs, shortened

DOCUMENTS = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=6), min_size=2, max_size=5)
OPTIONS = st.builds(
    PairOptions,
    max_length=st.integers(6, 40),
    short_probability=st.sampled_from([0.0, 0.1, 1.0]),
    random_probability=st.sampled_from([0.0, 0.5, 1.0]),
)


def documents_of(lengths):
    """Documents of these lengths in which every token is another."""
    numbers = itertools.count(1)
    return [[[next(numbers) for _ in range(length)] for length in document] for document in lengths]


@settings(max_examples=25)
@given(DOCUMENTS, OPTIONS, st.integers(0, 2**32 - 1))
def test_every_sentence_is_used_once_and_next_means_next(lengths, options, seed):
    used, plans = [], list(plan_pairs(lengths, options, np.random.default_rng(seed)))
    for plan in plans:
        document, begin, end = plan.first
        assert begin < end
        used += [(document, i) for i in range(begin, end)]
        other, start, stop = plan.second
        assert start < stop <= len(lengths[other])
        if plan.random:
            assert other != document
        else:
            assert (other, start) == (document, end)
            used += [(document, i) for i in range(start, stop)]
    assert sorted(used) == [(d, i) for d, document in enumerate(lengths) for i in range(len(document))]


@settings(max_examples=25)
@given(DOCUMENTS, OPTIONS, st.integers(0, 2**32 - 1))
def test_pairs_are_within_the_limit_and_cross_documents_only_where_labelled_so(lengths, options, seed):
    documents = documents_of(lengths)
    home = {t: d for d, document in enumerate(documents) for sentence in document for t in sentence}
    for pair in pairs_of(documents, options, np.random.default_rng(seed)):
        assert pair.first and pair.second
        assert len(pair.first) + len(pair.second) <= options.max_length - options.specials
        owners = [{home[t] for t in part} for part in (pair.first, pair.second)]
        assert len(owners[0]) == len(owners[1]) == 1 and (owners[0] != owners[1]) == pair.random


@settings(max_examples=25)
@given(st.lists(DOCUMENTS, min_size=1, max_size=4), OPTIONS, st.sampled_from([0.0, 0.1, 5.0, 50.0, 99.0]))
def test_no_document_is_trained_on_and_validated_with(batches, options, percentage):
    documents = documents_of([document for batch in batches for document in batch])
    home = {t: d for d, document in enumerate(documents) for sentence in document for t in sentence}
    options = dataclasses.replace(options, max_length=10**6, validation_percentage=percentage)
    owners = {False: set(), True: set()}
    for pair in pairs_of_shard(iter(documents), options, 0):
        owners[pair.validation].update(home[t] for t in (*pair.first, *pair.second))
    assert not owners[False] & owners[True] and owners[False] | owners[True] == set(range(len(documents)))
    enough = percentage and len(documents) >= 4
    assert len(owners[False]) >= 2 and (len(owners[True]) >= 2 if enough else not owners[True])
    if enough:
        assert abs(len(owners[True]) - percentage / 100 * len(documents)) <= 2


@settings(max_examples=25)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(2, 40))
def test_the_longer_part_is_shortened_first(a, b, most):
    first, second = shortened(list(range(a)), list(range(b)), most)
    x, y = a, b
    while x + y > most:  # as a tokenizer does it, one token after the other
        x, y = (x - 1, y) if x > y else (x, y - 1)
    assert sorted((len(first), len(second))) == sorted((x, y))
    assert first == list(range(len(first))) and second == list(range(len(second)))


@settings(max_examples=25)
@given(st.integers(0, 65), st.integers(2, 25))
def test_batches_keep_all_documents_and_none_is_alone(number, size):
    documents = [[[i]] for i in range(number)]
    found = list(batches(iter(documents), size))
    assert [d for batch in found for d in batch] == documents
    assert all(len(batch) >= min(number, size, 2) for batch in found)


def test_a_shard_depends_on_the_seed_and_its_number_only():
    documents = documents_of([[5, 6, 7, 8] * 3] * 40)
    streams = [
        list(pairs_of_shard(iter(documents), PairOptions(max_length=32, seed=seed), shard))
        for seed, shard in ((1, 0), (1, 0), (1, 1), (2, 0))
    ]
    assert streams[0] == streams[1] and streams[0] not in streams[2:]


def test_half_of_the_pairs_are_random():
    draw = np.random.default_rng(3)
    lengths = [draw.integers(3, 40, size=draw.integers(1, 30)).tolist() for _ in range(1000)]
    plans = list(plan_pairs(lengths, PairOptions(max_length=128), np.random.default_rng(4)))
    share = np.mean([plan.random for plan in plans])
    assert abs(share - 0.5) < 3 * 0.5 / len(plans) ** 0.5


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("max23_short0.0_nsp0.0", PairOptions(max_length=23, short_probability=0.0, random_probability=0.0)),
        ("max23_short0.0_nsp1.0", PairOptions(max_length=23, short_probability=0.0, random_probability=1.0)),
    ],
)
def test_pairs_are_as_many_as_the_published_code_makes(reference, case, options):
    path = reference / "pruneofa" / "segment_pair_nsp.json"
    if not path.is_file():
        pytest.skip(f"there are no recorded pairs in {path}")
    recorded = json.loads(path.read_text(encoding="utf-8"))
    lengths, theirs = [[len(s) for s in document] for document in recorded["docs"]], recorded["stats"][case]
    runs = [list(plan_pairs(lengths, options, np.random.default_rng(seed))) for seed in range(200)]
    plans = [plan for run in runs for plan in run]
    assert len(plans) == pytest.approx(theirs["instances"], rel=0.01 * options.random_probability)
    assert np.mean([plan.random for plan in plans]) == pytest.approx(theirs["random_fraction"], rel=1e-9)
    spans = [(lengths[d][i:j], lengths[e][k:m]) for d, i, j, e, k, m in ((*p.first, *p.second) for p in plans)]
    assert np.mean([sum(a) + sum(b) for a, b in spans]) == pytest.approx(theirs["len_mean"], rel=0.01)


def test_a_shard_of_one_document_is_refused():
    with pytest.raises(PrepareError, match="fewer --shards"):
        list(pairs_of_shard(iter([[[1], [2]]]), PairOptions(), 3))
