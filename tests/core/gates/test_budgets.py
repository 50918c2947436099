"""Budgets of heads and feed-forward units together: by number, by a share of each kind, by MACs."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from head_pruning import HeadPruningError, PruningSession, build_pruner
from head_pruning.importance.michel import normalize_importance, pruning_rounds
from head_pruning.registry import get_method
from head_pruning.surgery.per_unit import affordable, per_unit, unit_macs
from tests.core.gates.test_gpp import units
from tests.core.test_contract import WIDTH, Classifier


def opened(method, model=None, **options):
    pruner = build_pruner(get_method(method), SimpleNamespace(**{"prune_units": "both", **options}))
    session = PruningSession(model or Classifier(), units(), [pruner])
    return session.attach(), pruner


def test_what_a_unit_costs():
    """A head of width 4: query, key, value and output, and scores over 10 tokens; a unit: a row and a column."""
    model, both = Classifier(), units().numbering("both")
    macs = unit_macs(model, both, 10)
    dim = both.attention[0].head_dim
    head = 4 * dim * WIDTH + 2 * 10 * dim
    assert macs.tolist() == [head] * 6 + [2 * WIDTH] * 36
    model.layers[1].up.weight.data[5] = 100.0
    model.layers[1].up.bias.data[5] = 0.0
    squares = per_unit(model, both, torch.square)
    assert squares.argmax() == 6 + 12 + 5
    column = model.layers[1].down.weight.detach()[:, 5].double().square().sum()
    assert squares.max() == pytest.approx(WIDTH * 1e4 + float(column))


@pytest.mark.parametrize("method", ["random", "unit_magnitude"])
@pytest.mark.parametrize("share", [0.1, 0.37, 0.8, 1.0])
def test_never_above_a_budget_of_macs_and_less_than_a_unit_below(method, share):
    session, pruner = opened(method, keep_macs=share, macs_length=16)
    macs, keep = pruner.macs(), session.head_mask().keep
    spent = macs[keep].sum()
    assert spent <= share * macs.sum() * (1 + 1e-9) < spent + (macs[~keep].min() if share < 1 else 1)
    assert f"{session.head_mask().words} stay, with {spent / macs.sum():.2%} of their MACs at 16" in pruner.summary()


def test_both_kinds_shrink_within_a_budget():
    """Weights drawn alike are as dear, head or unit, though a head has ten times as many."""
    torch.manual_seed(3)
    model = Classifier()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    for options in ({"keep_macs": 0.5}, {"num_of_heads": 21}):
        session, _ = opened("unit_magnitude", model, **options)
        assert all(0 < kept < total for kept, total in session.head_mask().counts().values())
        session.detach()
    both = units().numbering("both")
    raw = np.random.default_rng(0).lognormal(size=both.num_heads) * np.repeat((64.0, 1.0), (6, 36))
    scores, macs = normalize_importance(raw, both), unit_macs(model, both, 16)
    rounds = pruning_rounds(
        both, lambda mask: scores, lambda mask: 0.0, heads_per_round=1, costs=macs, cost_per_round=0.5
    )
    assert all(0 < kept < total for kept, total in list(rounds)[1].mask.counts().values())


def test_units_are_not_discounted_by_their_rank():
    session, pruner = opened("head_sensitivity", num_of_heads=20, joint_pruning=True, count_schedule="0:1")
    pruner.scores = np.linspace(1.0, 2.0, pruner.scores.size)
    found = pruner.discounted()
    assert (found[6:] == pruner.scores[6:]).all()
    assert sorted(pruner.scores[:2] / found[:2]) == [1.0, 2.0]


@pytest.mark.parametrize("method", ["subset", "head_sensitivity", "ste"])
@pytest.mark.parametrize("what, total", [("ffn", 36), ("both", 42)])
def test_learnt_counts_of_units_are_exact(method, what, total):
    """The plain loop trains with them, and the mask keeps so many."""
    model = Classifier()
    options = SimpleNamespace(num_of_heads=total // 3, prune_units=what, joint_pruning=True, count_schedule="0:3")
    session = PruningSession(model, units(), [build_pruner(get_method(method), options)], total_steps=6).attach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs, labels = torch.randint(20, (8, 5)), torch.arange(8) % 3
    for step in range(6):
        session.before_update(step)
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()
        session.after_backward()
        session.before_step(optimizer)
        optimizer.step()
        session.after_step()
        optimizer.zero_grad()
    mask = session.harden()
    assert mask.kept == total // 3 and mask.unit_map.units == what


def test_a_share_of_each_kind():
    session, pruner = opened("unit_magnitude", keep_share=0.5)
    assert session.head_mask().counts() == {"heads": (3, 6), "units": (18, 36)}
    squares = per_unit(session.model, session.unit_map, torch.square)
    keep = session.head_mask().keep
    for where in (slice(0, 6), slice(6, 42)):
        assert squares[where][keep[where]].min() > squares[where][~keep[where]].max()


def test_a_minimum_that_units_do_not_have_is_refused():
    pruner = build_pruner(
        get_method("random"), SimpleNamespace(num_of_heads=7, prune_units="ffn", min_heads_per_kind=2)
    )
    with pytest.raises(HeadPruningError, match="--prune-units ffn prunes no heads; drop it"):
        PruningSession(Classifier(), units(), [pruner]).attach()
    pruner.config.min_heads_per_kind, pruner.config.min_heads_per_layer = 0, 2
    mask = PruningSession(Classifier(), units(), [pruner]).attach().head_mask()
    assert mask.kept == 7 and min(len(kept) for kept in mask.kept_heads().values()) >= 2


def test_weights_that_come_later_are_those_that_are_ranked():
    torch.manual_seed(0)
    late = Classifier()
    pruner = build_pruner(get_method("unit_magnitude"), SimpleNamespace(num_of_heads=7, prune_units="ffn"))
    session = PruningSession(late, units(), [pruner], weights_come_later=True).attach()
    torch.manual_seed(1)
    late.load_state_dict(Classifier().state_dict())
    session.before_update(0)
    squares = per_unit(late, session.unit_map, torch.square)
    assert set(np.flatnonzero(session.head_mask().keep)) == set(np.argsort(-squares)[:7])


@pytest.mark.parametrize("options, sentence", [
    ({}, "needs the number of heads to keep; add .*, or one of --keep-share and --keep-macs in its place"),
    ({"num_of_heads": 4, "keep_macs": 0.5}, "--num-of-heads and --keep-macs each say how much .* keeps; give one of"),
    ({"keep_macs": 1.5}, "--keep-macs is 1.5; it must be a share above 0, up to 1"),
    ({"keep_share": 0.5, "min_heads_per_layer": 1}, "give --num-of-heads"),
    ({"keep_macs": 0.5, "macs_length": 0}, "--macs-length is 0"),
    ({"keep_share": 0.16}, "--keep-share 0.16 keeps none of the 6 heads; give 1/6 or more"),
    ({"keep_share": 0.02, "prune_units": "ffn"}, "--keep-share 0.02 keeps none of the 36 units; give 1/36 or more"),
    ({"keep_macs": 1e-4}, r"--keep-macs 0.0001 is less than a unit costs, so nothing would stay; give 0\.\d+ or more"),
])  # fmt: skip
def test_what_cannot_be_is_refused(options, sentence):
    with pytest.raises(HeadPruningError, match=sentence):
        opened("random", **options)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("options", [{"keep_share": 0.16}, {"keep_macs": 1e-4}])
def test_a_budget_that_buys_nothing_is_refused_before_training(late, options):
    pruner = build_pruner(get_method("unit_magnitude"), SimpleNamespace(prune_units="both", **options))
    with pytest.raises(HeadPruningError, match="give .* or more"):
        PruningSession(Classifier(), units(), [pruner], weights_come_later=late).attach()


def test_the_least_budget_that_is_named_buys_one():
    session, pruner = opened("unit_magnitude", keep_share=1 / 6)
    assert session.head_mask().counts() == {"heads": (1, 6), "units": (6, 36)}
    with pytest.raises(HeadPruningError) as refused:
        opened("unit_magnitude", keep_macs=1e-4)
    least = float(str(refused.value).split("give ")[1].split()[0])
    assert opened("unit_magnitude", keep_macs=least)[0].head_mask().kept == 1


def test_what_no_longer_fits_is_passed_over():
    keep = affordable(np.array([3.0, 5.0, 4.0, 1.0]), np.array([1.0, 4.0, 4.0, 2.0]), 7.0)
    assert keep.tolist() == [True, True, False, True]


def test_rounds_of_equal_macs():
    both = units().numbering("both")
    macs, scores = unit_macs(Classifier(), both, 10), np.random.default_rng(0).random(42)

    def run(start=None):
        options = {"heads_per_round": 1, "costs": macs, "cost_per_round": 0.25, "start": start}
        return list(pruning_rounds(both, lambda mask: scores, lambda mask: 0.0, **options))

    rounds = run()
    spent = [macs[each.mask.keep].sum() / macs.sum() for each in rounds]
    assert len(rounds) == 5 and spent[0] == 1 and rounds[-1].mask.kept == 0
    for share, found in zip((0.75, 0.5, 0.25), spent[1:]):
        assert share - macs.max() / macs.sum() < found <= share
    for earlier, later in zip(rounds, rounds[1:]):
        assert not (later.mask.keep & ~earlier.mask.keep).any()
    assert [each.mask for each in run(rounds[2])] == [each.mask for each in rounds[3:]]
