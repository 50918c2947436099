"""The session on a small encoder-decoder: what it puts on, what it does in an update, what it takes off."""

import copy
import dataclasses
import json
import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from head_pruning import (
    AttentionSite,
    HeadMask,
    HeadPruningError,
    Pruner,
    PruningSession,
    UnfiredSiteError,
    UnitMap,
    build_pruner,
    methods,
)
from head_pruning.gates import GateBank
from head_pruning.gates.voita import _OPEN_SHIFT, STRETCH, TEMPERATURE

TOKENS = 24
TINY = torch.finfo(torch.float64).tiny
# Of methods that are tested with other options than those of their example and 5 heads.
OPTIONS = {
    "dsp": {"num_of_heads": 5, "annealing": True, "initial_temperature": 1.0, "cooldown_steps": 8},
    "voita": {"l0_penalty": 2.0},
    "given": {},
}
COUNTED = sorted(name for name, method in methods().items() if "num_of_heads" in method.options)


def build(toy, name="dsp", seed=0, session=None, **options):
    """Model, session and pruner, attached."""

    class Given:
        joint_pruning = True

    given = Given()
    method = methods()[name]
    given.__dict__.update({**OPTIONS.get(name, {**method.example, "num_of_heads": 5}), **options})
    model, unit_map = toy.make(seed)
    pruner = build_pruner(method, given)
    return model, PruningSession(model, unit_map, [pruner], **(session or {})).attach(), pruner


def update(toy, model, session, step, optimizer=None):
    """One whole update with one micro-batch."""
    session.before_update(step)
    if optimizer is not None:
        optimizer.zero_grad()
    loss = session.loss(toy.loss(model, toy.batch(step)))
    loss.backward()
    session.after_backward(denominator=TOKENS)
    if optimizer is not None:
        optimizer.step()
    session.after_step()
    return loss


def outputs(toy, model, step=0):
    with torch.no_grad():
        return model(*toy.batch(step)[:2])


# -- gates on and off ----------------------------------------------------------------------------------------------


def test_open_gates_leave_outputs_and_gradients_bit_equal(toy):
    model, unit_map = toy.make()
    plain = copy.deepcopy(model).eval()
    gates = GateBank(model.eval(), unit_map)
    gates.attach()
    with gates.forced("training"):
        loss = toy.loss(model, toy.batch(0))
    assert torch.equal(loss, toy.loss(plain, toy.batch(0)))
    loss.backward()
    toy.loss(plain, toy.batch(0)).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters()))


@pytest.mark.parametrize("head", [0, 4, 8, 11])
def test_a_closed_gate_equals_zeroed_columns_of_the_output_projection(toy, head):
    model, unit_map = toy.make()
    cut = copy.deepcopy(model).eval()
    site, index = unit_map.attention[head // 3], head % 3
    columns = slice(index * site.head_dim, (index + 1) * site.head_dim)
    with torch.no_grad():
        cut.get_submodule(site.out_proj).weight[:, columns] = 0.0
    gates = GateBank(model.eval(), unit_map)
    gates.attach()
    values = np.ones(12)
    values[head] = 0.0
    gates.set_evaluation(values)
    assert torch.equal(outputs(toy, model), outputs(toy, cut))
    assert not torch.equal(outputs(toy, model), outputs(toy, toy.make()[0].eval()))


def test_a_copied_model_has_gates_of_its_own(toy):
    model, session, pruner = build(toy)
    session.before_update(0)
    twin = copy.deepcopy(model)
    model.eval(), twin.eval()
    assert torch.equal(outputs(toy, model), outputs(toy, twin))
    kept = outputs(toy, twin)
    session.gates.set_evaluation(np.zeros(12))
    assert torch.equal(outputs(toy, twin), kept)
    assert not torch.equal(outputs(toy, model), kept)
    toy.loss(twin.train(), toy.batch(0)).backward()
    assert not session.gates.gradients.any()
    session.detach()
    assert torch.equal(outputs(toy, twin.eval()), kept)


def test_gradients_of_gates_survive_activation_checkpointing(toy):
    model, session, _ = build(toy)
    model.eval()
    found = []
    for wrap in (False, True):
        session.before_update(0)
        source, target, labels = toy.batch(0)
        with session.gates.forced("training"):
            out = checkpoint(model, source, target, use_reentrant=False) if wrap else model(source, target)
            nn.functional.cross_entropy(out.flatten(0, 1), labels.flatten(), reduction="sum").backward()
        found.append(session.gates.gradients.clone())
    assert found[0].any() and torch.equal(*found)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_gate_gradients_of_other_precisions(dtype, tolerance):
    """A float16 sum over 16 384 tokens would overflow; the gates keep theirs in float32."""
    unit_map = UnitMap((AttentionSite("a", "encoder_self", "l", 4, 4, "0"),))
    x = torch.randn(16384, 16, generator=torch.Generator().manual_seed(0))
    found = []
    for kind in (torch.float32, dtype):
        torch.manual_seed(0)
        model = nn.ModuleList([nn.Linear(16, 16)]).to(kind)
        gates = GateBank(model, unit_map)
        gates.attach()
        gates.set_training(np.array([1.3, 0.7, 0.1, 1 / 3]))
        y = model[0](x.to(kind))
        assert y.dtype == kind
        (y.float() ** 2).sum().mul(16.0).backward()
        found.append(gates.gradients.clone())
    assert found[0].abs().max() > 65504
    torch.testing.assert_close(found[1], found[0], rtol=tolerance, atol=tolerance * float(found[0].abs().max()))


@pytest.mark.parametrize("training", [True, False])
def test_gates_set_before_the_model_moves_follow_it(toy, training):
    model, unit_map = toy.make()
    gates = GateBank(model, unit_map)
    gates.attach()
    gates.set_training(np.arange(unit_map.num_heads))
    gates.set_evaluation(np.arange(unit_map.num_heads))
    model.to("meta").train(training)
    source, target, _ = (tensor.to("meta") for tensor in toy.batch(0))
    assert model(source, target).device.type == "meta"
    gates.set_evaluation(np.ones(unit_map.num_heads))
    assert gates.evaluation_values.device.type == "meta"


def test_gates_of_a_model_on_several_devices_stay_those_of_the_bank():
    """The second projection is elsewhere: its gate is copied there in passing, and set in the bank ever after."""
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4, device="meta")])
    sites = (AttentionSite(name, "encoder_self", name, 2, 2, name) for name in "01")
    gates = GateBank(model, UnitMap(tuple(sites)))
    gates.attach()
    gates.set_evaluation(np.zeros(4))
    model.eval()
    for module, device in zip(model, ("cpu", "meta")):
        assert module(torch.ones(1, 4, device=device)).device.type == device
    for (_, gate), start in zip(gates._targets, (0, 2)):
        assert gate.evaluation_gate.data_ptr() == gates.evaluation_values[start:].data_ptr()
    gates.set_evaluation(np.arange(4))
    assert [gate.evaluation_gate.tolist() for _, gate in gates._targets] == [[0, 1], [2, 3]]


