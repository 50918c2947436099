"""Weight pruners against trajectories recorded from the published code, and the specification's golden values."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from head_pruning import PruningSession, build_pruner
from head_pruning.registry import get_method, methods
from head_pruning.schedules import cubic_density, gradual_sparsity

STEPS = 60
PLATON = ["default_dT5", "dT1", "magnitude", "beta2_1", "beta2_0", "init0.8_warm0"]
INTEL = ["unstructured", "unstructured_decay", "block_2", "uniform_b4"]


class MLP(nn.Module):
    """The recorded model: only its parameters matter."""

    def __init__(self) -> None:
        super().__init__()
        self.intermediate, self.output = nn.Module(), nn.Module()
        self.intermediate.dense, self.output.dense = nn.Linear(12, 20), nn.Linear(20, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)


def start(model: nn.Module, name: str, total: int = STEPS, **options) -> tuple[PruningSession, object]:
    pruner = build_pruner(get_method(name, methods("weights")), SimpleNamespace(**options))
    return PruningSession(model, None, [pruner], total_steps=total).attach(), pruner


@pytest.fixture(scope="module")
def about(reference) -> dict:
    return json.loads((reference / "pruners.json").read_text())


@pytest.mark.parametrize("case", PLATON)
def test_platon_trajectories_mask_by_mask(case, about, load_arrays):
    """Weights after each step bit for bit, so every mask; averages and thresholds to rounding."""
    recorded, told = load_arrays(f"platon_{case}.npz"), about[f"platon_{case}"]
    model = MLP()
    session, pruner = start(model, told["pruner"], weights_include="dense", **told["args"])
    pruner.first_step = 0  # the recording's first call passes 0
    parameters = dict(model.named_parameters())
    states = {"average": "exp_avg_ipt", "uncertainty": "exp_avg_unc"}
    masked = compared = 0
    for t in range(STEPS):
        session.before_update(t)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(torch.from_numpy(recorded[f"{name}.before.{t}"]))
                parameter.grad = torch.from_numpy(recorded[f"{name}.grad.{t}"])
        session.after_step()
        for name, parameter in parameters.items():
            expected = recorded.get(f"{name}.after.{t}", recorded[f"{name}.before.{t}"])
            assert np.array_equal(parameter.detach().numpy(), expected), (name, t)
            for state, kind in states.items():
                if state in pruner.storage.state and f"{name}.{kind}.{t}" in recorded:
                    found = pruner.storage.state[state][name].abs().numpy()
                    np.testing.assert_allclose(found, recorded[f"{name}.{kind}.{t}"], rtol=1e-4, atol=1e-9)
                    compared += 1
        metrics = session.metrics()
        assert metrics["prune_target"] == recorded["ratio"][t]
        assert pruner.due(t) == recorded["masked"][t]
        if pruner.due(t):
            masked += 1
            assert metrics["mask_threshold"] == pytest.approx(recorded["threshold"][t], rel=1e-4)
    assert masked == told["n_mask_steps"] and (compared > 0) == (told["pruner"] == "PLATON")
    zeros = sum(int((parameters[name] == 0).sum()) for name in told["pruned"])
    assert zeros == told["zeros_final"] and session.at_target()
    assert session.metrics()["weights_kept"] == 1 - zeros / told["total"]


@pytest.mark.parametrize("case", INTEL)
def test_gradual_magnitude_trajectories_mask_by_mask(case, about, load_arrays):
    recorded, told = load_arrays(f"intel_{case}.npz"), about[f"intel_{case}"]
    options = {**told["kw"], **told["config"]}
    selection = {"block_2": "2x2", "uniform_b4": "1:4"}.get(case, "tensor")
    options = {name: value for name, value in options.items() if not name.startswith("block")}
    model, initial = MLP(), load_arrays("mlp_init_data.npz")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(initial[name]))
    session, _ = start(
        model, "gradual_magnitude", weights_include="dense", prune_biases=False, weight_selection=selection, **options
    )
    pruned = 0
    for t in range(STEPS):
        session.before_update(t)
        session.before_step()
        for module in told["pruned"]:
            with torch.no_grad():
                weight = model.get_parameter(f"{module}.weight")
                weight.copy_(torch.from_numpy(recorded[f"{module}.weight_original.w.{t}"]))
        session.after_step()
        for module in told["pruned"]:
            mask = recorded[f"{module}.mask.{t}"]
            expected = recorded[f"{module}.weight_original.w.{t}"] * mask
            assert np.array_equal(model.get_parameter(f"{module}.weight").detach().numpy(), expected), (module, t)
            pruned += int((mask == 0).sum())
    assert pruned > 0
    assert session.metrics()["weights_kept"] == pytest.approx(1 - told["sparsity_final"])


def test_schedule_at_the_papers_scale(load_arrays):
    recorded = load_arrays("platon_schedule.npz")
    total, start_, stop = 88000, 5400, 88000 - 5 * 5400
    assert recorded["step"][-1] <= total
    found = [cubic_density(int(t), initial=1.0, final=0.1, start=start_, stop=stop) for t in recorded["step"]]
    np.testing.assert_allclose(found, recorded["ratio"], rtol=0, atol=1e-12)


def test_gradual_schedule_golden_values():
    found = [gradual_sparsity(t, initial=0.0, final=1.0, begin=0, end=4) for t in range(5)]
    assert found == pytest.approx([0, 0.578125, 0.875, 0.984375, 1])


def test_platon_golden_values():
    """The specification's five weights: averages, thresholds and results at t = 3, 6, 9 and 12."""
    gradients = torch.tensor([
        [1, 0.5, -0.2, 0.1, 0.3], [-0.4, 0.2, 0.6, -0.3, 0.1], [0.2, 0.2, 0.2, 0.2, 0.2],
        [0.9, -0.1, 0.05, 0.2, -0.6], [0.3, 0.3, -0.3, 0.1, 0.2], [0.1, 0.7, 0.2, -0.2, 0.4],
    ])  # fmt: skip
    model = nn.Module()
    model.theta = nn.Parameter(torch.zeros(5))
    session, pruner = start(
        model, "platon", 12, weights_include="theta", warmup_steps=3, initial_warmup=1, final_warmup=1,
        final_threshold=0.2, beta1=0.85, beta2=0.95, deltaT=3,
    )  # fmt: skip
    averages = {3: [0.07, 0.07, 0.12, 0.08, 0.1], 6: [0.1295, 0.1195, 0.1845, 0.168, 0.335],
                12: [0.227314, 0.265339, 0.343301, 0.32338, 0.662038]}  # fmt: skip
    uncertainty = {
        3: [0.019833, 0.019833, 0.034, 0.022667, 0.028333],
        6: [0.0357, 0.032867, 0.050575, 0.046467, 0.0935],
    }
    ratios = {4: 0.662963, 5: 0.437037, 6: 0.3, 9: 0.2}
    thresholds = {6: 0.0078064, 9: 0.02537596, 10: 0.02537596, 11: 0.02537596, 12: 0.03052109}
    results = {6: [0, 0, 3, -4, 5], 9: [0, 0, 3, 0, 5], 12: [0, 0, 3, 0, 5]}
    for t in range(1, 13):
        session.before_update(t - 1)
        with torch.no_grad():
            model.theta.copy_(torch.tensor([1.0, -2, 3, -4, 5]))
        model.theta.grad = gradients[(t - 1) % 6].clone()
        session.after_step()
        metrics = session.metrics()
        if t in averages:
            assert pruner.storage.state["average"]["theta"].abs().tolist() == pytest.approx(averages[t], abs=1e-6)
        if t in uncertainty:
            assert pruner.storage.state["uncertainty"]["theta"].tolist() == pytest.approx(uncertainty[t], abs=1e-6)
        if t in ratios:
            assert metrics["prune_target"] == pytest.approx(ratios[t], abs=1e-6)
        if t in thresholds:
            assert metrics["mask_threshold"] == pytest.approx(thresholds[t], abs=1e-7)
        if t in results:
            assert model.theta.tolist() == results[t]
        if t < 6:
            assert model.theta.tolist() == [1, -2, 3, -4, 5]
