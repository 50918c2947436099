"""Q8BERT's integer arithmetic of a linear layer, as its published code evaluates it, in floats that hold integers."""

import numpy as np

F = np.float32


def quantize(x, scale, zero_point, low, high):
    """Integers that stand for x; as torch does, by the inverse of the scale."""
    return np.clip(np.round(x * (F(1.0) / F(scale))) + F(zero_point), low, high)


def integer_bias(bias, weight, x_scale, w_scale, x_zero):
    """``[1, outputs]``: the bias in units of the product, and what the inputs' zero point adds to every product."""
    scaled = np.zeros(len(weight), F) if bias is None else np.round(bias / (F(x_scale) * F(w_scale)))
    return np.clip(scaled, -(2.0**31), 2.0**31 - 1)[None] - x_zero * weight.sum(1)[None]


def multiplier(scale):
    """A factor as ``(n, a)``: a * 2^-n, where a has 16 bits."""
    n = np.floor(15 - np.log2(scale))
    return n, min(np.round(scale * 2.0**n), 65535.0)


def linear(q_x, q_w, q_bias, x_scale, w_scale, out_scale=None, out_zero=None):
    """The outputs as floats; through 8 bits where the outputs have a scale. The weights' zero point is 0."""
    product = q_x @ q_w.T + q_bias
    if out_scale is None:
        return product * (F(x_scale) * F(w_scale))
    n, a = multiplier(x_scale * w_scale / out_scale)
    rounded = np.clip(np.round(product.astype(float) * a / 2.0**n) + out_zero, 0, 255)
    return (rounded - out_zero) * out_scale