def test_gates_reach_a_model_that_ran_compiled_before():
    """torch.compile does not look whether hooks came or went since it compiled."""
    model, x = nn.Sequential(nn.Linear(4, 4)).eval(), torch.ones(1, 4)
    gates = GateBank(model, UnitMap((AttentionSite("a", "encoder_self", "a", 2, 2, "0"),)))
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        dense = compiled(x)
        for values in ([0, 1], [0, 0]):
            gates.attach()
            gates.set_evaluation(np.array(values))
            assert torch.equal(compiled(x), model(x)) and not torch.equal(compiled(x), dense)
            gates.detach()
            assert torch.equal(compiled(x), dense)


class Around(nn.Module):
    """A wrapper that runs all of what it wraps, as those that shard modules do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class Adapted(Around):
    """A wrapper with a path of its own past what it wraps."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.low = nn.Linear(inner.in_features, inner.out_features)

    def forward(self, x):
        return self.inner(x) + self.low(x)


@pytest.mark.parametrize("wrap", [Adapted, lambda module: nn.Linear(module.in_features, module.out_features)])
def test_a_gated_module_must_stay_in_its_place(toy, wrap):
    model, session, _ = build(toy)
    model.decoder.out = Around(model.decoder.out)
    update(toy, model, session, 0)
    session.detach()
    session.attach()
    model.encoder[1].out = wrap(model.encoder[1].out)
    with pytest.raises(HeadPruningError, match="encoder.1.out was wrapped or replaced after the gates"):
        session.before_update(1)
    session.detach()
    session.attach()  # follows
    update(toy, model, session, 1)
    assert len(model.encoder[1].out._forward_pre_hooks) == 1


def test_the_map_must_name_modules_of_the_model(toy):
    model, unit_map = toy.make()
    with pytest.raises(HeadPruningError, match="no module decoder.out"):
        GateBank(nn.ModuleDict({"cross": model.cross, "encoder": model.encoder}), unit_map)


# -- the gradient of an update -------------------------------------------------------------------------------------


def hard_concrete_graph(log_a, u):
    noise = (1 - 2e-6) * u + 1e-6
    s = torch.sigmoid((torch.log(noise) - torch.log(1 - noise) + log_a) / TEMPERATURE)
    return (s * (STRETCH[1] - STRETCH[0]) + STRETCH[0]).clamp(0, 1)


def gumbel_graph(logits, u, keep, temperature):
    r = logits - torch.log(-torch.log(u))
    mask = torch.zeros_like(r)
    for _ in range(keep):
        p = torch.softmax(r / temperature, -1)
        mask = mask + p
        r = r + torch.log((1 - p).clamp_min(TINY))
    return mask


