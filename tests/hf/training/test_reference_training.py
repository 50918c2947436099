"""Gates on a real BertForSequenceClassification against the numbers and whole runs of the published scripts.

Two runs of 24 updates are repeated: joint DSP and joint STE. A third was recorded, pipelined DSP
(``hf_pipelined_anneal``), but neither its uniforms nor its first logits were, so it cannot be repeated.
"""

import json

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, get_linear_schedule_with_warmup

from hf_plugin import HeadPruningCallback, HeadPruningTrainer, open_session, pruner
from tests.hf.recorded import batch_of, recorded_bert
from tests.hf.tiny import arguments

STEPS = 24
ATTENTION = pytest.mark.parametrize("attention", ["eager", "sdpa"])


@pytest.fixture(scope="module")
def recorded(load_arrays) -> dict:
    return load_arrays("hf_tiny.npz")


def inject(session, logits, uniforms) -> None:
    """Start from the recorded logits and draw the recorded uniforms (``[steps, N]``)."""
    gates = session.pruners[0]
    gates.logits[:] = np.ravel(logits)
    gates.noise = lambda step: uniforms[step]


# -- one batch -----------------------------------------------------------------------------------------------------


@ATTENTION
@pytest.mark.parametrize(
    "name, method, options",
    [
        ("t10", "dsp", {"final_temperature": 10.0}),
        ("t0.1", "dsp", {"final_temperature": 0.1}),
        ("t1e-8", "dsp", {"final_temperature": 1e-8}),
        ("ste", "ste", {}),
    ],
)
def test_gated_forward_and_gradients(reference, recorded, attention, name, method, options):
    model = recorded_bert(reference, attention).train()
    options = {**options, "num_of_heads": 3, "joint_pruning": True, "gate_clip_norm": 0.0}
    session = open_session(model, [pruner(method, **options)])
    inject(session, recorded["dsp.w"], [recorded["dsp.u"]])
    session.before_update(0)
    out = model(**batch_of(recorded, "batch0."))
    session.loss(out.loss).backward()
    session.after_backward()
    key = f"dsp.{name}"
    np.testing.assert_allclose(session.gates.training_values, recorded[f"{key}.mask"].reshape(-1), rtol=2e-7)
    np.testing.assert_allclose(out.logits.detach(), recorded[f"{key}.logits"], rtol=0, atol=2e-6)
    np.testing.assert_allclose(out.loss.item(), recorded[f"{key}.loss"], rtol=0, atol=1e-6)
    expected = recorded[f"{key}.grad_w"].reshape(-1)
    gradient = session.pruners[0].gradient
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=3e-5 * max(np.abs(expected).max(), 1e-20))
    weights = dict(model.named_parameters())
    compared = [entry for entry in recorded if entry.startswith(f"{key}.grad.")]
    assert len(compared) == 2
    for entry in compared:
        found = weights[entry.removeprefix(f"{key}.grad.")].grad
        np.testing.assert_allclose(found, recorded[entry], rtol=0, atol=2e-6, err_msg=entry)


