"""GPP and DFD on a real BertForSequenceClassification against steps and runs of the published script, in float64."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from head_pruning import HeadMask, build_pruner
from head_pruning.distillation.engine.fusion import fused_loss
from head_pruning.gates.gpp import PENALTY, selected, squared_cosine
from head_pruning.registry import get_method
from head_pruning.surgery.removal import remove_heads
from hf_plugin import open_session
from hf_plugin.mapping.unit_map import unit_map
from tests.hf.training.test_reference_spd import batch_of, bert

PARITY = {"published_fusion": True, "distill_padding": True}


@pytest.fixture(scope="module")
def read(reference):
    place = reference / "gpp_dfd"
    if not (place / "gpp_step.npz").is_file():
        pytest.skip(f"there are no recorded numbers of GPP and DFD in {reference}")

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(place / name, allow_pickle=False) as arrays:
            return dict(arrays)

    return load


def build(method: str, **options):
    return build_pruner(get_method(method), SimpleNamespace(**options))


@pytest.mark.parametrize("number", range(4))
def test_fusion_and_its_gradient(read, number):
    recorded = {name: torch.from_numpy(array) for name, array in read(f"dfd_fusion_{number}.npz").items()}
    student = [state.clone().requires_grad_() for state in recorded["student"]]
    loss = fused_loss(student, list(recorded["teacher"]), 3, published=True)
    torch.testing.assert_close(loss, recorded["loss"].reshape(()), rtol=1e-10, atol=1e-10)
    loss.backward()
    torch.testing.assert_close(torch.stack([state.grad for state in student]), recorded["grad"], rtol=1e-7, atol=1e-9)


def test_indicators_of_60_updates(load_arrays):
    recorded = load_arrays("gpp.npz")
    target, steps = float(recorded["sparsity"][-1]), len(recorded["sparsity"])
    for step in range(1, steps + 1):
        sparsity = squared_cosine(step, steps, target)
        assert sparsity == pytest.approx(recorded["sparsity"][step - 1], abs=1e-12)
        total = 0.0
        for kind in ("head", "int"):
            chosen = selected(recorded[f"{kind}.grads_sum.{step}"].reshape(-1) / step, sparsity, published=True)
            z = np.where(chosen, 1.0 - sparsity / target, 1.0)
            np.testing.assert_allclose(z, recorded[f"{kind}.indicator.{step}"].reshape(-1), atol=1e-6, err_msg=step)
            total += 0.5 * z.sum()
        assert total == pytest.approx(float(recorded[f"indicator_loss.{step}"]), rel=1e-5)


def test_exactly_as_many_go_as_are_asked_for():
    tied = np.array([5.0, 5.0, 5.0, 1.0])
    assert selected(tied, 0.5).tolist() == [True, True, False, False]
    assert not selected(tied, 0.5, published=True).any()
    assert selected(np.arange(8.0), 0.125 - 1e-17).sum() == 1  # of eight, and no rounding makes it none


def cut(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch as long as its longest example, as the published code runs it."""
    longest = int(batch["attention_mask"].sum(1).max())
    return {name: value[:, :longest] if value.dim() > 1 else value for name, value in batch.items()}


def open_gpp(student, teacher, *, flooding_b=0.01, total=1, per_epoch=1.0, gpp=None, gated=True):
    gpp = build("gpp", **{"published_gradients": True, **(gpp or {})})
    pruners = [gpp] if gated else []
    if teacher is not None:
        pruners.append(build("dfd", teacher_path="recorded", flooding_b=flooding_b, **PARITY))
    session = open_session(
        student,
        pruners,
        load_teacher=lambda path, needs: (teacher, unit_map(teacher)),
        total_steps=total,
        steps_per_epoch=per_epoch,
    )
    return session, gpp


STEPS = {  # the loss of teacher and flooding, the indicators' name, and whether these learn
    "full": (True, "", 0.01, None),
    "flood_flip": (True, "", 2.5, None),
    "no_teacher": (False, "", 0.01, None),
    "heads_only": (True, "", 0.01, "structured_heads"),
    "retrain": (True, "01", 0.01, None),
    "finetune": (True, None, 0.01, None),  # dfd alone
}