def written_by_hand(toy, name, logits, u, micro_batches, penalty, temperature=1.0):
    """Gradient of ``sum_i (loss_i + lambda * sum p_open) / tokens`` with the gates in the graph."""
    leaf = torch.from_numpy(logits.copy()).requires_grad_(True)
    model, unit_map = toy.make()
    model.eval()
    u = torch.from_numpy(u)
    if name == "voita":
        gates = hard_concrete_graph(leaf, u)
    elif name == "dsp":
        gates = gumbel_graph(leaf, u, 5, temperature)
    else:
        kept = torch.zeros(12, dtype=torch.float64)
        kept[leaf.detach().argsort(descending=True)[:5]] = 1.0
        gates = kept + leaf - leaf.detach()
    for site, where in unit_map.slices():
        scale = gates[where].float().repeat_interleave(site.head_dim)
        model.get_submodule(site.out_proj).register_forward_pre_hook(lambda module, args, s=scale: (args[0] * s,))
    total = 0.0
    for step in range(micro_batches):
        total = total + toy.loss(model, toy.batch(step)) + penalty * torch.sigmoid(leaf - _OPEN_SHIFT).sum()
    (total / (TOKENS * micro_batches)).backward()
    return leaf.grad.numpy()


def accumulate(toy, model, session, micro_batches, loss_scale=1.0):
    """Backward passes of an update on an evaluation-mode model (no dropout), gates as in training."""
    session.before_update(0)
    with session.gates.forced("training"):
        for step in micro_batches:
            (loss_scale * session.loss(toy.loss(model, toy.batch(step)))).backward()


@pytest.mark.parametrize("loss_scale", [1.0, 128.0])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("name", ["dsp", "ste", "voita"])
def test_gradient_of_micro_batches_equals_the_written_objective(toy, name, micro_batches, loss_scale):
    options = {"annealing": False, "final_temperature": 1.0} if name == "dsp" else {}
    model, session, pruner = build(toy, name, gate_clip_norm=0.0, **options)
    accumulate(toy, model.eval(), session, range(micro_batches), loss_scale)
    session.after_backward(loss_scale, denominator=TOKENS * micro_batches, micro_batches=micro_batches)
    expected = written_by_hand(
        toy, name, pruner.logits, pruner.uniforms(0), micro_batches, 2.0 if name == "voita" else 0.0
    )
    assert np.abs(expected).max() > 1e-4
    np.testing.assert_allclose(pruner.gradient, expected, rtol=2e-5, atol=2e-6 * np.abs(expected).max())


def test_a_mean_loss_adds_the_penalty_once(toy):
    model, session, pruner = build(toy, "voita", gate_clip_norm=0.0)
    accumulate(toy, model.eval(), session, [0], 1 / TOKENS)
    session.after_backward()
    # The same objective per token: the penalty weighs lambda, not lambda / tokens.
    expected = written_by_hand(toy, "voita", pruner.logits, pruner.uniforms(0), 1, 2.0 * TOKENS)
    np.testing.assert_allclose(pruner.gradient, expected, rtol=2e-5, atol=1e-7)


def test_ranks_add_their_gradients_and_counts(toy):
    """Two ranks with one and two micro-batches give what one process with all three gives."""
    one_model, one, pruner = build(toy, "voita", gate_clip_norm=0.0)
    accumulate(toy, one_model.eval(), one, [0, 1, 2])
    one.after_backward(denominator=3 * TOKENS, micro_batches=3)
    sent = []
    other_model, other, _ = build(
        toy, "voita", gate_clip_norm=0.0, session={"all_reduce": lambda t: sent.append(t.clone())}
    )
    accumulate(toy, other_model.eval(), other, [1, 2])
    other.after_backward(denominator=2 * TOKENS, micro_batches=2)
    model, session, ranked = build(toy, "voita", gate_clip_norm=0.0, session={"all_reduce": lambda t: t.add_(sent[0])})
    accumulate(toy, model.eval(), session, [0])
    session.after_backward(denominator=TOKENS, micro_batches=1)
    np.testing.assert_allclose(ranked.gradient, pruner.gradient, rtol=1e-6)


def test_clipping_keeps_the_direction(toy):
    gradients = []
    for limit in (0.0, 1e-3):
        model, session, pruner = build(toy, "ste", gate_clip_norm=limit)
        accumulate(toy, model.eval(), session, [0])
        session.after_backward(denominator=TOKENS)
        gradients.append(pruner.gradient.copy())
        assert pruner.gradient_norm == pytest.approx(np.linalg.norm(gradients[0]), rel=1e-12)
        session.after_step()
        assert session.metrics()["gate_clip"] == (100.0 if limit else 0.0)
    assert np.linalg.norm(gradients[1]) == pytest.approx(1e-3, rel=1e-12)
    np.testing.assert_allclose(gradients[1] / 1e-3, gradients[0] / np.linalg.norm(gradients[0]), rtol=1e-12)


def test_huge_but_finite_gradients_are_clipped_not_skipped(toy):
    model, session, pruner = build(toy, "ste")
    pruner.chain = lambda gradient: np.full(12, 1e200)
    session.before_update(0)
    toy.loss(model, toy.batch(0)).backward()
    session.after_backward()
    assert pruner.skipped_steps == 0 and np.linalg.norm(pruner.gradient) == pytest.approx(1.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["dsp", "ste", "voita"])
