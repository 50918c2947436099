"""Pruning a sparse model further while its zeros stay, and scores of weights that are put aside."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from head_pruning import HeadPruningError, PruningSession
from tests.core.weights.test_weights import CUBIC, OPTIONS, TOTAL, bits, make_pruner, same, update
from tests.few import few


def sparse(toy, share: float = 0.4) -> tuple[nn.Module, object, dict[str, torch.Tensor]]:
    """A model, its map, and where its weights are not zero."""
    model, unit_map = toy.make()
    draw = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data *= torch.rand(parameter.shape, generator=draw) > share
    return model, unit_map, {name: p.detach() != 0 for name, p in model.named_parameters()}


def begin(model, unit_map, case, **options):
    pruner = make_pruner(case, start_from_zeros=True, **options)
    session = PruningSession(model, unit_map, [pruner], total_steps=TOTAL).attach()
    return torch.optim.AdamW(model.parameters(), lr=1e-2), session, pruner


@pytest.mark.parametrize("case", few(OPTIONS, "platon, retained", "platon, block", "magnitude", "gradual_magnitude"))
def test_zeros_stay_at_every_update_and_the_target_is_reached(toy, case):
    model, unit_map, stay = sparse(toy)
    optimizer, session, pruner = begin(model, unit_map, case)
    for step in range(TOTAL):
        update(toy, model, optimizer, session, step)
        for target in pruner.targets:
            assert not target.parameter[~stay[target.name]].any(), (step, target.name)
    session.harden()
    number = sum(pruner.sizes.values())
    kept = sum(int(torch.count_nonzero(target.parameter)) for target in pruner.targets)
    zeros = sum(int((~stay[target.name]).sum()) for target in pruner.targets)
    assert number - kept > zeros  # it was pruned further
    removed = pruner.count_removed(pruner.final_density(), number)
    if case.split(", ")[-1] in ("pattern", "block", "tensor"):
        # Groups and blocks may have more zeros than they need.
        assert kept <= number - removed + len(pruner.targets) * 12
    elif case != "gradual_magnitude":  # whose thresholds lag here
        assert number - kept == removed - 1
    assert all(not (mask & ~stay[name]).any() for name, mask in pruner.weight_masks().items())


def test_a_model_sparser_than_the_schedule_is_left_so(toy):
    model, unit_map, stay = sparse(toy, 0.9)
    optimizer, session, pruner = begin(model, unit_map, "platon", final_threshold=0.5)
    for step in range(TOTAL):
        update(toy, model, optimizer, session, step)
    session.harden()
    assert all(torch.equal(target.parameter != 0, stay[target.name]) for target in pruner.targets)


@pytest.mark.parametrize(
    "case",
    few(
        ["platon", "platon, nested", "magnitude", "movement", "gradual_magnitude", "platon, block"],
        *("platon", "gradual_magnitude"),
    ),
)
def test_a_run_that_was_killed_ends_bit_equal(toy, case):
    model, unit_map, _ = sparse(toy)
    optimizer, session, _ = begin(model, unit_map, case)
    kept = {}
    for step in range(TOTAL):
        update(toy, model, optimizer, session, step)
        if step in (0, 5, 13, 22):
            state = (model.state_dict(), optimizer.state_dict(), session.state_dict(), session.tensor_state())
            kept[step] = copy.deepcopy(state)
    session.harden()
    for step, (weights, moments, state, tensors) in kept.items():
        again, unit_map, _ = sparse(toy)
        optimizer, other, _ = begin(again, unit_map, case)
        other.metrics()
        again.load_state_dict(weights)
        optimizer.load_state_dict(moments)
        other.load_state_dict({name: np.array(value.tolist()) for name, value in state.items()})
        other.load_tensor_state(tensors)
        assert all(tensor.dtype != torch.bool for tensor in tensors.values())
        for later in range(step + 1, TOTAL):
            update(toy, again, optimizer, other, later)
        other.harden()
        assert same(bits(model), bits(again)), step


def test_a_model_without_zeros_is_refused(toy):
    model, unit_map = toy.make()
    for parameter in model.parameters():
        parameter.data *= parameter.dim() > 1
    _, session, _ = begin(model, unit_map, "magnitude")
    with pytest.raises(HeadPruningError, match="no zeros for --start-from-zeros to keep"):
        session.before_update(0)


def test_without_the_option_zeros_come_back(toy):
    model, unit_map, stay = sparse(toy)
    pruner = make_pruner("platon")
    session = PruningSession(model, unit_map, [pruner], total_steps=TOTAL).attach()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(TOTAL):
        update(toy, model, optimizer, session, step)
    assert any(target.parameter[~stay[target.name]].any() for target in pruner.targets)


class Masked(nn.Module):
    """The masked forward pass in the graph: the gradient of the masked weight reaches every weight."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.mask = nn.Parameter(weight.clone()), torch.ones_like(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = self.weight * self.mask
        self.seen.retain_grad()
        return x @ self.seen.t()


def test_scores_of_retained_weights_go_on_moving():
    """Movement: minus the sum of weight times the gradient of the masked weight, pruned or not; some come back."""
    torch.manual_seed(0)
    model = nn.Linear(6, 5, bias=False)
    graph = Masked(model.weight.detach())
    options = {**CUBIC, "final_threshold": 0.5, "warmup_steps": 2, "mask_policy": "retained", "deltaT": 2}
    pruner = make_pruner("movement", weights_include="weight", **options)
    session = PruningSession(model, None, [pruner], total_steps=TOTAL).attach()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (model, graph)]
    score, returned = torch.zeros(5, 6), 0
    for step in range(TOTAL):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        session.before_update(step)
        for m, optimizer in zip((model, graph), optimizers):
            optimizer.zero_grad()
            (m(x) - x[:, :5].roll(step // 6, 1)).square().sum().backward()
        session.before_step()
        for optimizer in optimizers:
            optimizer.step()
        session.after_step()
        score -= graph.weight.detach() * graph.seen.grad
        mask = pruner.weight_masks().get("weight")
        if mask is not None:
            torch.testing.assert_close(pruner.storage.state["movement"]["weight"], score, rtol=1e-4, atol=1e-5)
            returned += int((mask & (graph.mask == 0)).sum())
            graph.mask = mask.float()
        torch.testing.assert_close(model.weight.detach(), (graph.weight * graph.mask).detach(), rtol=1e-4, atol=1e-5)
    assert returned > 0


def test_a_skipped_step_leaves_no_score(toy):
    model, unit_map = toy.make()
    pruner = make_pruner("movement", mask_policy="retained")
    session = PruningSession(model, unit_map, [pruner], total_steps=TOTAL).attach()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(8):
        update(toy, model, optimizer, session, step)
    before = {name: tensor.clone() for name, tensor in pruner.storage.state["movement"].items()}
    session.before_update(8)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    session.before_step()
    session.skip_update()
    after = pruner.storage.state["movement"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    update(toy, model, optimizer, session, 8)
    assert all(tensor.isfinite().all() for tensor in pruner.storage.state["movement"].values())
