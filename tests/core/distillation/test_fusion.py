"""Fused hidden states: loss and gradients are those of the definition, and hold no more than a state of memory."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.alive import Alive
from head_pruning.distillation.engine import fusion
from head_pruning.distillation.engine.fusion import fused_loss, shares


def by_definition(mine, theirs, window, *, mask, pairs, per_example, published):
    """The loss as its definition reads, one fused state after the other."""
    real = torch.ones(mine[0].shape[:2], dtype=mine[0].dtype) if mask is None else mask.to(mine[0].dtype)
    dims = (1, 2) if per_example else (0, 1, 2)

    def fuse(states):
        parts = shares(torch.stack([(state * real[..., None]).sum(dims) for state in states]), published=published)
        return sum(state * (part[:, None, None] if per_example else part) for state, part in zip(states, parts))

    targets = list(theirs)
    for i in reversed(range(len(targets) - 1)):
        targets[i] = fuse([targets[i], targets[i + 1]])
    padded = [*mine, *[mine[-1]] * (window - 1)]
    size = (real.sum() * mine[0].shape[-1]).clamp(min=1)
    far = [(fuse(padded[i : i + window]) - targets[j]) * real[..., None] for i, j in pairs]
    return sum(each.square().sum() for each in far) / size


@pytest.fixture(autouse=True)
def in_slices(monkeypatch):
    """As where one state is much."""
    monkeypatch.setattr(fusion, "_AT_ONCE", {})


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    depth=st.integers(1, 5),
    window=st.integers(1, 6),
    tokens=st.integers(1, 40),
    masked=st.booleans(),
    same_pairs=st.booleans(),
    per_example=st.booleans(),
    published=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_it_is_the_definition(depth, window, tokens, masked, same_pairs, per_example, published, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (3, tokens, 4)
    theirs = [torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(5)]
    mine = [torch.rand(shape, generator=generator, dtype=torch.float64) - 0.1 for _ in range(depth)]
    mask = torch.rand(shape[:2], generator=generator) < 0.7 if masked else None
    if masked and published:
        mask[:, 0] = True  # an example without tokens has no shares there: 0 / 0
    pairs = [(0, 0)] if depth == 1 else [(i, round(i * 4 / (depth - 1))) for i in range(depth)]
    pairs = [*pairs, (depth - 1, 1), (0, 1)] if same_pairs else pairs
    layers = ",".join(f"{i}:{j}" for i, j in pairs)
    options = {"mask": mask, "per_example": per_example, "published": published}
    outcomes = []
    for function, words in ((fused_loss, {"layers": layers}), (by_definition, {"pairs": pairs})):
        leaves = [state.clone().requires_grad_() for state in mine]
        loss = function(leaves, theirs, window, **words, **options)
        outcomes.append((loss.detach(), *torch.autograd.grad(3 * loss, leaves)))
    for ours, expected in zip(*outcomes):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10)


def test_autocast_rounds_nothing():
    generator = torch.Generator().manual_seed(0)
    mine, theirs = ([torch.rand(2, 9, 8, generator=generator) for _ in range(3)] for _ in range(2))
    leaves = [state.requires_grad_() for state in mine]
    loss = fused_loss(leaves, theirs, 2)
    with torch.autocast("cpu", torch.bfloat16):
        again = fused_loss(leaves, theirs, 2)
        rounded = torch.autograd.grad(again, leaves)
    assert torch.equal(again, loss)
    assert all(map(torch.equal, rounded, torch.autograd.grad(loss, leaves)))


@pytest.mark.parametrize("options", [{}, {"mask": True}, {"mask": True, "per_example": True}])
def test_no_more_memory_than_a_state(options):
    generator = torch.Generator().manual_seed(0)
    mine, theirs = ([torch.rand(4, 128, 256, generator=generator) for _ in range(6)] for _ in range(2))
    leaves = [state.requires_grad_() for state in mine]
    if "mask" in options:
        options = {**options, "mask": torch.rand(4, 128, generator=generator) < 0.7}
    state = mine[0].nbytes
    with Alive() as forward:
        loss = fused_loss(leaves, theirs, 3, **options)
    assert 0 < forward.most <= state
    with Alive() as backward:
        gradients = torch.autograd.grad(loss, leaves)
    assert len(gradients) * state <= backward.most <= (len(gradients) + 1.05) * state
