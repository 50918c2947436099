"""The mathematics written once more (tests/reference) against numbers recorded from the published code."""

import json

import numpy as np
import pytest

from tests.reference import distillation as own_spd
from tests.reference import heads as own
from tests.reference import weights as own_weights
from tests.reference.bert import bert, cross_entropy


def test_gates(reference, load_arrays):
    cases, arrays = json.loads((reference / "gates.json").read_text()), load_arrays("gates.npz")
    compared = 0
    for case in cases["gumbel"]:
        key, k, t = case["key"], case["k"], case["t"]
        w, u = arrays[f"{key}_w"].astype(float), arrays[f"{key}_u"].astype(float)
        if case["n"] > 24 or not (t >= 0.2 or t <= 1e-8) or "f32" in key:
            continue  # slow, or ill-conditioned
        mask, jacobian = own.soft_top_k(w, u, k, t)
        np.testing.assert_allclose(mask, arrays[f"{key}_mask"], rtol=0, atol=1e-10, err_msg=key)
        expected = arrays[f"{key}_grad_w"]
        error = np.abs(arrays[f"{key}_g"] @ jacobian - expected).max()
        assert error <= 1e-6 * max(np.abs(expected).max(), 1e-6), key
        compared += 1
    assert compared > 50
    for case in cases["ste"]:
        if not case["key"].startswith("edge"):
            w = arrays[f"{case['key']}_w"]
            np.testing.assert_array_equal(own.straight_through(w, case["k"]), arrays[f"{case['key']}_mask"])
    for case in cases["concrete"]:
        key = case["key"]
        log_a, u = (arrays[f"{key}_{name}"].astype(float).reshape(-1) for name in ("log_a", "u"))
        gates = [own.l0_gate(*pair) for pair in zip(log_a, u)]
        np.testing.assert_allclose(gates, arrays[f"{key}_train"].reshape(-1), rtol=0, atol=1e-6)
        np.testing.assert_allclose(
            [own.l0_evaluation_gate(a) for a in log_a], arrays[f"{key}_eval"].reshape(-1), rtol=0, atol=2e-7
        )
        penalty = case["l0_penalty"] * sum(own.l0_open(a) for a in log_a)
        assert penalty == pytest.approx(float(arrays[f"{key}_penalty"]), rel=1e-6)
    for host, initial, cooldown in (("hf", 1000.0, 25000), ("fairseq", 0.1, 15000)):
        for step, expected in zip(arrays[f"temp_{host}_step"], arrays[f"temp_{host}_t"]):
            assert own.temperature(int(step), initial, 1e-8, cooldown) == pytest.approx(expected, rel=1e-9)


