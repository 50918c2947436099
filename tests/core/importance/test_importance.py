"""Importance by gradients, and rounds of removing the least important heads."""

import numpy as np
import pytest
import torch

from head_pruning import AttentionSite, HeadMask, HeadPruningError, UnitMap, full_mask
from head_pruning.gates import GateBank
from head_pruning.importance import ImportanceAccumulator, PruningRound, normalize_importance, pruning_rounds
from head_pruning.importance.rounds import RoundsReport
from head_pruning.masks import mask_without

IMPORTANCE = np.array([0.5, 0.1, 0.9, 0.3, 0.7, 0.2])


@pytest.fixture
def unit_map() -> UnitMap:
    return UnitMap(tuple(AttentionSite(name, "encoder_self", name, 3, 1, f"{name}.out") for name in ("a", "b")))


def recorder(values):
    """A function of the mask that notes its calls."""
    calls = []

    def measure(mask: HeadMask):
        calls.append(mask.keep.tolist())
        return values(mask) if callable(values) else values

    measure.calls = calls
    return measure


def kept(rounds) -> list[list[int]]:
    return [np.flatnonzero(r.mask.keep).tolist() for r in rounds]


# -- measuring -----------------------------------------------------------------------------------------------------


def gates_of(toy):
    model, unit_map = toy.make()
    gates = GateBank(model.eval(), unit_map)
    gates.attach()
    return model, unit_map, gates


@pytest.mark.parametrize("signed", [False, True])
def test_importance_is_the_derivative_of_the_loss_by_the_gate(toy, signed):
    """Against differences of the loss itself, in float64; absolute values are taken per batch."""
    model, unit_map, gates = gates_of(toy)
    model.double()
    mask = mask_without(unit_map, {"cross": [1]})

    def loss(step, values):
        gates.set_training(values)
        with gates.forced("training"):
            source, target, labels = toy.batch(step)
            return toy.loss(model, (source.double(), target.double(), labels))

    accumulator = ImportanceAccumulator(gates, signed=signed)
    with accumulator.probing(mask):
        for step in range(2):
            source, target, labels = toy.batch(step)
            toy.loss(model, (source.double(), target.double(), labels)).backward()
            accumulator.add()
    expected = np.zeros(12)
    for step in range(2):
        for head in range(12):
            shift = np.eye(12)[head] * 2.0**-10
            difference = (loss(step, mask.keep + shift) - loss(step, mask.keep - shift)).item() * 2.0**9
            expected[head] += difference if signed else abs(difference)
    np.testing.assert_allclose(accumulator.scores(), expected, rtol=1e-3, atol=1e-4)
    assert (accumulator.scores() < 0).any() == signed


