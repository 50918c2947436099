"""Whole runs against runs of the published trainers: temperatures, masks, logits at each of 24 steps.

The BERT runs are repeated end to end on a plain BERT with the recorded weights; of the fairseq runs the gates' half is
repeated here, from the recorded gradients of the logits.
"""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from head_pruning import AttentionSite, PruningSession, UnitMap, build_pruner, methods
from head_pruning.gates import GateBank
from head_pruning.importance import ImportanceAccumulator, normalize_importance

STEPS = 24


class Options:
    """Parity with the published runs: no clipping of the gates on their own, the hosts' Adam."""

    gate_clip_norm = 0.0

    def __init__(self, recorded: dict, *, pipelined: bool, **options) -> None:
        self.num_of_heads = recorded["K"]
        self.joint_pruning = not pipelined
        self.annealing = True
        self.noise_after_cooldown = True
        self.initial_temperature = recorded["init_T"]
        self.final_temperature = recorded["final_T"]
        self.cooldown_steps = recorded["cooldown"]
        self.pruning_lr = recorded["pruning_lr"]
        self.__dict__.update(options)


HF = {"gate_adam_beta1": 0.9, "gate_adam_beta2": 0.999}
FAIRSEQ = {"gate_adam_beta1": 0.9, "gate_adam_beta2": 0.98, "gate_weight_decay": 1e-4}


@pytest.fixture
def recorded_runs(reference) -> dict:
    return json.loads((reference / "traj.json").read_text())


def start(pruner_name, options, model, unit_map, run, **session_options):
    """A session whose logits and noise are the recorded ones."""
    pruner = build_pruner(methods()[pruner_name], options)
    session = PruningSession(model, unit_map, [pruner], **session_options).attach()
    pruner.logits[:] = run["w0"].reshape(-1)
    pruner.noise = lambda step: run["u"][step]
    return session, pruner


class Adam:
    """Adam as transformers 3.1 had it: epsilon is added before the bias correction."""

    def __init__(self, parameters: list, lr: float) -> None:
        self.parameters, self.lr, self.steps = parameters, lr, 0
        self.first, self.second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))

    @torch.no_grad()
    def step(self, lr_factor: float) -> None:
        self.steps += 1
        size = self.lr * lr_factor * math.sqrt(1.0 - 0.999**self.steps) / (1.0 - 0.9**self.steps)
        for parameter, first, second in zip(self.parameters, self.first, self.second):
            first.mul_(0.9).add_(parameter.grad, alpha=0.1)
            second.mul_(0.999).addcmul_(parameter.grad, parameter.grad, value=0.001)
            parameter.addcdiv_(first, second.sqrt().add_(1e-8), value=-size)


def clip_factor(norm: float, limit: float = 1.0) -> float:
    """What torch's clipping multiplies gradients with."""
    return min(1.0, limit / (norm + 1e-6))


# -- the gates' half of every run ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, pruner_name, pipelined, options",
    [
        ("hf_joint_anneal", "dsp", False, HF),
        ("hf_joint_ste", "ste", False, HF),
        ("fs_joint_anneal", "dsp", False, FAIRSEQ),
        ("fs_pipelined_anneal", "dsp", True, FAIRSEQ),
    ],
)
def test_gates_follow_the_recorded_gradients(load_arrays, recorded_runs, name, pruner_name, pipelined, options):
    run, recorded = load_arrays(f"traj_{name}.npz"), recorded_runs[name]
    rows, heads = run["w0"].shape
    model = nn.ModuleList(nn.Linear(heads, heads) for _ in range(rows))
    unit_map = UnitMap(tuple(AttentionSite(f"a{i}", "encoder_self", f"l{i}", heads, 1, str(i)) for i in range(rows)))
    session, pruner = start(
        pruner_name, Options(recorded, pipelined=pipelined, **options), model, unit_map, run, fired_within=0
    )
    assert session.freezes_model == pipelined
    for step in range(STEPS):
        session.before_update(step)
        if pruner_name == "dsp":
            assert pruner.temperature(step) == pytest.approx(run["temp"][step], rel=1e-12)
        # The recorded masks are float32, as the gates are.
        mask = run["mask"][step].reshape(-1)
        np.testing.assert_allclose(session.gates.training_values.numpy(), mask, rtol=2e-6, atol=2e-7)
        pruner.gradient = run["gw"][step].reshape(-1).copy()
        if name.startswith("hf"):
            pruner.gradient *= clip_factor(run["gnorm"][step])
        session.after_step(lr_factor=run["lr"][step, -1] / recorded["pruning_lr"])
        # The norm that the BERT runs clipped by is recorded to float32 precision only.
        atol = 5e-7 if name.startswith("hf") else 1e-12
        np.testing.assert_allclose(pruner.logits, run["w"][step].reshape(-1), rtol=0, atol=atol)
    assert session.at_target()