def test_bert_and_importance(load_arrays):
    recorded = load_arrays("hf_tiny.npz")
    state = {name[3:]: value for name, value in recorded.items() if name.startswith("sd.")}
    names = ("input_ids", "attention_mask", "token_type_ids", "labels")
    batches = [{name: recorded[f"batch{i}.{name}"] for name in names} for i in range(3)]

    def loss(batch, gates):
        return cross_entropy(bert([state] * 2, batch, 4, gates)[0], batch["labels"])

    partly = recorded["michel.partial_mask"].astype(float)
    for gates, kind in ((np.ones((2, 4)), "plain"), (partly, "masked")):
        logits = bert([state] * 2, batches[0], 4, gates)[0]
        np.testing.assert_allclose(logits, recorded[f"{kind}.logits"], rtol=0, atol=2e-6)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    for gates, prefix in ((np.ones((2, 4)), "michel."), (partly, "michel.partial_")):
        raw = own.importance(loss, batches, gates) / tokens
        np.testing.assert_allclose(raw, recorded[f"{prefix}raw"], rtol=0, atol=1e-5 * raw.max())
        np.testing.assert_allclose(own.normalized(raw), recorded[f"{prefix}final"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", ["default_dT5", "magnitude", "beta2_0"])
def test_platon(reference, load_arrays, case):
    recorded, told = (
        load_arrays(f"platon_{case}.npz"),
        json.loads((reference / "pruners.json").read_text())[f"platon_{case}"],
    )
    theirs = own_weights.Platon(told["pruner"].lower(), 60, **told["args"])
    for t in range(60):
        weights = {name: recorded[f"{name}.before.{t}"].copy() for name in told["pruned"]}
        ratio = theirs.update(t, weights, {name: recorded[f"{name}.grad.{t}"] for name in told["pruned"]})
        assert ratio == pytest.approx(recorded["ratio"][t], abs=1e-12)
        for name, value in weights.items():
            expected = recorded.get(f"{name}.after.{t}", recorded[f"{name}.before.{t}"])
            np.testing.assert_array_equal(value, expected, err_msg=f"{name} {t}")


@pytest.mark.parametrize("case, more", [
    ("unstructured", {}), ("unstructured_decay", {}), ("block_2", {"block": 2}), ("uniform_b4", {"group": 4}),
])  # fmt: skip
def test_gradual_magnitude(reference, load_arrays, case, more):
    recorded = load_arrays(f"intel_{case}.npz")
    told = json.loads((reference / "pruners.json").read_text())[f"intel_{case}"]
    options = {name: value for name, value in {**told["kw"], **told["config"]}.items() if not name.startswith("block")}
    theirs, first = own_weights.GradualMagnitude(**options, **more), load_arrays("mlp_init_data.npz")
    theirs.attach({name: first[f"{name}.weight"] for name in told["pruned"]})
    for t in range(60):
        masks = theirs.update(t, {name: recorded[f"{name}.weight_original.w.{t}"] for name in told["pruned"]})
        for name, mask in masks.items():
            np.testing.assert_array_equal(mask, recorded[f"{name}.mask.{t}"] > 0, err_msg=f"{name} {t}")


def test_masks_of_spd(reference, load_arrays):
    recorded = load_arrays("spd_default_device.npz")
    told = json.loads((reference / "pruners.json").read_text())["spd_default_device"]
    theirs = own_weights.SpdMasks(told["target"], told["sparse_step"], told["frequency"])
    names = sorted({key.rpartition(".before.")[0] for key in recorded if ".before." in key})
    for t in range(60):
        weights = {name: recorded[f"{name}.before.{t}"].copy() for name in names}
        theirs.update(t + 1, weights)  # its own counter
        for name, value in weights.items():
            np.testing.assert_array_equal(value, recorded[f"{name}.after.{t}"], err_msg=f"{name} {t}")


def test_rates_and_losses_of_spd(reference, load_arrays):
    place = reference / "spd"
    if not (place / "spd_schedules.json").is_file():
        pytest.skip(f"there are no recorded numbers of SPD in {reference}")
    rates = load_arrays("spd/spd_schedules.npz")
    for i, case in enumerate(json.loads((place / "spd_schedules.json").read_text())):
        if case["type"] != "lr":
            more = {"k": case.get("k", 0.0), "start": case.get("steps", 0), "base": case.get("base")}
            ours = [own_spd.replacing_rate(n, case["type"], case["rate"], **more) for n in range(201)]
            np.testing.assert_allclose(ours, rates[f"rate{i}"], rtol=0, atol=1e-12, err_msg=str(case))
    teacher, student = load_arrays("spd/spd_step_teacher.npz"), load_arrays("spd/spd_step_student.npz")
    for case in ("cls2_mixA", "cls2_all_student", "cls3_mixA"):
        recorded = load_arrays(f"spd/spd_step_{case}.npz")
        head = {f"classifier.{part}": teacher[f"classifier{case[3]}.{part}"] for part in ("weight", "bias")}
        states = [{**teacher, **head, **(student if drawn else {})} for drawn in recorded["pattern"]]
        mine, theirs = (bert(each, recorded, 4) for each in (states, [{**teacher, **head}] * 12))
        np.testing.assert_allclose(mine[0], recorded["logits"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(np.stack(mine[1]), recorded["hidden"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(np.stack(mine[2]), recorded["att"], rtol=0, atol=1e-6)
        found = own_spd.losses(mine, theirs, float(recorded["temperature"]))
        np.testing.assert_allclose(found, [recorded[f"L_{name}"] for name in ("att", "rep", "cls")], rtol=2e-6)
