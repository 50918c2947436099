"""The gate functions against numbers recorded from the published code, and against the specification's tables."""

import json

import numpy as np
import pytest

from head_pruning import AttentionSite, UnitMap
from head_pruning.gates import SoftTopK, gumbel, hard_top_k, plan_rounds
from head_pruning.gates.ste import STEConfig, STEPruner
from head_pruning.gates.voita import VoitaConfig, VoitaPruner, expected_gates, open_probability, sample_gates
from head_pruning.importance import normalize_importance
from head_pruning.schedules import log_linear

EPS = float(np.finfo(np.float64).eps)


@pytest.fixture(scope="module")
def cases(reference) -> dict:
    return json.loads((reference / "gates.json").read_text())


@pytest.fixture(scope="module")
def arrays(load_arrays) -> dict:
    return load_arrays("gates.npz")


def draw(w, u, k: int, t: float) -> SoftTopK:
    return SoftTopK(
        np.asarray(w, dtype=np.float64) + gumbel(np.asarray(u, dtype=np.float64)), plan_rounds(len(w), k), t
    )


# -- Gumbel soft top-K ---------------------------------------------------------------------------------------------


def test_gumbel_masks_and_gradients(cases, arrays, reference):
    """All well-conditioned recorded cases: masks to 1e-10, gradients to 1e-7 of the largest entry."""
    ill = {case["key"] for case in json.loads((reference / "gates_ill_conditioned.json").read_text())}
    compared = 0
    for case in cases["gumbel"]:
        key = case["key"]
        if key in ill or "f32" in key:
            continue
        g, expected = arrays[f"{key}_g"], arrays[f"{key}_grad_w"]
        sample = draw(arrays[f"{key}_w"], arrays[f"{key}_u"], case["k"], case["t"])
        np.testing.assert_allclose(sample.mask, arrays[f"{key}_mask"], rtol=0, atol=1e-10, err_msg=key)
        # One softmax's rounding error is EPS times its upstream gradient over the temperature.
        floor = 4 * EPS * np.abs(g).max() / case["t"]
        error = np.abs(sample.backward(g) - expected).max()
        assert error <= 1e-7 * np.abs(expected).max() + floor, (key, error)
        compared += 1
    assert compared == 413


def test_gumbel_masks_agree_to_rounding_where_the_gates_are_soft(cases, arrays):
    """At temperatures from 0.1 up nothing amplifies rounding: 1e-14 per kept head, gradients to 1e-9."""
    compared = 0
    for case in cases["gumbel"]:
        key = case["key"]
        if case["t"] < 0.1 or "f32" in key:
            continue
        g, expected = arrays[f"{key}_g"], arrays[f"{key}_grad_w"]
        sample = draw(arrays[f"{key}_w"], arrays[f"{key}_u"], case["k"], case["t"])
        np.testing.assert_allclose(sample.mask, arrays[f"{key}_mask"], rtol=0, atol=1e-14 * case["k"], err_msg=key)
        floor = 4 * EPS * np.abs(g).max() / case["t"]
        assert np.abs(sample.backward(g) - expected).max() <= 1e-9 * np.abs(expected).max() + floor, key
        compared += 1
    assert compared > 200


def test_gumbel_masks_are_exact_where_the_recursion_saturates(cases, arrays):
    compared = 0
    for case in cases["gumbel"]:
        key = case["key"]
        if case["t"] > 1e-8:
            continue
        sample = draw(arrays[f"{key}_w"], arrays[f"{key}_u"], case["k"], case["t"])
        np.testing.assert_array_equal(sample.mask, arrays[f"{key}_mask"], err_msg=key)
        if "f32" not in key:
            np.testing.assert_array_equal(sample.backward(arrays[f"{key}_g"]), arrays[f"{key}_grad_w"], err_msg=key)
        compared += 1
    assert compared > 50


def test_gumbel_float32_masks(cases, arrays):
    """Logits of float32: the recursion runs in float64, so the recorded masks agree to their own precision."""
    keys = [case for case in cases["gumbel"] if "f32" in case["key"]]
    assert len(keys) == 3
    for case in keys:
        key = case["key"]
        sample = draw(arrays[f"{key}_w"], arrays[f"{key}_u"], case["k"], case["t"])
        np.testing.assert_allclose(sample.mask, arrays[f"{key}_mask"], rtol=0, atol=2e-6, err_msg=key)