@pytest.mark.parametrize("signed", [False, True])
def test_importance_per_example_is_that_of_single_examples(toy, signed):
    model, unit_map, gates = gates_of(toy)
    mask = mask_without(unit_map, {"encoder.1": [0]})
    together = ImportanceAccumulator(gates, signed=signed)
    with together.probing(mask):
        for step in range(2):
            with together.examples(4):
                toy.loss(model, toy.batch(step)).backward()
    alone = ImportanceAccumulator(gates, signed=signed)
    with alone.probing(mask):
        for step in range(2):
            for i in range(4):
                toy.loss(model, tuple(part[i : i + 1] for part in toy.batch(step))).backward()
                alone.add()
    expected = alone.scores()
    np.testing.assert_allclose(together.scores(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert expected.all() and (expected < 0).any() == signed


@pytest.mark.parametrize(
    "shape, example_of",
    [
        ((3, 5), lambda i, j: i),  # batch first
        ((3, 3), lambda i, j: i),
        ((5, 3), lambda i, j: j),  # time first
        ((6, 5), lambda i, j: i // 2),  # two windows per example
        ((6,), lambda i, j: i // 2),  # rows of equal length, packed
        ((1, 3), lambda i, j: j),
    ],
)
def test_where_the_examples_of_an_input_are(shape, example_of):
    unit_map = UnitMap((AttentionSite("a", "encoder_self", "l", 2, 4, "0"),))
    model = torch.nn.ModuleList([torch.nn.Identity()])
    gates = GateBank(model, unit_map)
    gates.attach()
    values = torch.rand(3, 2)
    with gates.reading(values):
        found = model[0](torch.ones(*shape, 8))
    assert found.shape == (*shape, 8)
    for i in range(shape[0]):
        for j in range(shape[1] if len(shape) > 1 else 1):
            place = found[i, j] if len(shape) > 1 else found[i]
            assert torch.equal(place, values[example_of(i, j)].repeat_interleave(4))
    assert torch.equal(model[0](torch.ones(7, 8)), torch.ones(7, 8))
    with gates.reading(values), pytest.raises(HeadPruningError, match=r"shape \[7, 8\], in which the 3 examples"):
        model[0](torch.ones(7, 8))


def test_probing_measures_anew_and_restores_the_mode(toy):
    model, unit_map, gates = gates_of(toy)
    accumulator = ImportanceAccumulator(gates)
    found = []
    for _ in range(2):
        with accumulator.probing(full_mask(unit_map)):
            toy.loss(model, toy.batch(0)).backward()
            accumulator.add()
        found.append(accumulator.scores())
    np.testing.assert_array_equal(*found)
    gates.set_evaluation(np.zeros(12))
    with torch.no_grad():
        closed = model(*toy.batch(0)[:2])
    gates.detach()
    assert not torch.equal(closed, model(*toy.batch(0)[:2]))


def test_importance_that_is_not_finite_is_refused(toy):
    model, unit_map, gates = gates_of(toy)
    accumulator = ImportanceAccumulator(gates)
    with accumulator.probing(full_mask(unit_map)):
        (toy.loss(model, toy.batch(0)) * float("nan")).backward()
        accumulator.add()
    with pytest.raises(HeadPruningError, match="importance is not finite"):
        accumulator.scores()


def test_normalisation_by_layer_and_over_all(unit_map):
    scores = np.array([3.0, 4.0, 0.0, 30.0, 40.0, 0.0])
    by_layer = normalize_importance(scores, unit_map, globally=False)
    np.testing.assert_allclose(by_layer, [0.6, 0.8, 0, 0.6, 0.8, 0])
    np.testing.assert_allclose(normalize_importance(scores, unit_map), [0.75, 1, 0, 0.75, 1, 0])
    np.testing.assert_allclose(normalize_importance(scores, unit_map, by_layer=False), scores / 40)
    np.testing.assert_array_equal(scores, [3.0, 4.0, 0.0, 30.0, 40.0, 0.0])
    for flat in (np.zeros(6), np.ones(6)):
        np.testing.assert_array_equal(normalize_importance(flat, unit_map), np.zeros(6))


# -- rounds --------------------------------------------------------------------------------------------------------


def test_one_shot_rounds_follow_one_ranking(unit_map):
    importance, score = recorder(IMPORTANCE), recorder(lambda mask: 10.0 * mask.kept)
    rounds = list(pruning_rounds(unit_map, importance, score, heads_per_round=2))
    assert kept(rounds) == [[0, 1, 2, 3, 4, 5], [0, 2, 3, 4], [2, 4], []]
    assert [r.score for r in rounds] == [60.0, 40.0, 20.0, 0.0]
    assert importance.calls == [[True] * 6]
    assert rounds[0].importance is None and all(r.importance is IMPORTANCE for r in rounds[1:])


def test_a_last_round_takes_what_is_left(unit_map):
    rounds = list(pruning_rounds(unit_map, lambda mask: IMPORTANCE, lambda mask: 0.0, heads_per_round=4))
    assert kept(rounds) == [[0, 1, 2, 3, 4, 5], [2, 4], []]


def test_exact_rounds_measure_again_and_never_pick_a_removed_head(unit_map):
    """The second ranking puts the removed heads last; only heads that are there may go."""

    def measured(mask):
        return IMPORTANCE if mask.kept == 6 else np.where(mask.keep, 1.0 - IMPORTANCE, -5.0)

    importance = recorder(measured)
    rounds = list(pruning_rounds(unit_map, importance, lambda mask: 0.0, heads_per_round=2, exact=True))
    assert kept(rounds) == [[0, 1, 2, 3, 4, 5], [0, 2, 3, 4], [0, 3], []]
    assert [sum(call) for call in importance.calls] == [6, 4, 2]


def test_ties_remove_the_first_heads(unit_map):
    rounds = list(pruning_rounds(unit_map, lambda mask: np.zeros(6), lambda mask: 0.0, heads_per_round=3))
    assert kept(rounds) == [[0, 1, 2, 3, 4, 5], [3, 4, 5], []]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("done", [0, 1, 2])
def test_an_interrupted_run_goes_on_after_its_last_round(unit_map, exact, done):
    def measured(mask):
        return IMPORTANCE * (1.0 if mask.kept % 4 else -1.0)

    whole = list(pruning_rounds(unit_map, measured, lambda mask: 0.0, heads_per_round=2, exact=exact))
    importance, score = recorder(measured), recorder(1.0)
    rest = list(pruning_rounds(unit_map, importance, score, heads_per_round=2, exact=exact, start=whole[done]))
    assert kept(rest) == kept(whole)[done + 1 :]
    assert len(score.calls) == 3 - done
    assert len(importance.calls) == (3 - done if exact else int(done == 0))


def test_nothing_follows_an_empty_model(unit_map):
    start = PruningRound(HeadMask(unit_map, np.zeros(6)), 0.0, IMPORTANCE)
    assert (
        list(pruning_rounds(unit_map, lambda mask: IMPORTANCE, lambda mask: 0.0, heads_per_round=2, start=start)) == []
    )


@pytest.mark.parametrize("count", [0, -1, 7])
def test_impossible_rounds_are_refused(unit_map, count):
    with pytest.raises(HeadPruningError, match="from 1 to 6"):
        next(pruning_rounds(unit_map, lambda mask: IMPORTANCE, lambda mask: 0.0, heads_per_round=count))


def test_rounds_go_on_although_their_file_lacks_a_setting_that_is_not_set(tmp_path, unit_map):
    RoundsReport(tmp_path, {"data": "a"}, unit_map).add(PruningRound(full_mask(unit_map), 1.0, None))
    assert RoundsReport(tmp_path, {"data": "a", "first": None}, unit_map).start.mask.kept == 6


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"data": "a", "heads": 2, "sum": 0.5, "first": 5}, r"\(--first was not set and is now 5\)"),
        ({"data": "b", "heads": 4, "sum": 0.5}, r"\(--data was a and is now b, --num was 2 and is now 4\)"),
        ({"data": "a", "sum": 0.5}, r"\(--num was 2 and is now not set\)"),
        ({"data": "a", "heads": 2, "sum": 0.6}, r"\(another model\)"),
    ],
)
def test_rounds_of_other_settings_are_refused_by_name(tmp_path, unit_map, settings, told):
    first = {"data": "a", "heads": 2, "sum": 0.5}
    RoundsReport(tmp_path, first, unit_map).add(PruningRound(full_mask(unit_map), 1.0, None))
    before = (tmp_path / "michel_rounds.json").read_bytes()
    spelled = {"flags": {"heads": "--num", "sum": "model"}, "cure": "go elsewhere"}
    with pytest.raises(HeadPruningError, match=f"holds the rounds of another run {told}; go elsewhere.$"):
        RoundsReport(tmp_path, settings, unit_map, **spelled)
    assert (tmp_path / "michel_rounds.json").read_bytes() == before
    # The last digits of a sum depend on the machine's threads.
    assert RoundsReport(tmp_path, {**first, "sum": 0.5 + 1e-12}, unit_map, **spelled).start.mask.kept == 6


def test_an_entry_gives_its_mask_back_and_the_last_one_says_that_all_is_done(tmp_path, unit_map):
    report = RoundsReport(tmp_path, {}, unit_map)
    for result in pruning_rounds(unit_map, lambda mask: IMPORTANCE, lambda mask: 0.0, heads_per_round=4):
        assert not RoundsReport(tmp_path, {}, unit_map).finished
        assert report.mask(report.add(result)) == result.mask
    assert RoundsReport(tmp_path, {}, unit_map).finished
