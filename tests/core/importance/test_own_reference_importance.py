"""Michel's importance and its rounds against the published mathematics written once more (tests/reference)."""

import numpy as np
import pytest

from head_pruning import HeadMask, full_mask
from head_pruning.gates import GateBank
from head_pruning.importance import ImportanceAccumulator, normalize_importance, pruning_rounds
from tests.core.gates.test_own_reference_gates import drawn_batch, drawn_bert, own_loss
from tests.reference import heads as own

BATCHES = [drawn_batch(seed) for seed in range(3)]
PARTLY = np.array([[1, 0, 1], [0, 1, 1]], dtype=float)


def measured(found, gates, mask: HeadMask, signed: bool = False) -> np.ndarray:
    with ImportanceAccumulator(gates, signed=signed).probing(mask) as accumulator:
        for batch in BATCHES:
            found.loss(batch)[0].backward()
            accumulator.add()
    return accumulator.scores()


@pytest.fixture(scope="module")
def found():
    bert = drawn_bert()
    bert.gates = GateBank(bert.model, bert.unit_map)
    bert.gates.attach()
    return bert


def by_hand(found, mask: np.ndarray, signed: bool = False) -> np.ndarray:
    return own.importance(lambda batch, xi: own_loss(found.state, batch, xi), BATCHES, mask, signed)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("mask", [np.ones((2, 3)), PARTLY], ids=["all", "some"])
def test_importance(found, mask, signed):
    expected = by_hand(found, mask, signed)
    ours = measured(found, found.gates, HeadMask(found.unit_map, mask.reshape(-1)), signed)
    np.testing.assert_allclose(ours, expected.reshape(-1), rtol=0, atol=2e-6 * np.abs(expected).max())
    assert np.ptp(expected) > 0.1 * np.abs(expected).max()
    for options in ({}, {"by_layer": False}, {"globally": False}):
        np.testing.assert_allclose(
            normalize_importance(ours, found.unit_map, **options),
            own.normalized(expected, **options).reshape(-1),
            rtol=0,
            atol=2e-5,
        )


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("per_round", [1, 2, 4])
def test_rounds(found, exact, per_round):
    rounds = pruning_rounds(
        found.unit_map,
        lambda mask: normalize_importance(measured(found, found.gates, mask), found.unit_map),
        lambda mask: float(mask.kept),
        heads_per_round=per_round,
        exact=exact,
    )
    masks = [each.mask for each in rounds]
    assert masks[0] == full_mask(found.unit_map)
    expected = own.michel_rounds(lambda mask: own.normalized(by_hand(found, mask)), (2, 3), per_round, exact)
    np.testing.assert_array_equal([mask.keep for mask in masks[1:]], [mask.reshape(-1) > 0 for mask in expected])
