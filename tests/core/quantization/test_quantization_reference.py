"""Fake quantization by moving averages against numbers recorded from the published code, and its integers."""

import json

import numpy as np
import pytest
import torch

from head_pruning.quantization.engine.inputs import QuantizedInput
from tests.reference import quantization as own

CASES = range(4)


@pytest.mark.parametrize("case", CASES)
def test_ten_training_steps(reference, load_arrays, case):
    """Outputs, gradients and the averages after every forward; weights have one scale for the whole tensor there."""
    recorded = load_arrays(f"pruneofa/qat_linear_{case}.npz")
    told = json.loads((reference / f"pruneofa/qat_linear_{case}.json").read_text())
    weight = torch.from_numpy(recorded["weight"]).requires_grad_()
    bias = torch.from_numpy(recorded["bias"]).requires_grad_() if told["bias"] else None
    scale = float(weight.detach().abs().max()) / 127.5
    quantized, out = QuantizedInput(), QuantizedInput()
    for step in range(10):
        quantized.enabled = out.enabled = on = step >= told["start"]
        x = torch.from_numpy(recorded["x"][step]).requires_grad_()
        rounded = torch.fake_quantize_per_tensor_affine(weight, scale, 0, -128, 127) if on else weight
        y = torch.nn.functional.linear(quantized(x), rounded, bias)
        y = out(y) if told["requant"] else y
        weight.grad = None
        if bias is not None:
            bias.grad = None
        y.backward(torch.from_numpy(recorded["grad_out"][step]))
        for found, name in ((y.detach(), "y"), (x.grad, "gx"), (weight.grad, "gw")):
            np.testing.assert_allclose(found, recorded[f"{name}.{step}"], rtol=0, atol=1e-5, err_msg=name)
        if bias is not None:
            np.testing.assert_allclose(bias.grad, recorded[f"gb.{step}"], rtol=0, atol=1e-5)
        for found, name in ((quantized, "in"), (out, "out")):
            if on and (name == "in" or told["requant"]):
                np.testing.assert_allclose(found.state(), recorded[f"{name}.{step}"][:4], rtol=2e-6, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_the_published_integers(reference, load_arrays, case):
    recorded = load_arrays(f"pruneofa/qat_linear_{case}.npz")
    told = json.loads((reference / f"pruneofa/qat_linear_{case}.json").read_text())
    (x_scale, x_zero), w_scale = recorded["in.9"][2:4], recorded["w.9"][2]
    q_x = own.quantize(recorded["xe"], x_scale, x_zero, 0, 255)
    q_w = own.quantize(recorded["weight"], w_scale, 0, -128, 127)
    q_bias = own.integer_bias(recorded["bias"] if told["bias"] else None, q_w, x_scale, w_scale, x_zero)
    np.testing.assert_array_equal(q_x, recorded["q_x"])
    np.testing.assert_array_equal(q_w, recorded["q_w"])
    np.testing.assert_array_equal(q_bias, recorded["q_bias"])
    out_scale, out_zero = recorded["out.9"][2:4] if told["requant"] else (None, None)
    if told["requant"]:
        n, a = own.multiplier(x_scale * w_scale / out_scale)
        assert (n, a) == (recorded["requant_n"][0], recorded["requant_a"][0])
    found = own.linear(q_x, q_w, q_bias, x_scale, w_scale, out_scale, out_zero)
    np.testing.assert_allclose(found, recorded["eval_div"], rtol=0, atol=1e-5)
    # And the product's fake quantization gives what these integers give, to one step of the outputs.
    quantized = QuantizedInput().eval()
    quantized.load(recorded["in.9"][:4].tolist())
    quantized.enabled = True
    y = quantized(torch.from_numpy(recorded["xe"])).numpy() @ (q_w * w_scale).T
    y = y + (recorded["bias"] if told["bias"] else 0.0)
    if told["requant"]:
        y = np.clip(y, -out_zero * out_scale, (255 - out_zero) * out_scale)
    assert np.abs(y - found).max() <= (0.51 * out_scale if told["requant"] else w_scale * x_scale)


def test_requantization_of_the_specification():
    assert [own.multiplier(0.0123), own.multiplier(1.5)] == [(21, 25795), (14, 24576)]