def test_a_gradient_that_is_not_finite_skips_the_gate_step(toy, caplog, name, bad):
    model, session, pruner = build(toy, name)
    update(toy, model, session, 0)
    before = pruner.state_dict()
    for count in (1, 2):
        session.before_update(count)
        toy.loss(model, toy.batch(count)).backward()
        session.gates.gradients[4] = bad
        with caplog.at_level(logging.WARNING):
            session.after_backward(denominator=TOKENS)
        session.after_step()
        assert f"({count} so far)" in caplog.messages[-1] and session.metrics()["gate_skip"] == count
    after = pruner.state_dict()
    for key in ("logits", "adam.first", "adam.second", "adam.steps"):
        np.testing.assert_array_equal(before[key], after[key])
    update(toy, model, session, 3)
    assert (pruner.logits != before["logits"]).any() and np.isfinite(pruner.logits).all()


def test_logits_never_reach_the_hosts_optimizer(toy):
    model, session, pruner = build(toy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    logits = pruner.logits.copy()
    session.before_update(0)
    toy.loss(model, toy.batch(0)).backward()
    optimizer.step()
    np.testing.assert_array_equal(pruner.logits, logits)


def test_an_update_with_lr_factor_zero_moves_nothing(toy):
    model, session, pruner = build(toy)
    logits = pruner.logits.copy()
    session.before_update(0)
    toy.loss(model, toy.batch(0)).backward()
    session.after_backward(denominator=TOKENS)
    session.after_step(lr_factor=0.0)
    np.testing.assert_array_equal(pruner.logits, logits)
    assert pruner.adam.steps == 1


# -- draws, evaluation, the outcome --------------------------------------------------------------------------------


def test_draws_depend_on_seed_and_step_only(toy):
    def draws(seed, steps):
        options = {"annealing": False, "final_temperature": 1.0}  # so that nothing but the noise can differ
        _, session, pruner = build(toy, session={"seed": seed}, **options)
        pruner.logits[:] = 0.0
        found = []
        for step in steps:
            session.before_update(step)
            found.append(session.gates.training_values.numpy().copy())
        return found

    first, again = draws(1, [0, 1, 2]), draws(1, [2, 1, 0])[::-1]
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], first[1]) and not np.array_equal(first, draws(2, [0, 1, 2]))


def test_evaluation_uses_exactly_k_heads_and_no_noise(toy):
    model, session, pruner = build(toy)
    for step in range(3):
        update(toy, model, session, step)
    mask = session.head_mask()
    assert mask.kept == 5
    np.testing.assert_array_equal(session.gates.evaluation_values.numpy(), mask.keep)
    session.before_update(3)
    in_training = outputs(toy, model.train())
    with session.evaluating():
        model.dropout.eval()
        forced = outputs(toy, model)
    assert torch.equal(forced, outputs(toy, model.eval()))
    assert not torch.equal(forced, in_training)


def test_sampled_evaluation_is_the_training_draw(toy):
    _, session, _ = build(toy, sample_in_eval=True)
    session.before_update(0)
    assert torch.equal(session.gates.evaluation_values, session.gates.training_values)
    assert not torch.equal(session.gates.evaluation_values, session.gates.evaluation_values.round())


@pytest.mark.parametrize("name", COUNTED)
def test_hardening_fixes_the_outcome(toy, name):
    model, session, pruner = build(toy, name, session={"total_steps": 8})
    for step in range(3):
        update(toy, model, session, step)
    expected = session.head_mask()
    mask = session.harden()
    assert mask == expected and session.at_target()
    assert mask.kept == 5 or name == "voita"
    for step in range(3, 5):
        update(toy, model, session, step)
        np.testing.assert_array_equal(session.gates.training_values.numpy(), mask.keep)
        np.testing.assert_array_equal(session.gates.evaluation_values.numpy(), mask.keep)
    assert session.harden() == mask
    session.detach()


@pytest.mark.parametrize("name", COUNTED)
def test_minima_hold_in_the_outcome(toy, name):
    counts = {"num_of_heads": 6, "min_heads_per_layer": 1, "min_heads_per_kind": 2}
    model, session, pruner = build(toy, name, **counts)
    for learnt in ("logits", "scores"):
        if hasattr(pruner, learnt):  # all of the encoder, nothing of the decoder
            getattr(pruner, learnt)[:] = np.where(np.arange(12) < 6, 3.0, -3.0)
    keep = session.head_mask().keep.reshape(4, 3)
    assert keep.sum() == 6 and (keep.sum(1) >= 1).all() and keep[:2].sum() >= 2 and (keep[2:].sum(1) >= 2).all()


def test_voita_without_k_still_keeps_the_minimum_per_layer(toy):
    _, session, pruner = build(toy, "voita", min_heads_per_layer=1, min_heads_per_kind=2)
    pruner.logits[:] = -np.arange(1.0, 13.0)
    np.testing.assert_array_equal(np.flatnonzero(session.head_mask().keep), [0, 3, 6, 7, 9, 10])


def test_random_heads_are_k_and_follow_their_seed(toy):
    masks = [build(toy, "random", session={"seed": seed})[1].head_mask() for seed in (1, 1, 2)]
    with pytest.raises(HeadPruningError, match="--random-heads-seed is -1; it must be a whole number, 0 or more"):
        build(toy, "random", random_heads_seed=-1)
    own = [build(toy, "random", random_heads_seed=7, session={"seed": seed})[1].head_mask() for seed in (1, 2)]
    assert all(mask.kept == 5 for mask in (*masks, *own))
    assert masks[0] == masks[1] != masks[2] and own[0] == own[1]