@pytest.mark.parametrize("case", STEPS)
def test_losses_and_gradients_of_a_step(read, case):
    recorded = read("gpp_step.npz")
    taught, which, flooding_b, kind = STEPS[case]
    teacher = bert(read("gpp_teacher.npz"), 2).eval() if taught else None
    student = bert(read("gpp_student.npz"), 2).train()
    options = {} if kind is None else {"pruning_type": kind}
    gated = which is not None
    session, gpp = open_gpp(student, teacher, flooding_b=flooding_b, gpp=options, total=10, gated=gated)
    if gated:
        parts = [recorded[f"z_{part}{which}"].reshape(-1) for part in ("head", "int")]
        gpp.z = np.concatenate(parts[: 1 if kind else 2])
        gpp._set = lambda sparsity: None
    step = 1 if case != "retrain" else 6
    session.enter_phase(step)
    session.before_update(step)
    batch = cut(batch_of(recorded))
    out = student(**batch)
    np.testing.assert_allclose(out.logits.detach(), recorded[f"{case}.logits"], atol=1e-6)
    loss = session.loss(out.loss, batch, out)
    indicators = recorded[f"{case}.indicator"]
    if np.isfinite(indicators) and case != "retrain":
        told = session.metrics()["indicator_loss"]
        np.testing.assert_allclose(told, indicators, rtol=1e-6)
    added = float(indicators) if np.isfinite(indicators) else 0.0
    np.testing.assert_allclose(loss.item() + added, recorded[f"{case}.total"], rtol=1e-6)
    loss.backward()
    for name, parameter in student.named_parameters():
        if f"{case}.grad.{name}" in recorded:
            np.testing.assert_allclose(
                parameter.grad, recorded[f"{case}.grad.{name}"], rtol=1e-5, atol=1e-7, err_msg=name
            )
    if case in ("retrain", "finetune"):
        return
    session.after_backward()
    session.after_step()
    expected = [recorded[f"{case}.grad_z_{part}"].reshape(-1) for part in ("head", "int")[: 1 if kind else 2]]
    np.testing.assert_allclose(gpp.gradient(), np.concatenate(expected), rtol=1e-5, atol=1e-6)


def set_anew(session, gpp, micro_batches):
    """Set the indicators between two micro-batches, by the gradients so far, as the published code does."""
    begin, length = gpp._plan()
    if (gpp.step - begin) % gpp.period:
        return
    gradient = gpp.gradient() + session.gates.gradients.numpy() + PENALTY / micro_batches
    kinds = [selected(gradient[where], gpp.sparsity, published=True) for where in gpp._types()]
    gpp.z = np.where(np.concatenate(kinds), 1.0 - gpp.sparsity / gpp.target, 1.0)
    session.gates.training_values.copy_(torch.from_numpy(gpp.z))


ACCUMULATED = pytest.param("accum", 42, marks=pytest.mark.slow)


