"""fairseq's own transformer against numbers recorded from the published fork of it."""

import argparse
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("fairseq")

from fairseq.data import Dictionary
from fairseq.models.transformer import TransformerModel
from fairseq.optim.adam import Adam

from fairseq_plugin.modules.attention import UnfusedAttention
from fairseq_plugin.modules.unit_map import unit_map
from head_pruning import PruningSession, build_pruner, full_mask, methods
from head_pruning.gates import GateBank
from head_pruning.importance import ImportanceAccumulator, normalize_importance

PAD, SMOOTHING = 1, 0.1
# The order in which a forward pass of the published code drew the noise of its L0 gates, as rows of the unit map.
CALL_ORDER = (0, 1, 4, 2, 5, 3)
STEPS = 24

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")


@pytest.fixture
def recorded(load_arrays) -> dict:
    return load_arrays("fs_tiny.npz")


@pytest.fixture
def tiny(reference, recorded) -> SimpleNamespace:
    """The recorded model: ``model``, ``unit_map``, ``loss(i) -> loss, logits``, ``tokens(i)``."""
    dictionary = Dictionary.load(str(reference / "fs_tiny_dict.txt"))
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    args = argparse.Namespace(**json.loads((reference / "fs_tiny_args.json").read_text()))
    model = TransformerModel.build_model(args, task)
    state = torch.load(reference / "fs_tiny_state.pt", weights_only=True)
    model.load_state_dict({name: value for name, value in state.items() if name != "w" and "log_a" not in name})

    def tensor(i: int, name: str) -> torch.Tensor:
        return torch.from_numpy(recorded[f"batch{i % 3}.{name}"])

    def loss(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        logits, _ = model(*(tensor(i, name) for name in ("src_tokens", "src_lengths", "prev_output_tokens")))
        target = tensor(i, "target")
        log_p = torch.log_softmax(logits, -1)[target != PAD]
        nll = -log_p.gather(-1, target[target != PAD][:, None]).sum()
        # The fork's smoothing spreads over all words; fairseq's of today over all but the target.
        return (1 - SMOOTHING) * nll - SMOOTHING / log_p.shape[-1] * log_p.sum(), logits

    return SimpleNamespace(
        model=model,
        unit_map=unit_map(model),
        loss=loss,
        tokens=lambda i: int((tensor(i, "target") != PAD).sum()),
    )


def start(tiny, name: str, logits: np.ndarray, noise, **options):
    """A session on the model with recorded logits and noise."""
    given = SimpleNamespace(joint_pruning=True, gate_clip_norm=0.0, **options)
    pruner = build_pruner(methods()[name], given)
    session = PruningSession(tiny.model, tiny.unit_map, [pruner]).attach()
    UnfusedAttention(tiny.model).attach()
    pruner.logits[:] = logits.reshape(-1)
    pruner.noise = noise
    return session, pruner


def check_loss(loss: torch.Tensor, expected) -> None:
    np.testing.assert_allclose(loss.item(), expected, rtol=2e-6)


def test_rows_are_in_the_published_order(tiny):
    assert [site.name for site in tiny.unit_map.attention] == [
        "encoder.layers.0.self_attn",
        "encoder.layers.1.self_attn",
        "decoder.layers.0.encoder_attn",
        "decoder.layers.1.encoder_attn",
        "decoder.layers.0.self_attn",
        "decoder.layers.1.self_attn",
    ]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_plain_forward(tiny, recorded, mode):
    tiny.model.train(mode == "train")
    gates = GateBank(tiny.model, tiny.unit_map)
    for attach in (False, True):
        if attach:
            gates.attach()
            UnfusedAttention(tiny.model).attach()
        loss, logits = tiny.loss(0)
        np.testing.assert_allclose(logits.detach(), recorded["plain.logits"], rtol=0, atol=5e-6)
        check_loss(loss, recorded["plain.loss_sum"])


@pytest.mark.parametrize("name, pruner_name, temperature", [
    ("t10", "dsp", 10.0), ("t0.1", "dsp", 0.1), ("t1e-8", "dsp", 1e-8), ("ste", "ste", None),
])  # fmt: skip
def test_gated_forward_and_gradients(tiny, recorded, name, pruner_name, temperature):
    options = {"final_temperature": temperature} if temperature else {}
    session, pruner = start(
        tiny, pruner_name, recorded["dsp.w"], lambda step: recorded["dsp.u"], num_of_heads=8, **options
    )
    session.before_update(0)
    loss, logits = tiny.loss(0)
    loss.backward()
    session.after_backward()
    key = f"dsp.{name}"
    by_module = recorded[f"{key}.mask_by_module"].reshape(-1)
    np.testing.assert_allclose(session.gates.training_values, by_module, rtol=2e-7, atol=0)
    np.testing.assert_allclose(logits.detach(), recorded[f"{key}.logits"], rtol=0, atol=5e-6)
    check_loss(loss, recorded[f"{key}.loss_sum"])
    expected = recorded[f"{key}.grad_w"].reshape(-1)
    np.testing.assert_allclose(pruner.gradient, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_hard_concrete_training(tiny, recorded):
    uniforms = np.empty((6, 4))
    uniforms[list(CALL_ORDER)] = recorded["voita.u_call_order"]
    session, pruner = start(tiny, "voita", recorded["voita.log_a"], lambda step: uniforms, l0_penalty=200.0)
    session.before_update(0)
    loss, _ = tiny.loss(0)
    check_loss(loss, recorded["voita.train.loss_sum"])
    assert pruner.penalty() == pytest.approx(float(recorded["voita.penalty"]), rel=1e-6)
    loss.backward()
    session.after_backward()
    expected = recorded["voita.train.grad_log_a"].reshape(-1)
    np.testing.assert_allclose(pruner.gradient, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_hard_concrete_evaluation(tiny, recorded):
    session, pruner = start(
        tiny, "voita", recorded["voita.log_a"], lambda step: np.full(24, 0.5), l0_penalty=200.0, sample_in_eval=True
    )
    tiny.model.eval()
    session.before_update(0)
    expected = recorded["voita.eval.gates"].reshape(-1)
    np.testing.assert_allclose(session.gates.evaluation_values, expected, rtol=0, atol=2e-7)
    np.testing.assert_allclose(tiny.loss(0)[1].detach(), recorded["voita.eval.logits"], rtol=0, atol=5e-6)


def test_importance(tiny, recorded):
    gates = GateBank(tiny.model.eval(), tiny.unit_map)
    gates.attach()
    UnfusedAttention(tiny.model).attach()
    totals = {}
    for signed in (True, False):
        with ImportanceAccumulator(gates, signed=signed).probing(full_mask(tiny.unit_map)) as accumulator:
            for i in range(3):
                tiny.loss(i)[0].backward()
                if signed:
                    batch = recorded[f"michel.batch{i}"].reshape(-1)
                    np.testing.assert_allclose(gates.gradients, batch, rtol=0, atol=3e-6 * np.abs(batch).max())
                accumulator.add()
            totals[signed] = accumulator.scores()
    summed = recorded["michel.sum_signed"].reshape(-1)
    np.testing.assert_allclose(totals[True], summed, rtol=0, atol=3e-6 * np.abs(summed).max())
    absolute = sum(np.abs(recorded[f"michel.batch{i}"].reshape(-1)) for i in range(3))
    np.testing.assert_allclose(totals[False], absolute, rtol=0, atol=3e-6 * absolute.max())
    for name, options in (("layernorm", {"globally": False}), ("final", {})):
        ours = normalize_importance(totals[True], tiny.unit_map, **options)
        np.testing.assert_allclose(ours, recorded[f"michel.{name}"].reshape(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("pipelined", [False, True])
def test_training_run(tiny, load_arrays, reference, pipelined):
    """24 updates with fairseq's Adam on the model and the session's on the gates."""
    name = "fs_pipelined_anneal" if pipelined else "fs_joint_anneal"
    run, settings = load_arrays(f"traj_{name}.npz"), json.loads((reference / "traj.json").read_text())[name]
    session, pruner = start(
        tiny,
        "dsp",
        run["w0"],
        lambda step: run["u"][step],
        num_of_heads=settings["K"],
        annealing=True,
        noise_after_cooldown=True,
        initial_temperature=settings["init_T"],
        final_temperature=settings["final_T"],
        cooldown_steps=settings["cooldown"],
        pruning_lr=settings["pruning_lr"],
        gate_weight_decay=1e-4,
    )
    tiny.model.train()
    optimizer = Adam(tiny.model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=1e-4)
    for step in range(STEPS):
        session.before_update(step)
        assert pruner.temperature(step) == pytest.approx(run["temp"][step], rel=1e-12)
        mask = run["mask"][step].reshape(-1)
        np.testing.assert_allclose(session.gates.training_values, mask, rtol=0, atol=3e-5, err_msg=f"step {step}")
        tiny.model.zero_grad()
        loss, _ = tiny.loss(step)
        loss.backward()
        tokens = tiny.tokens(step)
        assert loss.item() / tokens / np.log(2) == pytest.approx(run["loss"][step], abs=6e-4), step
        session.after_backward(denominator=tokens)
        gradient = run["gw"][step].reshape(-1)
        atol = 1e-4 * max(np.abs(gradient).max(), 1e-12)
        np.testing.assert_allclose(pruner.gradient, gradient, rtol=0, atol=atol, err_msg=f"step {step}")
        if not pipelined:
            for parameter in tiny.model.parameters():
                parameter.grad /= tokens
            optimizer.param_groups[0]["lr"] = run["lr"][step, 0]
            optimizer.step()
        session.after_step()
        logits = run["w"][step].reshape(-1)
        np.testing.assert_allclose(pruner.logits, logits, rtol=0, atol=2e-4, err_msg=f"step {step}")
        embedding = tiny.model.decoder.embed_tokens.weight.detach()
        np.testing.assert_allclose(embedding, run["emb"][step], rtol=0, atol=0 if pipelined else 2e-7)
    highest = np.isin(np.arange(24), np.argsort(-np.ravel(settings["w_final"]))[: settings["K"]])
    np.testing.assert_array_equal(session.harden().keep, highest)
