"""Fake quantization of inputs: when the average of their range moves, and what happens before there is one."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from head_pruning.quantization.engine.inputs import QuantizedInput

BATCHES = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))


def quantized(**options) -> QuantizedInput:
    layer = QuantizedInput(**options)
    layer.enabled = True
    return layer


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("per_token", [None, torch.nn.Identity()])
def test_what_is_computed_again_is_not_counted_twice(per_token, reentrant):
    kept, again = quantized(per_token=per_token), quantized(per_token=per_token)
    for batch in BATCHES:
        x, y = (batch.clone().requires_grad_() for _ in range(2))
        (kept(x) ** 3).sum().backward()
        checkpoint(lambda z: again(z) ** 3, y, use_reentrant=reentrant).sum().backward()
        assert torch.equal(x.grad, y.grad)
        assert kept.state() == again.state()


def test_nothing_is_rounded_by_a_range_that_is_not_there():
    layer = quantized().eval()
    assert torch.equal(layer(BATCHES[0]), BATCHES[0]) and layer.state() == [0.0] * 4
    layer.train()(BATCHES[0])
    rounded = layer.eval()(BATCHES[0])
    assert 0 < (rounded - BATCHES[0]).abs().max() < 0.02
    other = quantized().eval()
    other.load(layer.state())
    assert torch.equal(other(BATCHES[0]), rounded)
    other.load([0.0] * 4)
    assert torch.equal(other(BATCHES[0]), BATCHES[0])
