"""What holds for every draw of the relaxed subset and for every hard mask."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from head_pruning import HeadPruningError
from head_pruning.gates import SoftTopK, gumbel, hard_top_k, plan_rounds
from head_pruning.gates.engine import top_k

TINY = torch.finfo(torch.float64).tiny


@st.composite
def problems(draw, low=-20.0, high=20.0, minima=False):
    """Logits, K and (if asked) rows, kinds and feasible minima: ``(logits, rounds, groups)``."""
    heads = draw(st.integers(1, 5))
    sites = draw(st.integers(1, 6))
    n = heads * sites
    logits = draw(hnp.arrays(np.float64, n, elements=st.floats(low, high, width=32)))
    if not minima:
        return logits, plan_rounds(n, draw(st.integers(1, n))), []
    rows = list(np.arange(n).reshape(sites, heads))
    kind_of = [draw(st.integers(0, 2)) for _ in rows]
    kinds = [np.concatenate([r for r, k in zip(rows, kind_of) if k == kind]) for kind in sorted(set(kind_of))]
    per_row, per_kind = draw(st.integers(0, 2)), draw(st.integers(0, 4))
    needed = sum(
        max(
            min(per_kind, len(kind)),
            sum(min(per_row, heads) for r, k in zip(rows, kind_of) if k == label),
        )
        for kind, label in zip(kinds, sorted(set(kind_of)))
    )
    assume(1 <= max(1, needed) <= n)
    keep = draw(st.integers(max(1, needed), n))
    rounds = plan_rounds(n, keep, rows=rows, kinds=kinds, min_per_row=per_row, min_per_kind=per_kind)
    groups = [(r, min(per_row, heads)) for r in rows] + [(k, min(per_kind, len(k))) for k in kinds]
    return logits, rounds, groups


temperatures = st.sampled_from([1e-8, 1e-5, 1e-3, 1e-2, 0.1, 0.7, 1.0, 30.0, 1000.0])


def plain_loop(logits: torch.Tensor, rounds, temperature: float) -> torch.Tensor:
    """The recursion as one would write it down, for autograd."""
    outside = []
    for support in rounds.supports:
        bar = torch.zeros(logits.numel(), dtype=torch.float64)
        if support is not None:
            bar = torch.full((logits.numel(),), -torch.inf, dtype=torch.float64)
            bar[torch.from_numpy(support)] = 0.0
        outside.append(bar)
    r, mask = logits, 0.0
    for bar in outside:
        p = torch.softmax((r + bar) / temperature, -1)
        mask = mask + p
        r = r + torch.log((1.0 - p).clamp_min(TINY))
    return mask


# -- the relaxed mask ----------------------------------------------------------------------------------------------


@given(problems(), temperatures)
def test_soft_mask_sums_to_k(problem, temperature):
    logits, rounds, _ = problem
    mask = SoftTopK(logits, rounds, temperature).mask
    assert mask.sum() == pytest.approx(len(rounds.supports), abs=1e-9)
    assert (mask >= 0).all()


@given(problems(minima=True), temperatures)
def test_soft_mask_gives_every_group_its_minimum(problem, temperature):
    logits, rounds, groups = problem
    mask = SoftTopK(logits, rounds, temperature).mask
    assert mask.sum() == pytest.approx(len(rounds.supports), abs=1e-9)
    for group, least in groups:
        assert mask[group].sum() >= least - 1e-9


@given(problems(low=-3, high=3, minima=True), st.sampled_from([0.3, 1.0, 10.0]), st.integers(0, 2**32 - 1))
def test_soft_mask_and_gradient_equal_autograd(problem, temperature, seed):
    logits, rounds, _ = problem
    gradient = np.random.default_rng(seed).normal(size=logits.size)
    sample = SoftTopK(logits, rounds, temperature)
    leaf = torch.from_numpy(logits.copy()).requires_grad_(True)
    mask = plain_loop(leaf, rounds, temperature)
    mask.backward(torch.from_numpy(gradient))
    np.testing.assert_allclose(sample.mask, mask.detach().numpy(), rtol=0, atol=1e-9)
    scale = max(1.0, np.abs(leaf.grad.numpy()).max())
    np.testing.assert_allclose(sample.backward(gradient), leaf.grad.numpy(), rtol=0, atol=1e-6 * scale)


def test_gradient_equals_finite_differences():
    rng = np.random.default_rng(3)
    logits, gradient = rng.normal(size=9), rng.normal(size=9)
    rows = list(np.arange(9).reshape(3, 3))
    rounds = plan_rounds(9, 5, rows=rows, min_per_row=1)
    ours = SoftTopK(logits, rounds, 0.8).backward(gradient)
    for i in range(9):
        step = 1e-6 * np.eye(9)[i]
        up, down = (SoftTopK(logits + sign * step, rounds, 0.8).mask @ gradient for sign in (1, -1))
        assert ours[i] == pytest.approx((up - down) / 2e-6, rel=1e-5, abs=1e-8)


@given(problems(), st.sampled_from([1e-8, 1e-6, 1e-4, 1e-3]), st.integers(0, 2**32 - 1))
def test_saturated_shortcut_equals_the_full_recursion_bit_for_bit(problem, temperature, seed):
    logits, rounds, _ = problem
    rng = np.random.default_rng(seed)
    perturbed = logits + gumbel(rng.random(logits.size))
    quick = SoftTopK(perturbed, rounds, temperature)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(top_k, "_one_hot_everywhere", lambda *_: None)
        full = SoftTopK(perturbed, rounds, temperature)
    assert not full.saturated
    np.testing.assert_array_equal(quick.mask, full.mask)
    if quick.saturated:
        gradient = rng.normal(size=logits.size)
        assert not quick.backward(gradient).any()
        np.testing.assert_array_equal(quick.backward(gradient), full.backward(gradient))
        np.testing.assert_array_equal(quick.mask == 1.0, hard_top_k(perturbed, rounds))


def test_shortcut_is_taken_at_the_final_temperature_and_not_before():
    rng = np.random.default_rng(0)
    perturbed = rng.normal(size=144) + gumbel(rng.random(144))
    rounds = plan_rounds(144, 12)
    assert SoftTopK(perturbed, rounds, 1e-8).saturated
    assert not SoftTopK(perturbed, rounds, 0.1).saturated
    # Two equal logits share the mass, however low the temperature.
    tied = SoftTopK(np.zeros(4), plan_rounds(4, 1), 1e-8)
    assert not tied.saturated
    np.testing.assert_array_equal(tied.mask, np.full(4, 0.25))


def test_gradients_stay_finite_where_the_softmaxes_underflow():
    rng = np.random.default_rng(1)
    for temperature in np.geomspace(1.0, 1e-8, 60):
        perturbed = 3 * rng.normal(size=36) + gumbel(rng.random(36))
        sample = SoftTopK(perturbed, plan_rounds(36, 30), temperature)
        assert np.isfinite(sample.backward(rng.normal(size=36))).all(), temperature


# -- the hard mask -------------------------------------------------------------------------------------------------


@given(problems(minima=True), st.integers(1, 4))
def test_hard_top_k_keeps_exactly_k_and_the_minima(problem, levels):
    logits, rounds, groups = problem
    for scores in (logits, np.round(logits * levels) / levels, np.zeros_like(logits), np.sign(logits)):
        keep = hard_top_k(scores, rounds)
        assert keep.dtype == bool and keep.sum() == len(rounds.supports)
        for group, least in groups:
            assert keep[group].sum() >= least


@given(problems())
def test_hard_top_k_keeps_the_highest(problem):
    logits, rounds, _ = problem
    keep = hard_top_k(logits, rounds)
    assert keep.all() or logits[keep].min() >= logits[~keep].max()
    assert hard_top_k(logits, plan_rounds(logits.size, logits.size)).all()


@given(problems(minima=True))
def test_hard_top_k_is_the_best_choice_that_fits(problem):
    """Swapping any kept head for any removed one either breaks a minimum or gains nothing."""
    logits, rounds, groups = problem
    keep = hard_top_k(logits, rounds)
    for out in np.flatnonzero(keep):
        for into in np.flatnonzero(~keep):
            swapped = keep.copy()
            swapped[[out, into]] = False, True
            if all(swapped[group].sum() >= least for group, least in groups):
                assert logits[into] <= logits[out]


def test_ties_go_to_the_lower_index():
    np.testing.assert_array_equal(
        np.flatnonzero(hard_top_k(np.array([1.0, 2.0, 2.0, 2.0]), plan_rounds(4, 2))), [1, 2]
    )


# -- refusals ------------------------------------------------------------------------------------------------------


def is_sentence(error: pytest.ExceptionInfo) -> bool:
    text = str(error.value)
    return text.endswith(".") and "\n" not in text and 8 < len(text.split()) < 50


@pytest.mark.parametrize("keep, word", [(0, "0 heads"), (-3, "-3 heads"), (13, "more than the 12")])
def test_impossible_counts_are_refused(keep, word):
    with pytest.raises(HeadPruningError, match=word) as error:
        plan_rounds(12, keep)
    assert is_sentence(error) and "from 1 to 12" in str(error.value)


@pytest.mark.parametrize("minima", [{"min_per_row": 2}, {"min_per_kind": 4}, {"min_per_row": 1, "min_per_kind": 3}])
def test_minima_that_need_more_than_k_are_refused(minima):
    rows = list(np.arange(12).reshape(4, 3))
    kinds = [np.arange(6), np.arange(6, 12)]
    with pytest.raises(HeadPruningError, match="only 5 are kept") as error:
        plan_rounds(12, 5, rows=rows, kinds=kinds, **minima)
    assert is_sentence(error)
    names = {"min_per_row": "--min-heads-per-layer", "min_per_kind": "--min-heads-per-kind"}
    assert {name for name, flag in names.items() if flag in str(error.value)} == set(minima)


def test_a_minimum_above_a_groups_size_means_all_of_it():
    rows = list(np.arange(6).reshape(2, 3))
    assert hard_top_k(np.zeros(6), plan_rounds(6, 6, rows=rows, min_per_row=5)).all()


@pytest.mark.parametrize("bad", [0, 3])
def test_infinite_logits_are_refused(bad):
    logits = np.zeros(4)
    logits[bad] = np.inf
    with pytest.raises(HeadPruningError, match="infinite") as error:
        SoftTopK(logits, plan_rounds(4, 2), 0.1)
    assert is_sentence(error)
    logits[bad] = -np.inf  # a head that may never be picked
    assert SoftTopK(logits, plan_rounds(4, 2), 0.1).mask[bad] == 0.0


@pytest.mark.parametrize("bad", [0, 3])
def test_nan_logits_are_refused(bad):
    logits = np.zeros(4)
    logits[bad] = np.nan
    for call in (lambda: hard_top_k(logits, plan_rounds(4, 2)), lambda: SoftTopK(logits, plan_rounds(4, 2), 0.1)):
        with pytest.raises(HeadPruningError, match="NaN") as error:
            call()
        assert is_sentence(error)


# -- noise ---------------------------------------------------------------------------------------------------------


def test_gumbel_noise_is_finite_at_both_ends_and_has_gumbels_distribution():
    ends = gumbel(np.array([0.0, 5e-324, 1e-300, np.nextafter(1.0, 0.0)]))
    assert np.isfinite(ends).all() and (np.diff(ends) >= 0).all()
    draws = gumbel(np.random.default_rng(0).random(200_000))
    assert draws.mean() == pytest.approx(np.euler_gamma, abs=0.01)
    assert draws.var() == pytest.approx(np.pi**2 / 6, abs=0.03)
