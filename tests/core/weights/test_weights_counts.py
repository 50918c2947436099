"""A ratio of weights as a number of weights: exact where it is a whole number, however the ratio was come by."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from head_pruning import PruningSession
from head_pruning.schedules import count_of, cubic_density, gradual_sparsity
from tests.core.weights.test_weights import make_pruner

PERCENT = st.integers(0, 100).map(lambda percent: (Fraction(percent, 100), percent / 100))


@given(st.integers(0, 10**9), PERCENT)
def test_a_count_is_that_of_the_exact_ratio(number, ratio):
    exact, value = ratio
    assert count_of(value, number) == int(exact * number)
    assert count_of(1.0 - (1.0 - value), number) == int(exact * number)


@given(st.integers(1, 10**6), st.data())
def test_a_share_gives_back_its_count(number, data):
    count = data.draw(st.integers(0, number))
    assert count_of(count / number, number) == count
    assert count_of(1.0 - (number - count) / number, number) == count


@given(st.floats(0, 1), st.floats(0, 1))
def test_schedules_end_at_exactly_their_target(initial, final):
    assert gradual_sparsity(9, initial=initial, final=final, begin=0, end=7) == final
    assert cubic_density(9, initial=initial, final=final, start=2, stop=7) == final


def pruned(selection: str, size: tuple[int, int], **options) -> tuple[nn.Module, object]:
    """A matrix after gradual pruning to its target, and the pruner."""
    torch.manual_seed(0)
    model = nn.Linear(size[1], size[0], bias=False)
    pruner = make_pruner(
        "gradual_magnitude", **{
            "initial_sparsity": 0.0, "threshold_decay": 0.0, "policy_end_step": 4, "pruning_frequency": 1,
            "weights_include": "weight", "weight_selection": selection, **options,
        },
    )  # fmt: skip
    session = PruningSession(model, None, [pruner], total_steps=8).attach()
    for step in range(6):
        session.before_update(step)
        session.before_step()
        session.after_step()
    return model, session


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 99), st.integers(0, 99))
def test_gradual_pruning_removes_the_exact_count(rows, columns, target, initial):
    for selection in ("tensor", "global"):
        model, session = pruned(
            selection, (rows, columns), target_sparsity=target / 100, initial_sparsity=initial / 100
        )
        assert int((model.weight == 0).sum()) == target * rows * columns // 100
        assert session.at_target()


@pytest.mark.parametrize("target, zeros", [(0.1, 40), (0.2, 80), (0.45, 180), (0.29, 116), (0.57, 228)])
def test_the_cases_of_a_20_x_20_matrix(target, zeros):
    assert int((pruned("tensor", (20, 20), target_sparsity=target)[0].weight == 0).sum()) == zeros


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 10), st.integers(1, 10), st.integers(1, 99))
def test_blocks_and_patterns_remove_the_exact_count(rows, columns, target):
    model, _ = pruned("2x1", (2 * rows, columns), target_sparsity=target / 100)
    assert int((model.weight == 0).sum()) == 2 * (target * rows * columns // 100)
    keep, of = sorted({target % 7 + 1, target % 11 + 8})
    model, _ = pruned(f"{keep}:{of}", (rows, of * columns), target_sparsity=(of - keep) / of)
    assert int((model.weight == 0).sum()) == (of - keep) * rows * columns


def test_a_sparsity_may_rise_at_once():
    found = [gradual_sparsity(t, initial=0.1, final=0.5, begin=3, end=3) for t in range(6)]
    assert found == [0.1] * 3 + [0.5] * 3


def test_each_tensor_of_a_map_goes_its_own_way():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 7, bias=False), nn.Linear(7, 10, bias=False))
    options = {"initial_sparsity": 0.3, "target_sparsity": 0.0, "threshold_decay": 0.0, "policy_begin_step": 0}
    options |= {"weight_sparsity_map": '{"0": 0.1, "1": 0.8}', "policy_end_step": 4, "pruning_frequency": 1}
    pruner = make_pruner("gradual_magnitude", weights_include="weight", **options, begin_pruning_step=0)
    session = PruningSession(model, None, [pruner], total_steps=8).attach()
    found = []
    for step in range(6):
        session.before_update(step)
        session.before_step()
        session.after_step()
        found.append([int((layer.weight == 0).sum()) for layer in model])
    shares = [1 - (1 - t / 4) ** 3 if t < 4 else 1.0 for t in range(6)]
    assert found == [[int((0.3 - 0.2 * q) * 70 + 1e-9), int((0.3 + 0.5 * q) * 70 + 1e-9)] for q in shares]


def test_each_tensor_of_a_pattern_goes_its_own_way():
    """int(s * M) of each M neighbours, with the tensor's own s on its way up."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(4, 8, bias=False), nn.Linear(8, 6, bias=False))
    options = {"initial_sparsity": 0.0, "target_sparsity": 0.0, "threshold_decay": 0.0, "policy_begin_step": 0}
    options |= {"weight_sparsity_map": '{"0": 0.8, "1": 0.3}', "weight_selection": "2:4", "policy_end_step": 9}
    pruner = make_pruner("gradual_magnitude", weights_include="weight", **options, begin_pruning_step=0,
                         pruning_frequency=1, mask_policy="retained")  # fmt: skip
    session = PruningSession(model, None, [pruner], total_steps=12).attach()
    found, densities = [], []
    for step in range(12):
        session.before_update(step)
        session.before_step()
        session.after_step()
        found.append([float((layer.weight == 0).double().mean()) for layer in model])
        densities.append(session.metrics()["prune_target"])
    shares = [1 - (1 - t / 9) ** 3 if t < 9 else 1.0 for t in range(12)]
    assert found == [[int(4 * s * q + 1e-9) / 4 for s in (0.8, 0.3, 0.5)] for q in shares]
    assert found[-1] == [0.75, 0.25, 0.5] and session.at_target()
    sizes = [32, 32, 48]
    assert densities == pytest.approx([1 - sum(r * n for r, n in zip(row, sizes)) / 112 for row in found])
    assert pruner.final_density() == pytest.approx(1 - (24 + 8 + 24) / 112)