@ATTENTION
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_hard_concrete(reference, recorded, attention, mode):
    """The published objective has the penalty in it, in evaluation too."""
    model = recorded_bert(reference, attention).train(mode == "train")
    options = {"l0_penalty": 0.0015, "joint_pruning": True, "gate_clip_norm": 0.0, "sample_in_eval": True}
    session = open_session(model, [pruner("voita", **options)])
    inject(session, recorded["voita.log_a"], [recorded["voita.u"]])
    session.before_update(0)
    out = model(**batch_of(recorded, "batch0."))
    np.testing.assert_allclose(out.logits.detach(), recorded[f"voita.{mode}.logits"], rtol=0, atol=2e-6)
    objective = session.loss(out.loss).item() + session.penalty()
    assert objective == pytest.approx(float(recorded[f"voita.{mode}.loss_with_penalty"]), abs=1e-6)
    if mode == "eval":
        gates = session.gates.evaluation_values
        np.testing.assert_allclose(gates, recorded["voita.eval.gates"].reshape(-1), rtol=0, atol=2e-7)
        return
    session.loss(out.loss).backward()
    session.after_backward()
    expected = recorded["voita.train.grad_log_a"].reshape(-1)
    np.testing.assert_allclose(session.pruners[0].gradient, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# -- whole runs ----------------------------------------------------------------------------------------------------


class Adam(torch.optim.Optimizer):
    """Adam as transformers 3.1 had it: epsilon is added before the bias correction."""

    def __init__(self, parameters, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(steps=0, first=torch.zeros_like(parameter), second=torch.zeros_like(parameter))
                state["steps"] += 1
                state["first"].mul_(0.9).add_(parameter.grad, alpha=0.1)
                state["second"].mul_(0.999).addcmul_(parameter.grad, parameter.grad, value=0.001)
                size = group["lr"] * (1.0 - 0.999 ** state["steps"]) ** 0.5 / (1.0 - 0.9 ** state["steps"])
                parameter.addcdiv_(state["first"], state["second"].sqrt().add_(1e-8), value=-size)


class Run:
    """One recorded run: what it was started with, and its numbers after every half of every update."""

    def __init__(self, arrays: dict, facts: dict, method: str) -> None:
        self.arrays, self.facts, self.method = arrays, facts, method
        self.compared = 0

    def pruner(self):
        """Built with the plugin's defaults, but for what the short run had to set and what is ours."""
        options = {"num_of_heads": self.facts["K"], "joint_pruning": True, "gate_clip_norm": 0.0}
        if self.method == "dsp":
            options |= {"annealing": True, "cooldown_steps": self.facts["cooldown"], "noise_after_cooldown": True}
        return pruner(self.method, **options)

    def optimizer(self, model):
        optimizer = Adam(model.parameters(), lr=self.facts["lr"])
        return optimizer, get_linear_schedule_with_warmup(optimizer, 0, STEPS)

    def batch(self, step: int) -> dict:
        size = self.facts["batch"]
        return batch_of(self.arrays, rows=slice(step * size, (step + 1) * size))

    def check_gradients(self, step: int, session, loss: float, gradient: np.ndarray, norm: float) -> None:
        """Before clipping: temperature, gates, loss, gradient of the logits, norm over model and logits."""
        where, arrays = f"step {step}", self.arrays
        precision = 1e-5
        if self.method == "dsp":
            assert session.pruners[0].temperature(step) == pytest.approx(arrays["temp"][step], rel=1e-12), where
            # The relaxation divides the rounding that the logits have gathered (below 2e-5) by the temperature. When
            # that leaves nothing to compare, the recorded gradients are exactly 0, and ours must be.
            precision += 2e-5 / arrays["temp"][step]
        mask = arrays["mask"][step].reshape(-1)
        np.testing.assert_allclose(session.gates.training_values, mask, rtol=0, atol=5e-6, err_msg=where)
        assert loss == pytest.approx(arrays["loss"][step], abs=2e-6), where
        expected = arrays["gw"][step].reshape(-1)
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=precision * np.abs(expected).max(), err_msg=where)
        assert norm == pytest.approx(arrays["gnorm"][step], rel=1e-5), where

    def check_step(self, step: int, session, model, lr: float) -> None:
        """After the update: learning rates, logits, the classifier's weight."""
        gate_lr = session.pruners[0].config.pruning_lr * lr / self.facts["lr"]
        assert [lr, gate_lr] == pytest.approx(self.arrays["lr"][step], rel=1e-12), f"step {step}"
        logits, expected = session.pruners[0].logits, self.arrays["w"][step].reshape(-1)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5, err_msg=f"step {step}")
        weight = model.classifier.weight.detach()
        np.testing.assert_allclose(weight, self.arrays["cls"][step], rtol=0, atol=5e-7, err_msg=f"step {step}")
        self.compared += 1

    def check_outcome(self, head_mask) -> None:
        assert self.compared == STEPS
        best = np.argsort(-np.ravel(self.facts["w_final"]))[: self.facts["K"]]
        np.testing.assert_array_equal(np.flatnonzero(head_mask.keep), np.sort(best))


