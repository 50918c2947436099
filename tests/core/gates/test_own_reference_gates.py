"""Gates on heads against the published mathematics written once more (tests/reference): no recorded numbers needed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from head_pruning import PruningSession, build_pruner
from head_pruning.gates import GateBank, SoftTopK, gumbel, hard_top_k, plan_rounds
from head_pruning.gates.voita import expected_gates, open_probability, sample_gates
from head_pruning.registry import get_method
from head_pruning.schedules import log_linear
from tests.core.conftest import bert_of
from tests.reference import heads as own
from tests.reference.bert import bert, cross_entropy

CONFIG = {"hidden_size": 12, "num_attention_heads": 3, "intermediate_size": 20, "num_hidden_layers": 2}
CONFIG |= {"vocab_size": 20, "max_position_embeddings": 8, "type_vocab_size": 2}
N = 6
STEPS = 8


@st.composite
def draws(draw):
    """Logits, uniforms, K and the gradient of the mask, for 2 to 9 heads."""
    n = draw(st.integers(2, 9))
    numbers = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([0.1, 1.0, 5.0]))
    return numbers.normal(0, scale, n), numbers.random(n), draw(st.integers(1, n)), numbers.normal(0, 1, n)


@given(draws(), st.sampled_from([0.2, 0.5, 1.0, 10.0, 1000.0]))
def test_soft_top_k_and_its_gradient(drawn, temperature):
    w, u, k, g = drawn
    mask, jacobian = own.soft_top_k(w, u, k, temperature)
    ours = SoftTopK(w + gumbel(u), plan_rounds(len(w), k), temperature)
    # Where a head has all but left the draw, 1 - p keeps few digits of what goes into the logarithm.
    assume(np.abs(jacobian).max() < 1e4)
    np.testing.assert_allclose(ours.mask, mask, rtol=0, atol=1e-9)
    np.testing.assert_allclose(ours.backward(g), g @ jacobian, rtol=0, atol=1e-8 * max(1.0, np.abs(jacobian).max()))


@given(draws())
def test_soft_top_k_is_exact_where_it_is_hard(drawn):
    w, u, k, g = drawn
    mask, jacobian = own.soft_top_k(w, u, k, 1e-9)
    ours = SoftTopK(w + gumbel(u), plan_rounds(len(w), k), 1e-9)
    np.testing.assert_array_equal(ours.mask, mask)
    np.testing.assert_array_equal(ours.backward(g), g @ jacobian)
    assert set(mask) <= {0.0, 1.0} and mask.sum() == k


@given(draws())
def test_straight_through_and_final_masks(drawn):
    w, _, k, _ = drawn
    keep = hard_top_k(w, plan_rounds(len(w), k))
    np.testing.assert_array_equal(keep, own.top_k(w, k))
    if k < len(w):
        np.testing.assert_array_equal(keep, own.straight_through(w, k) == 1.0)
    tied = np.round(w)
    np.testing.assert_array_equal(hard_top_k(tied, plan_rounds(len(w), k)), own.top_k(tied, k))


@given(st.floats(-6, 6), st.floats(0, 1, exclude_max=True))
def test_hard_concrete(log_a, u):
    logits, uniforms = np.array([log_a]), np.array([u])
    gate, slope = sample_gates(logits, uniforms)
    assert gate[0] == pytest.approx(own.l0_gate(log_a, u), abs=1e-9)
    assert expected_gates(logits)[0] == pytest.approx(own.l0_evaluation_gate(log_a), abs=1e-12)
    p, dp = open_probability(logits)
    assert p[0] == pytest.approx(own.l0_open(log_a), abs=1e-12)
    assert dp[0] == pytest.approx(own.slope(own.l0_open, log_a), abs=1e-8)
    assume(min(abs(gate[0] - edge) for edge in (0.0, 1.0)) > 1e-4 or gate[0] in (0.0, 1.0))
    around = {own.l0_gate(log_a + step, u) for step in (-1e-5, 1e-5)}
    if gate[0] in (0.0, 1.0):
        assume(around == {gate[0]})
    assert slope[0] == pytest.approx(own.slope(lambda x: own.l0_gate(x, u), log_a), abs=1e-6)


@given(st.floats(1e-3, 1e4), st.floats(1e-9, 1e-4), st.integers(1, 1000), st.integers(0, 1200))
def test_temperatures(initial, final, cooldown, step):
    ours = log_linear(step, initial=initial, final=final, steps=cooldown)
    assert ours == pytest.approx(own.temperature(step, initial, final, cooldown), rel=1e-9)


# -- in a model -------------------------------------------------------------------------------------------------------


def drawn_bert(seed: int = 0):
    """A BERT with weights large enough for its heads to differ, in float64."""
    found = bert_of(CONFIG)
    numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in found.model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=numbers) * 0.4)
    found.model.double().eval()
    found.state = {name: value.numpy().copy() for name, value in found.model.state_dict().items()}
    return found


def drawn_batch(seed: int, rows: int = 3, length: int = 6) -> dict[str, np.ndarray]:
    numbers = np.random.default_rng(seed)
    lengths = numbers.integers(2, length + 1, rows)
    mask = (np.arange(length)[None] < lengths[:, None]).astype(np.int64)
    return {
        "input_ids": numbers.integers(1, 20, (rows, length)) * mask,
        "attention_mask": mask,
        "token_type_ids": numbers.integers(0, 2, (rows, length)),
        "labels": numbers.integers(0, 2, rows),
    }


def own_loss(state: dict, batch: dict, gates: np.ndarray) -> float:
    return cross_entropy(bert([state] * 2, batch, 3, gates)[0], batch["labels"])


@pytest.mark.parametrize("seed", range(3))
def test_gates_scale_the_probabilities(seed):
    """They are attached to the input of the output projection."""
    found, batch = drawn_bert(seed), drawn_batch(seed)
    values = np.random.default_rng(seed).choice([0.0, 0.5, 1.0, 1.5], (2, 3))
    gates = GateBank(found.model, found.unit_map)
    gates.attach()
    for mask in (np.ones((2, 3)), values, np.zeros((2, 3))):
        gates.set_fixed(mask.reshape(-1))
        with torch.no_grad():
            loss, logits = found.loss(batch)
        np.testing.assert_allclose(logits, bert([found.state] * 2, batch, 3, mask)[0], rtol=0, atol=1e-10)
        assert loss.item() == pytest.approx(own_loss(found.state, batch, mask), abs=1e-10)


@pytest.mark.parametrize("method", ["dsp", "ste", "voita"])
def test_a_pipelined_run(method):
    """Logits after each update, from the losses of the written-out model alone: its gradients are differences."""
    found, numbers = drawn_bert(), np.random.default_rng(5)
    w, noise = numbers.normal(0, 1, N), numbers.random((STEPS, N))
    shared = {"pruning_lr": 0.3, "gate_clip_norm": 0.0, "gate_weight_decay": 0.01, "gate_adam_beta2": 0.97}
    options = {
        "dsp": {"num_of_heads": 2, "annealing": True, "initial_temperature": 4.0, "final_temperature": 0.3},
        "ste": {"num_of_heads": 2, "use_ste": True},
        "voita": {"l0_penalty": 0.02, "l0_pipelined": True},
    }[method]
    if method == "dsp":
        options |= {"cooldown_steps": 5, "noise_after_cooldown": True}
    gates = build_pruner(get_method(method), SimpleNamespace(**options, **shared))
    session = PruningSession(found.model.train(), found.unit_map, [gates], total_steps=STEPS).attach()
    assert session.freezes_model
    gates.logits[:], gates.noise = w, lambda step: noise[step]
    adam = own.Adam(0.3, beta2=0.97, decay=0.01)
    for step in range(STEPS):
        batch = drawn_batch(100 + step)
        session.before_update(step)
        loss, _ = found.loss(batch)
        loss.backward()
        session.after_backward()
        session.before_step()
        session.after_step(lr_factor=1.0 - step / STEPS)
        if method == "dsp":
            mask, jacobian = own.soft_top_k(w, noise[step], 2, own.temperature(step, 4.0, 0.3, 5))
        elif method == "ste":
            mask, jacobian = own.straight_through(w, 2), np.eye(N)
        else:
            mask = np.array([own.l0_gate(*pair) for pair in zip(w, noise[step])])
            slopes = [own.slope(lambda x, u=u: own.l0_gate(x, u), a) for a, u in zip(w, noise[step])]
            jacobian = np.diag(slopes)
        shape = mask.reshape(2, 3)
        # The gates are float32 on the model.
        assert loss.item() == pytest.approx(own_loss(found.state, batch, shape), abs=1e-6), step
        g = own.gradient(lambda gates, batch=batch: own_loss(found.state, batch, gates), shape).reshape(-1) @ jacobian
        if method == "voita":
            g += 0.02 * np.array([own.slope(own.l0_open, a) for a in w])
        w = adam.step(w, g, 1.0 - step / STEPS)
        np.testing.assert_allclose(gates.logits, w, rtol=0, atol=3e-5, err_msg=str(step))
    keep = w > 0 if method == "voita" else own.top_k(w, 2)
    np.testing.assert_array_equal(session.harden().keep, keep)