@pytest.mark.parametrize("case, models", [("legacy", 40), ("sane", 40), ACCUMULATED])
def test_runs_of_50_updates(read, reference, case, models):
    recorded = read(f"gpp_loop_{case}.npz")
    told = json.loads((reference / "gpp_dfd" / f"gpp_loop_{case}.json").read_text())
    teacher = bert(read(f"gpp_loop{models}_teacher.npz"), 2).eval()
    student = bert(read(f"gpp_loop{models}_student.npz"), 2).train()
    micro_batches = told.get("acc", 1)
    per_epoch = told["steps"] / told["ep"]
    session, gpp = open_gpp(
        student,
        teacher,
        total=told["steps"],
        per_epoch=per_epoch,
        gpp={
            "target_sparsity": told["ts"],
            "prune_epochs": float(told["pe"]),
            "prepruning_finetune_epochs": float(told["pf"]),
            "retrain_lr_factor": told["rlr"] / told["lr"],
            "published_gradients": not told["sane"],
        },
    )
    parameters = dict(student.named_parameters())
    plain = ("bias", "LayerNorm.weight")
    groups = [
        {"params": [p for n, p in parameters.items() if not n.endswith(plain)], "weight_decay": told["weight_decay"]},
        {"params": [p for n, p in parameters.items() if n.endswith(plain)], "weight_decay": 0.0},
    ]
    optimizer = None
    for step in range(told["steps"]):
        if session.enter_phase(step) or optimizer is None:
            optimizer = torch.optim.AdamW(groups, lr=told["lr"], betas=told["betas"], eps=told["eps"])
        begin, _ = session.schedule_span(step)
        for group in optimizer.param_groups:
            group["lr"] = told["lr"] * (1 - (step - begin) / (told["steps"] - begin))
        optimizer.zero_grad()
        session.before_update(step)
        indicators = np.concatenate([recorded[f"z_{part}"][step].reshape(-1) for part in ("head", "int")])
        first = step * micro_batches
        for place in range(first, first + micro_batches):
            penalty = session.metrics()["indicator_loss"] / micro_batches
            if place > first and step < told["prune_steps"]:
                set_anew(session, gpp, micro_batches)
            elif place > first and step == told["prune_steps"]:
                penalty = 0.0  # pruning ends between two micro-batches
            if place == first + micro_batches - 1:
                np.testing.assert_allclose(gpp.z, indicators, atol=1e-6, err_msg=str(step))
            batch = cut(batch_of(recorded, recorded["batches"][place]))
            out = student(**batch)
            loss = session.loss(out.loss, batch, out) / micro_batches
            np.testing.assert_allclose(loss.item() + penalty, recorded["total"][place], rtol=1e-6, err_msg=str(place))
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), told["clip"])
        np.testing.assert_allclose(norm, recorded["clip_norm"][step], rtol=1e-5, err_msg=str(step))
        session.after_backward()
        session.before_step(optimizer)
        np.testing.assert_allclose(optimizer.param_groups[0]["lr"], recorded["lr"][step], rtol=1e-6)
        optimizer.step()
        session.after_step()
        if step < told["prune_steps"] + (micro_batches == 1):
            expected = np.concatenate([recorded[f"G_{part}"][step].reshape(-1) for part in ("head", "int")])
            np.testing.assert_allclose(gpp.gradient(), expected, atol=5e-6, rtol=1e-6, err_msg=str(step))
        for name, key in (
            ("bert.encoder.layer.6.attention.self.query.weight", "w.q"),
            ("bert.encoder.layer.11.output.dense.weight", "w.ffn"),
            ("bert.encoder.layer.2.output.LayerNorm.bias", "w.lnb"),
        ):
            mine = parameters[name].detach()
            mine = mine[:, :16] if key == "w.ffn" else mine
            np.testing.assert_allclose(mine, recorded[key][step], atol=1e-6, err_msg=f"{step} {name}")
    mask = session.harden()
    final = np.concatenate([recorded[f"final_z_{part}"].reshape(-1) for part in ("head", "int")])
    assert mask.keep.tolist() == (final > 0).tolist()
    rows = {name: value[:6] for name, value in batch_of(recorded).items()}
    with torch.no_grad():
        np.testing.assert_allclose(student.eval()(**rows).logits, recorded["final_masked_logits"], atol=1e-6)
    session.detach()
    small = student
    remove_heads(small, unit_map(small), mask)
    with torch.no_grad():
        np.testing.assert_allclose(small(**rows).logits, recorded["final_masked_logits"], atol=1e-6)


@pytest.mark.parametrize("case", ["plain", "emptied"])
def test_cutting_heads_and_units_out(read, case):
    """An emptied sub-layer keeps bias and norm: as the masked model of the published code, unlike the cut one."""
    recorded = read("gpp_physical.npz")
    model = bert(read("gpp_student.npz"), 2).eval()
    keep = [recorded[f"{case}.z_{part}"].reshape(-1) > 0 for part in ("head", "int")]
    units = unit_map(model).numbering("both")
    before = sum(parameter.numel() for parameter in model.parameters())
    remove_heads(model, units, HeadMask(units, np.concatenate(keep)))
    names = ("input_ids", "attention_mask", "token_type_ids")
    with torch.no_grad():
        logits = model(**{name: torch.from_numpy(recorded[name]) for name in names}).logits
    np.testing.assert_allclose(logits, recorded[f"{case}.masked_logits"], atol=1e-6)
    params = recorded[f"{case}.params"]
    if case == "plain":
        np.testing.assert_allclose(logits, recorded["plain.pruned_logits"], atol=1e-6)
        assert before - sum(parameter.numel() for parameter in model.parameters()) == params[0] - params[1]
        layers = model.bert.encoder.layer
        assert [layer.attention.self.query.out_features for layer in layers] == recorded["plain.query_rows"].tolist()
        assert [layer.intermediate.dense.out_features for layer in layers] == recorded["plain.ffn_rows"].tolist()
    else:
        assert np.abs(logits.numpy() - recorded["emptied.pruned_logits"]).max() > 0.1