@pytest.fixture(params=[("hf_joint_anneal", "dsp"), ("hf_joint_ste", "ste")], ids=lambda each: each[0])
def run(request, reference, load_arrays) -> Run:
    name, method = request.param
    facts = json.loads((reference / "traj.json").read_text(encoding="utf-8"))[name]
    assert facts["steps"] == STEPS and facts["max_grad_norm"] == 1.0
    return Run(load_arrays(f"traj_{name}.npz"), facts, method)


def joint_norm(model, gate_gradient: np.ndarray) -> float:
    """The norm that the published script clips by: of the model's gradients and the logits' together."""
    norms = [parameter.grad.norm() for parameter in model.parameters()]
    return float(np.hypot(torch.linalg.vector_norm(torch.stack(norms)).item(), np.linalg.norm(gate_gradient)))


def clip_factor(norm: float) -> float:
    """What torch's clipping to 1 multiplies gradients with."""
    return min(1.0, 1.0 / (norm + 1e-6))


def scale_gradients(model, factor: float) -> None:
    for parameter in model.parameters():
        parameter.grad.mul_(factor)


def test_defaults_are_those_of_the_recorded_runs(run):
    config = run.pruner().config
    assert config.pruning_lr == run.facts["pruning_lr"]
    if run.method == "dsp":
        assert (config.initial_temperature, config.final_temperature) == (run.facts["init_T"], run.facts["final_T"])


@ATTENTION
def test_joint_run_in_a_plain_loop(reference, run, attention):
    model = recorded_bert(reference, attention).train()
    session = open_session(model, [run.pruner()], total_steps=STEPS)
    inject(session, run.arrays["w0"], run.arrays["u"])
    gates = session.pruners[0]
    optimizer, schedule = run.optimizer(model)
    for step in range(STEPS):
        session.before_update(step)
        loss = session.loss(model(**run.batch(step)).loss)
        optimizer.zero_grad()
        loss.backward()
        session.after_backward()
        norm = joint_norm(model, gates.gradient)
        run.check_gradients(step, session, loss.item(), gates.gradient, norm)
        scale_gradients(model, clip_factor(norm))
        gates.gradient *= clip_factor(norm)
        lr = optimizer.param_groups[0]["lr"]
        optimizer.step()
        session.after_step(lr / run.facts["lr"])
        schedule.step()
        run.check_step(step, session, model, lr)
    run.check_outcome(session.harden())


class InOrder(IterableDataset):
    """The rows of a recorded run; a Trainer does not shuffle these."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __iter__(self):
        for step in range(STEPS):
            batch = self.run.batch(step)
            for row in range(self.run.facts["batch"]):
                yield {name: values[row] for name, values in batch.items()}


class ClipTogetherAndCheck(TrainerCallback):
    """Clips model and gates by one norm, as the published script does, and compares every update."""

    def __init__(self, run: Run, session) -> None:
        self.run, self.session = run, session
        session.model.register_forward_hook(self._keep_loss)

    def _keep_loss(self, module, args, outputs):
        self.loss = outputs.loss.item()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gates = self.session.pruners[0]  # which have their gradient: the plugin's callback was called before
        norm = joint_norm(model, gates.gradient)
        self.run.check_gradients(state.global_step, self.session, self.loss, gates.gradient, norm)
        scale_gradients(model, clip_factor(norm))
        gates.gradient *= clip_factor(norm)

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.run.check_step(state.global_step, self.session, model, optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("own_trainer", [True, False], ids=["callback", "trainer"])
def test_joint_run_in_a_trainer(reference, tmp_path, run, own_trainer):
    model = recorded_bert(reference)
    session = open_session(model, [run.pruner()])
    inject(session, run.arrays["w0"], run.arrays["u"])
    options = {"max_steps": STEPS, "per_device_train_batch_size": run.facts["batch"], "max_grad_norm": 0.0}
    options = {"model": model, "args": arguments(tmp_path, **options), "train_dataset": InOrder(run)}
    options |= {"optimizers": run.optimizer(model), "callbacks": [ClipTogetherAndCheck(run, session)]}
    if own_trainer:
        trainer = Trainer(**options)
        HeadPruningCallback(session).add_to(trainer)
    else:
        trainer = HeadPruningTrainer(session=session, **options)
    trainer.train()
    run.check_outcome(session.head_mask())