# -- BERT, end to end ----------------------------------------------------------------------------------------------


def batch_of(arrays: dict, prefix: str) -> dict:
    return {name: arrays[prefix + name] for name in ("input_ids", "attention_mask", "token_type_ids", "labels")}


def test_bert_plain_and_masked(tiny_bert, load_arrays):
    recorded = load_arrays("hf_tiny.npz")
    batch = batch_of(recorded, "batch0.")
    gates = GateBank(tiny_bert.model, tiny_bert.unit_map)
    plain_loss, plain_logits = tiny_bert.loss(batch)
    gates.attach()
    open_loss, open_logits = tiny_bert.loss(batch)
    assert torch.equal(plain_logits, open_logits) and torch.equal(plain_loss, open_loss)
    gates.set_training(recorded["michel.partial_mask"].reshape(-1))
    masked_loss, masked_logits = tiny_bert.loss(batch)
    for name, loss, logits in (("plain", plain_loss, plain_logits), ("masked", masked_loss, masked_logits)):
        np.testing.assert_allclose(logits.detach(), recorded[f"{name}.logits"], rtol=0, atol=2e-6)
        np.testing.assert_allclose(loss.item(), recorded[f"{name}.loss"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name, pruner_name, temperature", [
    ("t10", "dsp", 10.0), ("t0.1", "dsp", 0.1), ("t1e-8", "dsp", 1e-8), ("ste", "ste", 1.0),
])  # fmt: skip
def test_bert_gated_forward_and_gradients(tiny_bert, load_arrays, name, pruner_name, temperature):
    recorded = load_arrays("hf_tiny.npz")
    options = Options(
        {"K": 3, "init_T": 1.0, "final_T": temperature, "cooldown": 0, "pruning_lr": 0.1}, pipelined=False
    )
    options.annealing = False
    run = {"w0": recorded["dsp.w"], "u": [recorded["dsp.u"]]}
    session, pruner = start(pruner_name, options, tiny_bert.model, tiny_bert.unit_map, run)
    session.before_update(0)
    loss, logits = tiny_bert.loss(batch_of(recorded, "batch0."))
    loss.backward()
    session.after_backward()
    key = f"dsp.{name}"
    np.testing.assert_allclose(session.gates.training_values, recorded[f"{key}.mask"].reshape(-1), rtol=2e-7)
    np.testing.assert_allclose(logits.detach(), recorded[f"{key}.logits"], rtol=0, atol=2e-6)
    np.testing.assert_allclose(loss.item(), recorded[f"{key}.loss"], rtol=0, atol=1e-6)
    expected = recorded[f"{key}.grad_w"].reshape(-1)
    np.testing.assert_allclose(pruner.gradient, expected, rtol=0, atol=1e-5 * max(np.abs(expected).max(), 1e-20))
    weights = dict(tiny_bert.model.named_parameters())
    for parameter in ("bert.encoder.layer.0.attention.self.value.weight", "classifier.weight"):
        np.testing.assert_allclose(
            weights[parameter].grad, recorded[f"{key}.grad.{parameter}"], rtol=0, atol=2e-6, err_msg=parameter
        )


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_bert_hard_concrete(tiny_bert, load_arrays, mode):
    recorded = load_arrays("hf_tiny.npz")

    class VoitaOptions:
        l0_penalty, joint_pruning, gate_clip_norm, sample_in_eval = 0.0015, True, 0.0, True

    run = {"w0": recorded["voita.log_a"], "u": [recorded["voita.u"]]}
    session, pruner = start("voita", VoitaOptions, tiny_bert.model, tiny_bert.unit_map, run)
    tiny_bert.model.train(mode == "train")
    session.before_update(0)
    loss, logits = tiny_bert.loss(batch_of(recorded, "batch0."))
    np.testing.assert_allclose(logits.detach(), recorded[f"voita.{mode}.logits"], rtol=0, atol=2e-6)
    assert loss.item() + pruner.penalty() == pytest.approx(
        float(recorded[f"voita.{mode}.loss_with_penalty"]), abs=1e-6
    )
    if mode == "train":
        loss.backward()
        session.after_backward()
        expected = recorded["voita.train.grad_log_a"].reshape(-1)
        np.testing.assert_allclose(pruner.gradient, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    else:
        gates = session.gates.evaluation_values
        np.testing.assert_allclose(gates, recorded["voita.eval.gates"].reshape(-1), rtol=0, atol=2e-7)


@pytest.mark.parametrize("prefix, partial", [("michel.", False), ("michel.partial_", True)])
def test_bert_importance(tiny_bert, load_arrays, prefix, partial):
    from head_pruning import HeadMask, full_mask

    recorded = load_arrays("hf_tiny.npz")
    mask = HeadMask(tiny_bert.unit_map, recorded["michel.partial_mask"]) if partial else full_mask(tiny_bert.unit_map)
    gates = GateBank(tiny_bert.model, tiny_bert.unit_map)
    gates.attach()
    tiny_bert.model.eval()
    tokens = 0
    with ImportanceAccumulator(gates).probing(mask) as accumulator:
        for i in range(3):
            batch = batch_of(recorded, f"batch{i}.")
            tokens += batch["attention_mask"].sum()
            loss, _ = tiny_bert.loss(batch)
            loss.backward()
            accumulator.add()
    raw = accumulator.scores() / tokens
    expected = recorded[f"{prefix}raw"].reshape(-1)
    np.testing.assert_allclose(raw, expected, rtol=0, atol=3e-6 * expected.max())
    final = normalize_importance(raw, tiny_bert.unit_map)
    np.testing.assert_allclose(final, recorded[f"{prefix}final"].reshape(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, pruner_name", [("hf_joint_anneal", "dsp"), ("hf_joint_ste", "ste")])
def test_bert_joint_training_run(tiny_bert, load_arrays, recorded_runs, name, pruner_name):
    """24 updates of model and gates: one clip over both, one linear decay of both."""
    run, recorded = load_arrays(f"traj_{name}.npz"), recorded_runs[name]
    session, pruner = start(
        pruner_name, Options(recorded, pipelined=False, **HF), tiny_bert.model, tiny_bert.unit_map, run
    )
    parameters = list(tiny_bert.model.parameters())
    optimizer = Adam(parameters, lr=recorded["lr"])
    tiny_bert.model.train()
    size = recorded["batch"]
    for step in range(STEPS):
        session.before_update(step)
        batch = {key: value[step * size : (step + 1) * size] for key, value in batch_of(run, "").items()}
        loss, _ = tiny_bert.loss(batch)
        tiny_bert.model.zero_grad()
        loss.backward()
        session.after_backward()
        np.testing.assert_allclose(
            session.gates.training_values, run["mask"][step].reshape(-1), rtol=0, atol=5e-6, err_msg=f"step {step}"
        )
        assert loss.item() == pytest.approx(run["loss"][step], abs=2e-6), step
        norm = float(torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in parameters])))
        norm = float(np.hypot(norm, pruner.gradient_norm))
        assert norm == pytest.approx(run["gnorm"][step], rel=1e-5), step
        for parameter in parameters:
            parameter.grad.mul_(clip_factor(norm))
        pruner.gradient *= clip_factor(norm)
        lr_factor = 1.0 - step / STEPS
        assert run["lr"][step] == pytest.approx([recorded["lr"] * lr_factor, recorded["pruning_lr"] * lr_factor])
        optimizer.step(lr_factor)
        session.after_step(lr_factor)
        np.testing.assert_allclose(
            pruner.logits, run["w"][step].reshape(-1), rtol=0, atol=2e-5, err_msg=f"step {step}"
        )
        np.testing.assert_allclose(tiny_bert.model.classifier.weight.detach(), run["cls"][step], rtol=0, atol=5e-7)
    np.testing.assert_array_equal(
        session.harden().keep, np.isin(np.arange(8), np.argsort(-np.ravel(recorded["w_final"]))[: recorded["K"]])
    )