def test_given_heads_are_those_of_the_file(toy, tmp_path):
    mask = build(toy, "random", random_heads_seed=7)[1].head_mask()
    mask.save(tmp_path / "masks.safetensors")
    torch.save(torch.tensor(np.stack(np.split(mask.keep, len(mask.unit_map.attention)))), tmp_path / "mask5.pt")
    sites = (dataclasses.replace(site, name=f"task.{site.name}") for site in mask.unit_map.attention)
    HeadMask(UnitMap(tuple(sites)), mask.keep).save(tmp_path / "task.safetensors")
    for name in ("masks.safetensors", "mask5.pt", "task.safetensors"):
        model, session, _ = build(toy, "given", head_mask_file=str(tmp_path / name))
        assert session.at_target() and session.head_mask() == mask
        update(toy, model, session, 0)
        assert session.head_mask() == mask
    other = UnitMap(mask.unit_map.attention[:1])
    HeadMask(other, np.ones(other.num_heads)).save(tmp_path / "other.safetensors")
    with pytest.raises(HeadPruningError, match="other.safetensors belongs to another architecture"):
        build(toy, "given", head_mask_file=str(tmp_path / "other.safetensors"))


def test_target_is_reached_when_the_annealing_ends(toy):
    model, session, pruner = build(toy)
    reached = []
    for step in range(10):
        update(toy, model, session, step)
        reached.append(session.at_target())
    assert reached == [False] * 7 + [True] * 3
    assert session.metrics()["temperature"] == 1e-8
    _, loaded, _ = build(toy)
    assert not loaded.at_target()
    loaded.load_state_dict(session.state_dict())
    assert loaded.at_target()


def test_after_the_annealing_the_model_trains_with_the_heads_it_keeps(toy):
    model, session, pruner = build(toy)
    for step in range(8):
        update(toy, model, session, step)
    kept, logits = pruner.keep(), pruner.logits.copy()
    for step in range(8, 12):
        update(toy, model, session, step)
        assert np.array_equal(session.gates.training_values.numpy(), kept) and np.array_equal(pruner.logits, logits)
    assert session.metrics()["gate_norm"] == 0.0

    model, session, pruner = build(toy, noise_after_cooldown=True)
    draws = set()
    for step in range(40):
        update(toy, model, session, step)
        draws.add(tuple(session.gates.training_values.tolist()) if step >= 8 else None)
    assert len(draws) > 2