def test_the_first_mask_has_the_initial_count():
    torch.manual_seed(0)
    model = nn.Linear(20, 20, bias=False)
    options = {"initial_sparsity": 0.2, "target_sparsity": 0.9, "threshold_decay": 0.0, "policy_begin_step": 4}
    pruner = make_pruner("gradual_magnitude", weights_include="weight", **options)
    session = PruningSession(model, None, [pruner], total_steps=8).attach()
    session.before_update(0)
    assert int((model.weight == 0).sum()) == 80


@pytest.mark.parametrize("density, number", [(0.9, 100), (0.8, 20), (0.1, 400), (0.3, 624)])
def test_platon_counts_as_published(density, number):
    """int(n * (1 - r)), float error included, and the weight at the threshold stays."""
    torch.manual_seed(0)
    model = nn.Linear(number, 1, bias=False)
    options = {"final_threshold": density, "warmup_steps": 1, "deltaT": 1, "weights_include": "weight"}
    for method in ("platon", "magnitude"):
        session = PruningSession(model, None, [make_pruner(method, **options)], total_steps=4).attach()
        for step in range(4):
            session.before_update(step)
            model.weight.data.normal_()
            model.weight.grad = torch.randn(1, number)
            session.after_step()
        assert int((model.weight == 0).sum()) == int(number * (1 - density)) - 1


def test_a_run_with_an_initial_sparsity_follows_the_published_formulas():
    """k = int(s * n) with s = s_0 + (s_T - s_0) q; what has a magnitude of at most the k-th smallest goes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 8))
    options = {"target_sparsity": 0.8, "initial_sparsity": 0.2, "threshold_decay": 0.0, "prune_biases": False,
               "pruning_frequency": 5, "begin_pruning_step": 5, "policy_begin_step": 5, "policy_end_step": 50,
               "end_pruning_step": 50}  # fmt: skip
    pruner = make_pruner("gradual_magnitude", weights_include="weight", **options)
    session = PruningSession(model, None, [pruner], total_steps=60).attach()
    masks = {}
    for step in range(60):
        session.before_update(step)
        session.before_step()
        for index, layer in enumerate(model):
            layer.weight.data.normal_(generator=torch.Generator().manual_seed(100 * index + step))
            if step == 0 or step % 5 == 0 and 5 <= step <= 50:
                q = 1 - (1 - min(max((step - 5) / 45, 0), 1)) ** 3
                magnitude = layer.weight.detach().abs()
                k = int((0.2 + (0.8 - 0.2) * q) * magnitude.numel())
                drawn = magnitude > magnitude.flatten().kthvalue(k).values
                masks[index] = masks.get(index, drawn) if step == 0 else drawn
        expected = [layer.weight.detach() * masks[index] for index, layer in enumerate(model)]
        session.after_step()
        if step >= 5:
            assert all(torch.equal(layer.weight, weight) for layer, weight in zip(model, expected)), step


def test_warm_ups_given_as_shares_of_each_other():
    model = nn.Linear(4, 4)
    options = {"warmup_steps": 100, "initial_warmup": 0.29, "final_warmup": 0.57, "weights_include": "weight"}
    pruner = make_pruner("platon", **options)
    PruningSession(model, None, [pruner], total_steps=200).attach().metrics()
    assert (pruner.start, pruner.stop) == (29, 200 - 57)
