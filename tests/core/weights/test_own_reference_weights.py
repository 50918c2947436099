"""Pruners of weights against the published mathematics written once more (tests/reference), mask by mask."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from head_pruning import PruningSession, build_pruner
from head_pruning.distillation.losses import mean_square, soft_cross_entropy
from head_pruning.distillation.spd import replacing_rate
from head_pruning.registry import get_method
from head_pruning.schedules import cubic_density, gradual_sparsity
from tests.reference import distillation as own_spd
from tests.reference import weights as own

TOTAL = 24
SHAPES = {"first.weight": (8, 12), "first.bias": (8,), "second.weight": (4, 8), "second.bias": (4,)}


class Drift:
    """A model whose weights a made-up optimizer moves: what they are before each update is drawn."""

    def __init__(self, name: str, first_step=None, **options) -> None:
        self.numbers = np.random.default_rng(3)
        self.model = nn.ModuleDict({"first": nn.Linear(12, 8), "second": nn.Linear(8, 4)})
        self.parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name_, parameter in self.parameters.items():
                parameter.copy_(torch.from_numpy(self._draw(name_)))
        self.pruner = build_pruner(get_method(name), SimpleNamespace(**{"weights_include": "first|second", **options}))
        self.session = PruningSession(self.model, None, [self.pruner], total_steps=TOTAL, steps_per_epoch=4).attach()

    def _draw(self, name: str) -> np.ndarray:
        return self.numbers.normal(0, 1, SHAPES[name]).astype(np.float32)

    def values(self, among=SHAPES) -> dict[str, np.ndarray]:
        return {name: self.parameters[name].detach().numpy().copy() for name in among}

    def update(self, step: int):
        """One update; returns the weights that the masks meet, and the gradients."""
        self.session.before_update(step)
        gradients = {name: self._draw(name) for name in SHAPES}
        for name, parameter in self.parameters.items():
            parameter.grad = torch.from_numpy(gradients[name])
        self.session.after_backward()
        self.session.before_step()
        with torch.no_grad():
            for parameter in self.parameters.values():
                parameter.add_(torch.from_numpy(self.numbers.normal(0, 0.2, parameter.shape).astype(np.float32)))
        met = self.values()
        self.session.after_step()
        return met, gradients

    def same(self, expected: dict[str, np.ndarray], step: int) -> int:
        """Compare bit for bit; returns the number of zeros."""
        found = self.values(expected)
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=f"{name} after update {step}")
        return sum(int((value == 0).sum()) for value in found.values())


SCHEDULE = {"warmup_steps": 3, "initial_warmup": 1, "final_warmup": 2, "final_threshold": 0.2}


@pytest.mark.parametrize("kind, options", [
    ("platon", {"beta2": 0.95, "deltaT": 1}), ("platon", {"beta2": 0.5, "deltaT": 4}),
    ("platon", {"beta2": 0.0, "deltaT": 3}), ("platon", {"beta2": 1.0, "deltaT": 3}),
    ("platon", {"beta2": 2.0, "deltaT": 3}), ("sensitivity", {"beta1": 0.5, "deltaT": 2}),
    ("magnitude", {"deltaT": 3}), ("magnitude", {"deltaT": 1, "initial_threshold": 0.7, "initial_warmup": 0}),
])  # fmt: skip
def test_platon_and_its_siblings(kind, options):
    options = {**SCHEDULE, **options}
    drift = Drift(kind, **options)
    theirs = own.Platon(kind, TOTAL, **{"initial_threshold": 1.0, **options})
    zeros = []
    for step in range(TOTAL):
        met, gradients = drift.update(step)
        ratio = theirs.update(step + 1, met, gradients)
        zeros.append(drift.same(met, step))
        assert drift.session.metrics()["prune_target"] == pytest.approx(ratio, abs=1e-12)
    total = sum(int(np.prod(shape)) for shape in SHAPES.values())
    assert zeros[-1] == int(total * 0.8) - 1 and len(set(zeros)) > 3


@pytest.mark.parametrize("selection, options", [
    ("tensor", {}), ("tensor", {"initial_sparsity": 0.25}), ("tensor", {"threshold_decay": 0.6}),
    ("2x2", {}), ("1:4", {"target_sparsity": 0.75}), ("tensor", {"end_pruning_step": 11}),
])  # fmt: skip
def test_gradual_magnitude(selection, options):
    steps = {"pruning_frequency": 2, "begin_pruning_step": 3, "end_pruning_step": -1}
    options = {"target_sparsity": 0.625, **steps, "policy_begin_step": 3, "policy_end_step": 15, **options}
    drift = Drift("gradual_magnitude", weight_selection=selection, prune_biases=False, **options)
    theirs = own.GradualMagnitude(
        **options, block=2 if selection == "2x2" else None, group=4 if selection == "1:4" else None
    )
    weights = [name for name in SHAPES if name.endswith("weight")]
    theirs.attach(drift.values(weights))
    zeros = []
    for step in range(TOTAL):
        met, _ = drift.update(step)  # what lies under a mask keeps its value, and is there when the optimizer steps
        masks = theirs.update(step, {name: met[name] for name in weights})
        zeros.append(drift.same({name: np.where(masks[name], met[name], 0) for name in weights}, step))
    assert zeros[-1] > zeros[4]


@pytest.mark.parametrize("frequency", [2, 3, None])
def test_masks_of_spd(frequency):
    options = {"sparsity": 0.8, "mask_frequency": frequency, "num_prune_epochs": 4.0, "published_schedule": True}
    drift, theirs = Drift("spd_magnitude", **options), own.SpdMasks(0.8, 16, frequency or 1)
    weights, drawn = [name for name in SHAPES if name.endswith("weight")], []
    for step in range(TOTAL):
        met, _ = drift.update(step)
        met = {name: met[name] for name in weights}
        if theirs.update(step + 1, met):
            drawn.append(step + 1)
        zeros = drift.same(met, step)
    assert drawn[-1] < 16 and drawn[0] == (frequency or 1)
    assert 0.7 < zeros / (8 * 12 + 4 * 8) < 0.81


@given(st.integers(1, 60), st.floats(0, 1), st.floats(0, 1), st.integers(0, 20), st.integers(0, 40))
def test_cubic_schedule(t, first, last, start, stop):
    ours = cubic_density(t, initial=first, final=last, start=start, stop=stop)
    assert ours == pytest.approx(own.cubic_ratio(t, first, last, start, stop), abs=1e-12)


@given(st.integers(0, 60), st.floats(0, 1), st.floats(0, 1), st.integers(0, 20), st.integers(1, 40))
def test_gradual_schedule(t, first, last, begin, length):
    ours = gradual_sparsity(t, initial=first, final=last, begin=begin, end=begin + length)
    q = own.gradual_progress(t, begin, begin + length)
    assert ours == pytest.approx(first + (last - first) * q, abs=1e-12)


@given(
    st.sampled_from(["none", "linear", "mixed", "constantLinearWithGap"]), st.integers(0, 100), st.floats(0, 1),
    st.floats(0, 0.05), st.integers(0, 60), st.one_of(st.none(), st.floats(0, 1)),
)  # fmt: skip
def test_replacing_rates(kind, n, rate, k, start, base):
    ours = replacing_rate(n, kind, rate=rate, slope=k, start=start, base=base)
    assert ours == pytest.approx(own_spd.replacing_rate(n, kind, rate, k, start, base), abs=1e-12)


@given(st.integers(0, 2**32 - 1), st.integers(2, 4), st.sampled_from([0.5, 1.0, 3.0]))
def test_losses_of_distillation(seed, classes, temperature):
    mine, theirs = np.random.default_rng(seed).normal(0, 2, (2, 3, classes))
    tensors = torch.from_numpy(mine), torch.from_numpy(theirs)
    assert soft_cross_entropy(*tensors, temperature).item() == pytest.approx(
        own_spd.soft_cross_entropy(mine, theirs, temperature), abs=1e-12
    )
    assert mean_square(*tensors, None).item() == pytest.approx(own_spd.mean_square(mine, theirs), abs=1e-12)
