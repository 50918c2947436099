"""SPD on a real BertForSequenceClassification against steps and whole runs of the published script, in float64."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from head_pruning import build_pruner
from head_pruning.registry import get_method
from hf_plugin import open_session
from hf_plugin.mapping.unit_map import unit_map

LAYERS = 12
PUBLISHED = {"published_schedule": True, "distill_padding": True}
STEPS = [f"{task}_{draws}" for task in ("cls2",) for draws in ("all_student", "all_teacher", "mixA", "mixB")]
STEPS += ["cls3_mixA", "reg_mixA"]


@pytest.fixture(scope="module")
def place(reference):
    if not (reference / "spd" / "spd_schedules.npz").is_file():
        pytest.skip(f"there are no recorded numbers of SPD in {reference}")
    return reference / "spd"


@pytest.fixture(scope="module")
def read(place):
    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(place / name, allow_pickle=False) as arrays:
            return dict(arrays)

    return load


def bert(state: dict, labels: int, regression: bool = False) -> BertForSequenceClassification:
    """The recorded classifier of 12 layers without dropout, in float64."""
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=32,
        vocab_size=50,
        max_position_embeddings=24,
        num_labels=labels,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        problem_type="regression" if regression else "single_label_classification",
        attn_implementation="eager",
    )
    model = BertForSequenceClassification(config)
    missing, left_over = model.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()}, strict=False)
    assert not left_over and all(".layer." not in name for name in missing)
    return model.double()


def open_spd(student, teacher, draws, masks=None, **options):
    """A session of SPD with recorded draws (``[steps, layers]``)."""
    spd = build_pruner(get_method("spd"), SimpleNamespace(**{**PUBLISHED, "teacher_path": "recorded", **options}))
    spd.draw = lambda step: draws[step].astype(bool)
    weights = [] if masks is None else [build_pruner(get_method("spd_magnitude"), SimpleNamespace(**masks))]
    session = open_session(
        student,
        [*weights, spd],
        load_teacher=lambda path, needs: (teacher, unit_map(teacher)),
        total_steps=masks["total"] if masks else 1,
        steps_per_epoch=masks["epoch"] if masks else 1,
    )
    return session, spd


def batch_of(recorded: dict, rows=slice(None)) -> dict[str, torch.Tensor]:
    names = ("input_ids", "attention_mask", "token_type_ids", "labels")
    batch = {name: torch.from_numpy(recorded[name][rows]) for name in names}
    if batch["labels"].is_floating_point():
        batch["labels"] = batch["labels"].double()
    return batch


@pytest.mark.parametrize("case", STEPS)
def test_losses_and_gradients_of_a_step(read, case):
    recorded, teachers, students = (
        read(f"spd_step_{case}.npz"),
        read("spd_step_teacher.npz"),
        read("spd_step_student.npz"),
    )
    regression, labels = case.startswith("reg"), 1 if case.startswith("reg") else int(case[3])
    head = {f"classifier.{part}": teachers[f"classifier{labels}.{part}"] for part in ("weight", "bias")}
    body = {name: value for name, value in teachers.items() if not name.startswith("classifier")}
    teacher = bert({**body, **head}, labels, regression)
    student = bert({**body, **head, **students}, labels, regression).train()
    session, spd = open_spd(student, teacher, recorded["pattern"][None], temperature=float(recorded["temperature"]))
    assert len(spd.teacher.shared) == 9  # embeddings, pooler and classifier are held once
    session.before_update(0)
    seen = {}
    batch = batch_of(recorded)
    out = student(**batch)
    terms = spd.terms

    def note(loss, mine, other):
        seen.update(terms(loss, mine, other), mine=mine, theirs=other)
        return {name: seen[name] for name in ("attention", "hidden", "logits")}

    spd.terms = note
    total = session.loss(out.loss, batch, out, masks={"encoder": batch["attention_mask"].bool()})
    for name, key in (("attention", "L_att"), ("hidden", "L_rep"), ("logits", "L_cls")):
        np.testing.assert_allclose(seen[name].item(), recorded[key], rtol=1e-6, atol=1e-9, err_msg=name)
    np.testing.assert_allclose(total.item(), recorded["total"], rtol=1e-6)
    np.testing.assert_allclose(out.logits.detach(), recorded["logits"], atol=1e-6)
    np.testing.assert_allclose(torch.stack(seen["mine"].hidden_states).detach(), recorded["hidden"], atol=1e-6)
    np.testing.assert_allclose(torch.stack(seen["mine"].attentions).detach(), recorded["att"], atol=1e-6)
    np.testing.assert_allclose(torch.stack(seen["theirs"].hidden_states), recorded["t.hidden"], atol=1e-6)
    np.testing.assert_allclose(seen["theirs"].logits[0], recorded["t.logits"], atol=1e-6)
    if not recorded["pattern"].any():
        assert not total.requires_grad
        return
    total.backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert gradients.keys() == {name[5:] for name in recorded if name.startswith("grad.")}
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, recorded[f"grad.{name}"], rtol=1e-5, atol=1e-7, err_msg=name)
    assert all(p.grad is None for p in teacher.parameters())


class PublishedAdamW(torch.optim.Optimizer):
    """AdamW of transformers 2.4: eps beside the uncorrected root, the decay after the step."""

    def __init__(self, parameters, decay: float) -> None:
        super().__init__(parameters, {"lr": 0.0, "decay": decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(t=0, m=torch.zeros_like(parameter), v=torch.zeros_like(parameter))
                state["t"] += 1
                state["m"].mul_(0.9).add_(parameter.grad, alpha=0.1)
                state["v"].mul_(0.999).addcmul_(parameter.grad, parameter.grad, value=0.001)
                size = group["lr"] * (1 - 0.999 ** state["t"]) ** 0.5 / (1 - 0.9 ** state["t"])
                parameter.addcdiv_(state["m"], state["v"].sqrt().add_(1e-8), value=-size)
                if group["decay"]:
                    parameter.add_(parameter, alpha=-group["lr"] * group["decay"])


@pytest.mark.parametrize("case", ["a", "b"])
def test_runs_of_24_updates_and_more(read, place, case):
    recorded, told = read(f"spd_traj_{case}.npz"), json.loads((place / f"spd_traj_{case}.json").read_text())
    first, last = read(f"spd_traj_{case}_init.npz"), read(f"spd_traj_{case}_final.npz")
    began = read(f"spd_traj_{case}_init_student.npz") if case == "a" else {}
    regression, labels = case == "b", told["labels"]
    teacher = bert(first, labels, regression)
    student = bert({**first, **began}, labels, regression).train()
    epoch = told["n_train_examples"] / told["batch"]
    masks = {
        "sparsity": told["sparsity"],
        "mask_frequency": told["frequency"],
        "num_prune_epochs": float(told["num_prune_epochs"]),
        "total": told["steps"],
        "epoch": epoch,
        "published_schedule": True,
    }
    names = ("replacing_rate", "scheduler_type", "scheduler_linear_k", "steps_for_replacing")
    options = {name: told[name] for name in names if name in told}
    options["num_prune_epochs"] = masks["num_prune_epochs"]
    session, spd = open_spd(student, teacher, recorded["draws"], masks, **options)
    assert session.pruners[0].length == -1
    decay, plain = told.get("weight_decay", 0.0), ("bias", "LayerNorm.weight")
    layers = [(n, p) for n, p in student.named_parameters() if p.requires_grad]
    assert len(layers) == 16 * LAYERS
    optimizer = PublishedAdamW([
        {"params": [p for n, p in layers if not n.endswith(plain)], "decay": decay},
        {"params": [p for n, p in layers if n.endswith(plain)], "decay": 0.0},
    ], 0.0)  # fmt: skip
    parameters, drawn = dict(student.named_parameters()), []
    tensors = [
        f"bert.encoder.layer.{i}.{part}.weight"
        for i in range(LAYERS)
        for part in (
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
        )
    ]
    for step in range(told["steps"]):
        session.enter_phase(step)  # the published optimizer keeps its averages
        session.before_update(step)
        batch = batch_of(recorded, recorded["batches"][step])
        out = student(**batch)
        np.testing.assert_allclose(out.logits.detach(), recorded["logits"][step], atol=1e-6, err_msg=str(step))
        loss = session.loss(out.loss, batch, out)
        np.testing.assert_allclose(loss.item(), recorded["total"][step], rtol=1e-6, err_msg=str(step))
        optimizer.zero_grad()
        loss.backward()
        session.after_backward()
        for _, parameter in layers:  # the published norm is also that of parameters which nobody trains
            if parameter.grad is not None:
                parameter.grad.mul_(min(1.0, 1.0 / (float(recorded["clip_norm"][step]) + 1e-6)))
        for group in optimizer.param_groups:
            group["lr"] = float(recorded["lr"][step])
        session.before_step(optimizer)
        optimizer.step()
        before = session.pruners[0].selected
        session.after_step()
        if session.pruners[0].selected != before and session.pruners[0].has_mask:
            drawn.append(step + 1)
        zeros = [int((parameters[name] == 0).sum()) for name in tensors]
        assert zeros == recorded["zeros"][step].tolist(), step
        for name in ("attention.self.query.weight", "output.dense.weight", "output.LayerNorm.weight"):
            ours = parameters[f"bert.encoder.layer.{told['layer']}.{name}"].detach()
            np.testing.assert_allclose(ours, recorded[f"w.{step + 1}.{name}"], atol=1e-6, err_msg=f"{step} {name}")
    assert drawn == recorded["mask_steps"].tolist()
    for name, value in last.items():
        if ".layer." in name:
            np.testing.assert_allclose(parameters[name].detach(), value, atol=1e-6, err_msg=name)
    if case == "b":  # the recording of the other has another number of updates in ten epochs
        ours = [spd._rate(step) for step in range(len(recorded["rates"]))]
        np.testing.assert_allclose(ours[: told["steps"]], recorded["rates"][: told["steps"]], atol=1e-6)