GOLDEN = [
    (1, 1.0, ".11460164 .50538298 .04465937 .16498913 .04305037 .12731651",
     "-.21756584 -.45406292 .00453502 .18174326 .09047236 .39487812"),
    (2, 1.0, ".2629087 .87074378 .10701895 .36635217 .10326447 .28971192",
     "-.53640014 -.62853838 -.02042746 .25962933 .18138997 .74434669"),
    (3, 0.5, ".45294046 1.14609679 .08915699 .7056782 .08313503 .52299253",
     "-1.73255331 -.00110761 -.09899318 .05388169 .22497115 1.55380126"),
    (4, 0.1, "1.36172738 .99998486 .00837877 .90825674 .00580596 .71584628",
     "-6.91046076 .0000879 .16093891 2.81559892 .22762214 3.7062129"),
    (5, 1000.0, ".8333286 .83456556 .83254396 .83363221 .83251342 .83341625",
     "-.0020821 -.00125096 -.00041572 .00041703 .00124866 .00208309"),
]  # fmt: skip
GOLDEN_W = np.array([0.3, -0.1, 0.2, 0.0, -0.4, 0.1])
GOLDEN_U = np.array([0.5, 0.9, 0.2, 0.7, 0.4, 0.6])


@pytest.mark.parametrize("k, t, mask, gradient", GOLDEN)
def test_golden_gumbel_table(k, t, mask, gradient):
    sample = draw(GOLDEN_W, GOLDEN_U, k, t)
    np.testing.assert_allclose(sample.mask, np.array(mask.split(), dtype=float), rtol=0, atol=6e-9)
    expected = np.array(gradient.split(), dtype=float)
    np.testing.assert_allclose(sample.backward(np.arange(1.0, 7.0)), expected, rtol=0, atol=6e-9)


# -- straight-through and hard top-K -------------------------------------------------------------------------------


def test_ste_masks_and_gradients(cases, arrays):
    pruner = STEPruner(STEConfig(num_of_heads=1))
    for case in cases["ste"]:
        key = case["key"]
        if key.startswith("edge"):
            continue
        keep = hard_top_k(arrays[f"{key}_w"], plan_rounds(case["n"], case["k"]))
        np.testing.assert_array_equal(keep, arrays[f"{key}_mask"] > 0.5, err_msg=key)
        gradient = arrays[f"{key}_g"].astype(np.float32)  # gates and their gradients are float32, there as here
        np.testing.assert_array_equal(pruner.chain(gradient), arrays[f"{key}_grad_w"], err_msg=key)


def test_ste_edge_cases_keep_exactly_k(cases):
    """The published threshold keeps too few heads under ties and fails for K = N; here it is always K."""
    edges = {case["key"]: case for case in cases["ste"] if case["key"].startswith("edge")}
    assert sum(edges["edge_ties"]["mask"]) == 1 and sum(edges["edge_all_equal"]["mask"]) == 0
    assert "IndexError" in edges["edge_k_eq_n"]["error"]
    for case in edges.values():
        keep = hard_top_k(np.array(case["w"]), plan_rounds(len(case["w"]), case["k"]))
        assert keep.sum() == case["k"]
        # What the published code did keep is kept here too.
        assert keep[np.flatnonzero(case.get("mask", []))].all()


def test_golden_ste_mask():
    np.testing.assert_array_equal(hard_top_k(GOLDEN_W, plan_rounds(6, 3)), [True, False, True, False, False, True])


def test_conversion_to_the_final_mask(cases, arrays):
    for case in cases["mask"]:
        key = case["key"]
        w, mask = arrays[f"{key}_w"].reshape(-1), arrays[f"{key}_mask"].reshape(-1) > 0.5
        if key == "mask_thr":  # gates above 0.5, which is where log_a is above 0
            np.testing.assert_array_equal(w > 0.5, mask)
        else:
            np.testing.assert_array_equal(hard_top_k(w, plan_rounds(w.size, case["K"])), mask, err_msg=key)


def test_conversion_of_tied_logits_keeps_as_many_heads(arrays):
    w, mask = arrays["mask_tie_w"].reshape(-1), arrays["mask_tie_mask"].reshape(-1) > 0.5
    keep = hard_top_k(w, plan_rounds(w.size, int(mask.sum())))
    assert keep.sum() == mask.sum()
    np.testing.assert_array_equal(np.sort(w[keep]), np.sort(w[mask]))


# -- hard concrete -------------------------------------------------------------------------------------------------


