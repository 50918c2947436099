"""Which weights stay: thresholds exact to the bit, N:M patterns, blocks."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from head_pruning import HeadPruningError
from head_pruning.weights.engine.portions import cut_into_portions
from head_pruning.weights.engine.selection import (
    Selection,
    bracketed,
    expand_blocks,
    kth_smallest,
    n_of_m,
    pool_blocks,
)

few = st.sampled_from([0.0, 1e-45, 1e-38, 0.5, 0.5000001, 1.0, 1e30, math.inf])
positive = st.one_of(few, st.floats(0, width=32))
signed = st.one_of(few, few.map(lambda x: -x), st.floats(allow_nan=False, width=32))


def split(values: list[float], parts: int) -> list[list[torch.Tensor]]:
    """The values as float32 tensors, two to a portion."""
    tensors = [torch.from_numpy(x) for x in np.array_split(np.array(values, dtype=np.float32), parts) if x.size]
    return [tensors[i : i + 2] for i in range(0, len(tensors), 2)]


def numbered(number: int) -> SimpleNamespace:
    """What stands for a portion on the CPU."""
    return SimpleNamespace(number=number, device=torch.device("cpu"))


def check(found, values: list[float], k: int) -> None:
    every = torch.tensor(values, dtype=torch.float32)
    exact = every.kthvalue(k).values
    assert float(found.value) == float(exact)
    assert int(found.below) == int((every < exact).sum()) and int(found.equal) == int((every == exact).sum())


@given(st.lists(positive, min_size=1, max_size=60), st.data())
def test_radix_selection_equals_kthvalue(values, data):
    k = data.draw(st.integers(1, len(values)))
    portions = split(values, data.draw(st.integers(1, 7)))
    check(kth_smallest(lambda: portions, k), values, k)


@given(st.lists(signed, min_size=1, max_size=60), st.data())
def test_radix_selection_of_signed_scores(values, data):
    values = [value + 0.0 for value in values]  # the bit patterns of 0.0 and -0.0 differ
    k = data.draw(st.integers(1, len(values)))
    portions = split(values, data.draw(st.integers(1, 7)))
    check(kth_smallest(lambda: portions, k, signed=True), values, k)


@given(st.lists(signed, min_size=1, max_size=80), st.data())
def test_a_bracket_finds_the_same_or_says_that_it_missed(values, data):
    """Whatever the sample is; one of all values always hits."""
    k = data.draw(st.integers(1, len(values)))
    portions = split(values, data.draw(st.integers(1, 5)))
    some = data.draw(st.lists(st.sampled_from(values), min_size=1, max_size=20))
    for sample, may_miss in ((some, True), (values, False)):
        visits: dict = {}

        def visit(portion, taken, low, between, visits=visits):
            visits[portion.number] = low, between

        found = bracketed(
            np.array(sample, dtype=np.float32),
            [numbered(i) for i in range(len(portions))],
            lambda portion, portions=portions: portions[portion.number],
            k,
            len(values),
            visit,
        )
        assert len(visits) == len(portions)
        assert may_miss or found is not None
        if found is not None:
            check(found, values, k)
            for tensors, (low, between) in zip(portions, (visits[i] for i in range(len(portions)))):
                for score, (places, scores) in zip(tensors, between):
                    assert np.array_equal(score.numpy()[places], scores) and not (scores < low).any()


def test_a_bracket_around_a_large_set_holds_few():
    scores = torch.rand(1 << 20, generator=torch.Generator().manual_seed(0)).square()
    held = []
    k = int(scores.numel() * 0.9)
    found = bracketed(
        scores[::31].numpy(),
        [numbered(0)],
        lambda portion: [scores],
        k,
        scores.numel(),
        lambda portion, taken, low, between: held.append(between[0][0].size),
    )
    check(found, scores.tolist(), k)
    assert held[0] < 0.03 * scores.numel()


@given(st.integers(1, 8), st.data())
def test_n_of_m_keeps_the_highest_of_each_group(size, data):
    groups = data.draw(st.integers(1, 5))
    scores = data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0]), min_size=groups * size, max_size=groups * size))
    prune = data.draw(st.integers(0, size))
    keep = n_of_m(torch.tensor(scores).view(groups, size), prune, size)
    for group, kept in zip(np.reshape(scores, (groups, size)), keep.numpy()):
        order = np.argsort(group, kind="stable")
        assert np.array_equal(~kept, np.isin(np.arange(size), order[:prune]))


@pytest.mark.parametrize("size", [256, 257, 512])
def test_n_of_many(size):
    scores = torch.rand(3, size, generator=torch.Generator().manual_seed(0)).mul(64).round()  # with ties
    for prune in (0, 1, 200, size - 1):
        keep = n_of_m(scores, prune, size)
        assert keep.sum(1).tolist() == [size - prune] * 3
        assert torch.equal(
            ~keep, torch.zeros_like(keep).scatter(1, scores.argsort(dim=1, stable=True)[:, :prune], True)
        )


@pytest.mark.parametrize("pooling, value", [("avg", 2.5), ("max", 6.0)])
def test_blocks_are_pooled_and_expanded(pooling, value):
    score = torch.tensor([[0.0, 1.0, 5.0, 5.0], [3.0, 6.0, 5.0, 5.0]])
    pooled = pool_blocks(score, (2, 2), pooling)
    assert pooled.tolist() == [[value, 5.0]]
    assert expand_blocks(pooled > 4.0, (2, 2)).tolist() == [[value > 4.0] * 2 + [True] * 2] * 2


@pytest.mark.parametrize("text, scope, keep, size", [
    ("global", "global", 0, ()), ("tensor", "tensor", 0, ()), ("2:4", "pattern", 2, (4,)), ("4x8", "block", 0, (4, 8)),
])  # fmt: skip
def test_selections_are_read(text, scope, keep, size):
    assert Selection.parse(text) == Selection(scope, keep, size)


@pytest.mark.parametrize("text", ["4:4", "0:2", "0x4", "layer", "2:", ""])
def test_other_selections_are_refused(text):
    with pytest.raises(HeadPruningError, match="--weight-selection is .*give global, tensor"):
        Selection.parse(text)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=6), st.integers(1, 20))
def test_portions_cover_every_weight_once(shapes, limit):
    from head_pruning.weights.engine import portions as pieces

    before, pieces.CPU_PORTION = pieces.CPU_PORTION, limit
    try:
        tensors = [torch.zeros(shape) for shape in shapes]
        for portion in cut_into_portions(tensors):
            views = portion.cut(tensors)
            assert sum(view.numel() for view in views) <= max(limit, max(width for _, width in shapes))
            portion.values = views
            assert [x.shape for x in portion.scratch()] == [view.shape for view in views]
            for view in views:
                view.add_(1)
        assert all((tensor == 1).all() for tensor in tensors)
    finally:
        pieces.CPU_PORTION = before