@pytest.mark.parametrize("bert", [False, True])
def test_the_number_of_heads_alone_gives_a_schedule_that_chooses(toy, bert):
    """Some heads matter twenty times as much as others; the loss asks for what the model gives with all of them."""
    method, given, batch = methods()["dsp"], {"num_of_heads": 5, "joint_pruning": True}, toy.batch(0)[:2]
    options = method.pruner.bert_options(given) if bert else given

    def loss(model, wanted):
        return (model(*batch) - wanted).square().mean()

    ratios = []
    for seed in (0, 2, 3):
        (model, unit_map), pruner = toy.make(seed), method.pruner(method.config(**options))
        model.dropout.p = 0.0
        with torch.no_grad():
            for head in range(12):
                site = unit_map.attention[head // 3]
                columns = slice(head % 3 * site.head_dim, (head % 3 + 1) * site.head_dim)
                model.get_submodule(site.out_proj).weight[:, columns] *= 4.0 if head % 5 in (0, 3) else 0.2
            wanted = model(*batch)
        session = PruningSession(model, unit_map, [pruner], total_steps=30, seed=seed).attach()
        for step in range(30):
            session.before_update(step)
            loss(model, wanted).backward()
            session.after_backward()
            session.after_step()
        assert session.at_target() and session.harden().kept == 5
        draw, at_random = np.random.default_rng(0), []
        with torch.no_grad():
            chosen = loss(model, wanted).item()
            for _ in range(20):
                session.gates.set_fixed(np.isin(np.arange(12), draw.choice(12, 5, replace=False)))
                at_random.append(loss(model, wanted).item())
        ratios.append(chosen / np.median(at_random))
    assert np.mean(ratios) < 0.4, ratios  # of a random choice: 1
    assert pruner.options()["annealing"] and pruner.options()["cooldown_steps"] == 0.6


def test_steps_as_a_fraction_of_training(toy):
    _, session, pruner = build(toy, cooldown_steps=0.25, session={"total_steps": 40})
    assert pruner.temperature(9) > 1e-8 == pruner.temperature(10)
    session.before_update(3)
    state = session.state_dict()
    _, session, pruner = build(toy, cooldown_steps=0.25)
    with pytest.raises(HeadPruningError, match="--cooldown-steps 0.25 is a fraction"):
        session.before_update(0)
    _, session, pruner = build(toy, cooldown_steps=0.25, session={"total_steps": 4000})
    session.load_state_dict(state)
    assert pruner.temperature(9) > 1e-8 == pruner.temperature(10)


@pytest.mark.parametrize(
    "options, total, words",
    [
        ({"annealing": False}, None, "gradients vanish"),
        ({"annealing": False, "initial_temperature": None, "final_temperature": 1e-8}, None, "gradients vanish"),
        ({"cooldown_steps": 100}, 40, "100 updates but training has 40"),
    ],
)
def test_schedules_that_cannot_work_are_warned_of_once(toy, caplog, options, total, words):
    _, session, _ = build(toy, session={"total_steps": total}, **options)
    with caplog.at_level(logging.WARNING):
        session.before_update(0)
        session.before_update(1)
    assert sum(words in message for message in caplog.messages) == 1


def test_voita_tells_at_once_that_it_has_closed_all_heads(toy, caplog):
    model, session, pruner = build(toy, "voita", l0_penalty=1e3, pruning_lr=0.5)
    closed = None
    for step in range(40):
        update(toy, model, session, step)
        closed = step + 1 if closed is None and not pruner.keep().any() else closed
    told = [message for message in caplog.messages if "no attention is left" in message]
    assert len(told) == 1 and f"after {closed} updates" in told[0] and "lower --l0-penalty" in told[0]

    model, session, pruner = build(toy, "voita", l0_penalty=1e3, pruning_lr=0.5, min_heads_per_kind=1)
    caplog.clear()
    for step in range(40):
        update(toy, model, session, step)
    assert not (pruner.logits > 0).any() and not [m for m in caplog.messages if "no attention" in m]


@pytest.mark.parametrize("name, option, words", [
    ("dsp", {"num_of_heads": None}, "--num-of-heads"),
    ("ste", {"num_of_heads": None}, "--num-of-heads"),
    ("random", {"num_of_heads": None}, "--num-of-heads"),
    ("given", {}, "--head-mask-file"),
    ("given", {"head_mask_file": "nowhere/mask.safetensors"}, "nowhere/mask.safetensors"),
    ("voita", {"l0_penalty": None}, "--l0-penalty"),
    ("voita", {"l0_penalty": -1.0}, "--l0-penalty"),
    ("dsp", {"final_temperature": 0.0}, "--final-temperature"),
    ("dsp", {"initial_temperature": -1.0}, "--initial-temperature"),
    ("dsp", {"num_of_heads": 13}, "12 heads"),
    ("dsp", {"pruning_lr": -0.2}, "--pruning-lr is -0.2"),
    ("ste", {"pruning_lr": float("nan")}, "--pruning-lr is nan"),
    ("voita", {"gate_clip_norm": -1.0}, "--gate-clip-norm is -1"),
    ("dsp", {"gate_adam_beta1": 1.0}, "--gate-adam-beta1 is 1"),
    ("random", {"min_heads_per_kind": -1}, "--min-heads-per-kind is -1"),
    ("ste", {"min_heads_per_layer": 2}, "only 5 are kept"),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused_at_attach(toy, name, option, words):
    with pytest.raises(HeadPruningError, match=words) as error:
        build(toy, name, **option)
    assert str(error.value).endswith(".")


# -- sites and owners ----------------------------------------------------------------------------------------------


def test_a_site_that_never_ran_is_named(toy):
    model, session, _ = build(toy)
    model.forward = lambda source, target: model.head(
        model.encoder[0](source, source) + model.encoder[1](target, target)
    )
    with pytest.raises(UnfiredSiteError, match="cross, decoder never ran") as error:
        update(toy, model, session, 0)
    # The lines that describe them, to be corrected.
    lines = str(error.value).partition("\n\n")[2]
    described = eval(f"[{lines}]", {"AttentionSite": AttentionSite})
    ours = [site for site in session.unit_map.attention if site.name in ("cross", "decoder")]
    assert described == ours


def test_gates_that_ran_in_evaluation_mode_only_are_named(toy, caplog):
    """They do not learn there, and the outcome would be that of the draw."""
    model, session, _ = build(toy)
    model.decoder.eval()
    update(toy, model, session, 0)
    (said,) = caplog.messages
    assert said.startswith("the gates of decoder ran in evaluation mode only") and "call model.train()" in said
    session.detach()
    caplog.clear()
    model, session, _ = build(toy, "random", num_of_heads=3)
    model.eval()
    update(toy, model, session, 0)
    assert not caplog.messages  # nothing is learnt here


@pytest.mark.parametrize(
    "pipelined, left_out", [(False, "after_backward"), (True, "after_backward"), (True, "before_step")]
)
def test_a_hook_that_a_loop_forgets_is_named(toy, pipelined, left_out):
    model, session, _ = build(toy, joint_pruning=not pipelined)
    session.before_update(0)
    session.loss(toy.loss(model, toy.batch(0))).backward()
    for hook in ("after_backward", "before_step"):
        if hook != left_out:
            getattr(session, hook)()
    with pytest.raises(HeadPruningError, match=rf"session.{left_out}\(\) was not called in update 0"):
        session.after_step()


def test_a_map_whose_heads_do_not_fill_the_projection_is_refused(toy):
    model, unit_map = toy.make(0)
    wrong = dataclasses.replace(unit_map.attention[0], head_dim=3)
    with pytest.raises(
        HeadPruningError, match=rf"{wrong.out_proj} reads .* {wrong.heads} heads of 3; correct the map"
    ):
        GateBank(model, UnitMap((wrong, *unit_map.attention[1:])))


def test_a_session_that_is_attached_once_more_begins_anew(toy):
    model, session, _ = build(toy)
    update(toy, model, session, 0)
    update(toy, model, session, 1)
    session.detach()
    session.attach()
    assert session.step == 0 and session.gates.silent_sites()
    update(toy, model, session, 0)
    assert not session.gates.silent_sites()


def test_models_that_drop_layers_get_some_updates(toy):
    model, session, _ = build(toy, session={"fired_within": 3})

    def short(source, target):
        return model.head(model.encoder[0](source, source))

    model.forward = short
    update(toy, model, session, 0)
    update(toy, model, session, 1)
    with pytest.raises(UnfiredSiteError, match="encoder.1, cross, decoder"):
        update(toy, model, session, 2)
    model, session, _ = build(toy, session={"fired_within": 3})
    whole, model.forward = model.forward, short
    update(toy, model, session, 0)
    model.forward = whole
    for step in (1, 2, 3):
        update(toy, model, session, step)


def test_two_owners_of_the_gates_are_refused(toy):
    model, unit_map = toy.make()

    class Given:
        num_of_heads, joint_pruning = 5, True

    pair = [build_pruner(methods()[name], Given) for name in ("ste", "random")]
    with pytest.raises(HeadPruningError, match="Two of the pruners own the head gates"):
        PruningSession(model, unit_map, pair).attach()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_was_attached_before_a_failure_is_detached(toy):
    model, unit_map = toy.make()

    class Given:
        num_of_heads, joint_pruning = 99, True

    class Marks(Pruner):
        needs_gates = False

        def attach(self, session):
            super().attach(session)
            session.model.marked = True

        def detach(self):
            super().detach()
            del model.marked

    with pytest.raises(HeadPruningError, match="99 heads to keep are more than the 12 heads"):
        PruningSession(model, unit_map, [Marks(None), build_pruner(methods()["ste"], Given)]).attach()
    assert not hasattr(model, "marked") and not any(module._forward_pre_hooks for module in model.modules())


def test_a_session_is_attached_once_and_alone(toy):
    model, session, pruner = build(toy)
    logits = pruner.logits.copy()
    with pytest.raises(HeadPruningError, match="attached already; detach"):
        session.attach()
    np.testing.assert_array_equal(pruner.logits, logits)
    other = PruningSession(model, session.unit_map, [copy.deepcopy(pruner)])
    with pytest.raises(HeadPruningError, match="encoder.0 are gated; detach the session, or take the mask off"):
        other.attach()
    session.detach()
    other.attach().detach()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_pruner_is_of_one_session_at_a_time(toy):
    model, session, pruner = build(toy)
    logits = pruner.logits.copy()
    other = PruningSession(*toy.make(), [pruner])
    with pytest.raises(HeadPruningError, match="is attached to another session, .*build another with pruner"):
        other.attach()
    np.testing.assert_array_equal(pruner.logits, logits)
    assert pruner.session is session
    session.begin_anew()
    session.detach()
    other.attach()
    with pytest.raises(HeadPruningError, match="is attached to another session"):
        session.attach()
    other.detach()
    session.attach()
    update(toy, model, session, 0)


def test_a_session_needs_a_pruner(toy):
    with pytest.raises(HeadPruningError, match="at least one pruner"):
        PruningSession(*toy.make(), [])


def test_pruners_share_a_session(toy):
    """A method without gates beside one with: losses, factors, phases and needs are put together."""

    class Distiller(Pruner):
        name = "distiller"
        needs = frozenset({"hidden_states"})

        def loss(self, loss, inputs, outputs):
            assert outputs.hidden_states[-1].shape == (4, 6, 12)
            return 2 * loss + outputs.raw

        def lr_factor(self, step):
            return 0.5

        def phase(self, step):
            return int(step >= 3)

        def at_target(self):
            return False

    model, unit_map = toy.make()
    gates = build_pruner(methods()["random"], type("Given", (), {"num_of_heads": 5}))
    session = PruningSession(model, unit_map, [gates, Distiller(None)]).attach()
    session.before_update(0)
    toy.loss(model, toy.batch(0))
    assert session.loss(torch.tensor(3.0), None, torch.tensor(1.0)).item() == 7.0
    assert session.lr_factor(0) == 0.5 and [session.phase(2), session.phase(3)] == [(0, 0), (0, 1)]
    assert session.needs == {"hidden_states"} and not session.at_target() and not session.freezes_model
    assert session.head_mask().kept == 5


# -- state ---------------------------------------------------------------------------------------------------------


def test_evaluation_after_loading_uses_the_loaded_heads(toy):
    model, session, pruner = build(toy)
    pruner.logits[:] = np.linspace(-1, 1, 12)
    _, other, _ = build(toy, session={"seed": 9})
    other.load_state_dict(session.state_dict())
    np.testing.assert_array_equal(np.flatnonzero(other.gates.evaluation_values.numpy()), [7, 8, 9, 10, 11])


def test_state_is_a_copy(toy):
    model, session, pruner = build(toy)
    state = session.state_dict()
    kept = {key: value.copy() for key, value in state.items()}
    for step in range(2):
        update(toy, model, session, step)
    for key, value in kept.items():
        np.testing.assert_array_equal(state[key], value)


def test_foreign_and_damaged_states_are_refused(toy):
    _, session, _ = build(toy, "dsp")
    state = session.state_dict()
    with pytest.raises(HeadPruningError, match="no state of the pruner ste"):
        build(toy, "ste")[1].load_state_dict(state)
    for key in state:
        rest = {name: value for name, value in state.items() if name != key}
        with pytest.raises(HeadPruningError, match="damaged"):
            build(toy, "dsp")[1].load_state_dict(rest)


@pytest.mark.parametrize(
    "steps, words", [(0, "nothing to anneal"), (float("nan"), "is nan"), (float("inf"), "is inf")]
)
def test_an_annealing_without_length_is_refused(toy, steps, words):
    _, session, _ = build(toy, cooldown_steps=steps)
    with pytest.raises(HeadPruningError, match=words):
        session.before_update(0)


def test_reset_optimizer_plans_the_annealing_anew(toy):
    _, session, _ = build(toy, cooldown_steps=0.5, session={"total_steps": 1000})
    session.before_update(0)
    state = session.state_dict()
    _, session, pruner = build(toy, cooldown_steps=0.5, session={"total_steps": 10})
    session.load_state_dict(state)
    session.reset_optimizer()
    assert pruner.temperature(4) > 1e-8 == pruner.temperature(5)


def test_a_hardened_model_trains_without_gate_gradients(toy):
    model, session, _ = build(toy, "random")
    session.before_update(0)
    toy.loss(model, toy.batch(0)).backward()
    assert not session.gates.gradients.any()


def test_what_a_host_changed_is_undone_at_detach(toy):
    undone = []
    _, session, _ = build(toy)
    session.on_detach(lambda: undone.append("first"))
    session.on_detach(lambda: undone.append("second"))
    session.detach()
    session.detach()
    assert undone == ["second", "first"]


def test_reset_optimizer_forgets_the_moments_and_keeps_the_logits(toy):
    model, session, pruner = build(toy, gate_weight_decay=0.1)
    update(toy, model, session, 0)
    logits = pruner.logits.copy()
    assert pruner.adam.first.any()
    session.reset_optimizer()
    assert not pruner.adam.first.any() and not pruner.adam.second.any() and pruner.adam.steps == 0
    assert pruner.adam.weight_decay == 0.1
    np.testing.assert_array_equal(pruner.logits, logits)


def test_description_names_pruners_and_map(toy):
    _, session, _ = build(toy, "voita")
    data = json.loads(session.description())
    assert data["pruners"] == ["voita"] and UnitMap.from_dict(data["unit_map"]) == session.unit_map


# -- first logits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, bound", [("dsp", np.sqrt(6 / 7)), ("ste", np.sqrt(6 / 7)), ("voita", np.sqrt(6 / 4))])
def test_first_logits_are_xavier_uniform_and_follow_the_seed(toy, name, bound):
    drawn = np.concatenate([build(toy, name, session={"seed": seed})[2].logits for seed in range(60)])
    assert np.abs(drawn).max() <= bound
    assert np.abs(drawn).max() > 0.98 * bound and abs(drawn.mean()) < 0.1 * bound
    np.testing.assert_array_equal(build(toy, name)[2].logits, build(toy, name)[2].logits)


def test_pipelined_pruning_says_so(toy):
    assert build(toy, "dsp", joint_pruning=False)[1].freezes_model
    assert not build(toy, "dsp")[1].freezes_model
    assert not build(toy, "voita", joint_pruning=False)[1].freezes_model
    assert build(toy, "voita", l0_pipelined=True)[1].freezes_model


@pytest.mark.parametrize("name", ["dsp", "head_sensitivity"])
def test_pipelined_pruning_leaves_the_model_as_it_is_in_a_loop_of_ones_own(toy, name):
    model, session, pruner = build(toy, name, joint_pruning=False, session={"total_steps": 8})
    before, learnt = copy.deepcopy(model.state_dict()), pruner.state_dict()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(4):
        session.before_update(step)
        optimizer.zero_grad()
        session.loss(toy.loss(model, toy.batch(step))).backward()
        session.after_backward(denominator=TOKENS)
        session.before_step()
        optimizer.step()
        session.after_step()
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert any(not np.array_equal(value, learnt[key]) for key, value in pruner.state_dict().items())


def test_a_host_that_rests_its_optimizer_keeps_the_gradients(toy):
    model, session, _ = build(toy, joint_pruning=False)
    session.before_update(0)
    session.loss(toy.loss(model, toy.batch(0))).backward()
    session.after_backward(denominator=TOKENS)
    session.before_step(rests=True)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_freezing_leaves_one_small_parameter_and_detaching_thaws(toy):
    model, session, _ = build(toy)
    first = next(model.parameters())
    first.requires_grad_(False)  # frozen by the user: stays so
    before = [parameter.requires_grad for parameter in model.parameters()]
    session.freeze()
    (spare,) = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert spare.numel() == min(p.numel() for p, trained in zip(model.parameters(), before) if trained)
    session.detach()
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    model.requires_grad_(False)
    with pytest.raises(HeadPruningError, match="leave at least one trainable"):
        session.freeze()