def test_hard_concrete_gates_and_gradients(cases, arrays):
    """Recorded in float32, computed here in float64: equal to float32 rounding."""
    for case in cases["concrete"]:
        key = case["key"]
        log_a, u, g = (arrays[f"{key}_{name}"].astype(np.float64).reshape(-1) for name in ("log_a", "u", "g"))

        def recorded(name, key=key):
            return arrays[f"{key}_{name}"].reshape(-1)

        gates, slope = sample_gates(log_a, u)
        np.testing.assert_allclose(gates, recorded("train"), rtol=0, atol=1e-6, err_msg=key)
        np.testing.assert_allclose(slope * g, recorded("grad_train"), rtol=0, atol=4e-6, err_msg=key)
        assert (gates == 0).sum() == case["train_zero"]
        np.testing.assert_allclose(expected_gates(log_a), recorded("eval"), rtol=0, atol=2e-7, err_msg=key)
        assert (expected_gates(log_a) == 0).sum() == case["eval_zero"]
        p, dp = open_probability(log_a)
        np.testing.assert_allclose(case["l0_penalty"] * p.sum(), recorded("penalty")[0], rtol=3e-7, err_msg=key)
        np.testing.assert_allclose(
            case["l0_penalty"] * dp, recorded("grad_penalty"), rtol=2e-6, atol=1e-7 * case["l0_penalty"], err_msg=key
        )


def test_golden_hard_concrete_table():
    log_a = np.array([-3.0, -0.5, 0.0, 2.0])
    np.testing.assert_allclose(expected_gates(log_a), [0, 0.3530488, 0.5, 0.9569565], rtol=0, atol=6e-8)
    np.testing.assert_allclose(2 * open_probability(log_a)[0].sum(), 4.6032076, rtol=0, atol=5e-7)
    gates, _ = sample_gates(log_a, np.array([0.1, 0.5, 0.8, 0.3]))
    np.testing.assert_allclose(gates, [0, 0.1162119, 1, 1], rtol=0, atol=1e-7)


def test_voita_without_k_keeps_what_the_published_threshold_keeps(arrays):
    """``log_a > 0`` here is ``evaluation gate > 0.5`` there."""
    for i in range(6):
        log_a = arrays[f"concrete_{i}_log_a"].astype(np.float64).reshape(-1)
        unit_map = UnitMap((AttentionSite("a", "encoder_self", "l", log_a.size, 1, "a.out"),))
        pruner = VoitaPruner(VoitaConfig(l0_penalty=1.0))
        pruner.unit_map, pruner.rounds, pruner.logits = unit_map, None, log_a
        np.testing.assert_array_equal(pruner.keep(), arrays[f"concrete_{i}_eval"].reshape(-1) > 0.5)


# -- temperature ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host, initial, steps", [("hf", 1000.0, 25000), ("fairseq", 0.1, 15000)])
def test_temperature_schedules(arrays, host, initial, steps):
    expected = arrays[f"temp_{host}_t"]
    ours = [log_linear(int(s), initial=initial, final=1e-8, steps=steps) for s in arrays[f"temp_{host}_step"]]
    assert len(ours) > 5 and expected.min() < 2e-8 and expected.max() > initial / 2
    np.testing.assert_allclose(ours, expected, rtol=1e-12)


@pytest.mark.parametrize(
    "initial, steps, step, expected",
    [(1000, 25000, 6250, 1.77828), (1000, 25000, 12500, 3.16228e-3), (1000, 25000, 18750, 5.62341e-6),
     (0.1, 15000, 3750, 1.77828e-3), (0.1, 15000, 7500, 3.16228e-5)],
)  # fmt: skip
def test_golden_temperatures(initial, steps, step, expected):
    assert log_linear(step, initial=initial, final=1e-8, steps=steps) == pytest.approx(expected, rel=3e-6)


# -- Michel's normalisation ----------------------------------------------------------------------------------------


def _rows(shape) -> UnitMap:
    return UnitMap(
        tuple(AttentionSite(f"a{i}", "encoder_self", f"l{i}", shape[1], 1, f"o{i}") for i in range(shape[0]))
    )


@pytest.mark.parametrize("file, raw", [("hf_tiny.npz", "michel.raw"), ("fs_tiny.npz", "michel.sum_signed")])
def test_importance_normalisation(load_arrays, file, raw):
    recorded = load_arrays(file)
    unit_map = _rows(recorded[raw].shape)
    for name, options in (("layernorm", {"globally": False}), ("final", {})):
        ours = normalize_importance(recorded[raw].reshape(-1), unit_map, **options)
        np.testing.assert_allclose(ours, recorded[f"michel.{name}"].reshape(-1), rtol=0, atol=3e-7)
    np.testing.assert_array_equal(
        normalize_importance(recorded[raw].reshape(-1), unit_map, by_layer=False, globally=False),
        recorded[raw].reshape(-1).astype(np.float64),
    )


def test_importance_normalisation_of_a_partly_pruned_model(load_arrays):
    """Removed heads take part in their layer's norm."""
    recorded = load_arrays("hf_tiny.npz")
    raw = recorded["michel.partial_raw"]
    ours = normalize_importance(raw.reshape(-1), _rows(raw.shape))
    np.testing.assert_allclose(ours, recorded["michel.partial_final"].reshape(-1), rtol=0, atol=3e-7)
