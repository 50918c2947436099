"""Losses over a whole vocabulary, made a chunk at a time, against those of logits that are all there."""

import pytest
import torch

from head_pruning.distillation.engine import vocabulary
from head_pruning.distillation.losses import divergence
from head_pruning.outputs import LastLayer, Late, Outputs

ROWS, WIDTH, CLASSES = 23, 8, 50


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Of seven rows, worked on three at a time."""
    monkeypatch.setattr(vocabulary, "_CHUNK", {"cpu": 7 * CLASSES, "cuda": 7 * CLASSES})
    monkeypatch.setattr(vocabulary, "_BLOCK", {"cpu": 3 * CLASSES, "cuda": 3 * CLASSES})


def _late(seed: int, dtype=torch.float64, bias: bool = True) -> Late:
    generator = torch.Generator().manual_seed(seed)
    layer = torch.nn.Linear(WIDTH, CLASSES, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    features = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return Late(features.requires_grad_(), layer)


def _gradients(late: Late, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(3.0 * loss, [late.features, *late.layer.parameters()]))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("waits", [False, True])
def test_divergence_by_chunks_is_that_of_all_logits(temperature, padded, made, waits, monkeypatch):
    mine, theirs = _late(1), _late(2, bias=False)
    tokens = torch.rand(ROWS, generator=torch.Generator().manual_seed(3)) < 0.6 if padded else None
    whole = divergence(mine.whole(), theirs.whole(), temperature, tokens)
    wanted = _gradients(mine, whole)
    if waits:
        monkeypatch.setattr(vocabulary, "_on_cpu", lambda values: False)
        monkeypatch.setattr(torch.Tensor, "nonzero", lambda *args, **options: pytest.fail("the device is waited for"))
    targets = theirs.whole() if made else theirs
    before = targets.clone() if made else None
    loss = vocabulary.divergence(mine, targets, temperature, tokens)
    assert torch.allclose(loss, whole, rtol=1e-12)
    for found, right in zip(_gradients(mine, loss), wanted):
        assert torch.allclose(found, right, rtol=1e-10, atol=1e-13)
    assert before is None or torch.equal(targets, before)


def test_cross_entropy_by_chunks_is_that_of_all_logits():
    late = _late(1)
    labels = torch.randint(CLASSES, (ROWS,), generator=torch.Generator().manual_seed(4))
    whole = torch.nn.functional.cross_entropy(late.whole(), labels)
    loss = vocabulary.cross_entropy(late, labels)
    assert torch.allclose(loss, whole, rtol=1e-12) and torch.allclose(
        vocabulary.cross_entropy(late.whole(), labels), whole
    )
    for found, right in zip(_gradients(late, loss), _gradients(late, whole)):
        assert torch.allclose(found, right, rtol=1e-10, atol=1e-13)
    assert vocabulary.cross_entropy(late[:0], labels[:0]) == 0.0


def test_half_precision_loses_no_more_than_its_own_rounding():
    late, theirs = _late(1, torch.float32), _late(2, torch.float32)
    whole = divergence(late.whole(), theirs.whole(), 2.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = vocabulary.divergence(late, theirs, 2.0)
    assert loss.dtype == torch.float32 and torch.allclose(loss, whole, rtol=0.02)
    for found, right in zip(_gradients(late, loss), _gradients(late, whole)):
        assert found.dtype == torch.float32 and (found - right).norm() < 0.02 * right.norm()


def test_only_a_plain_last_layer_is_left_out():
    class Own(torch.nn.Linear):
        pass

    for layer in (None, Own(4, 9), torch.nn.Linear(9, 9)):
        assert LastLayer.of(torch.nn.Identity(), lambda model, found=layer: found) is None
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 9))
    last = LastLayer.of(model, lambda model: model[1])
    x = torch.randn(2, 3)
    with last.left_out():
        raw = model(x)
    assert raw.shape == (2, 4) and torch.equal(Outputs(raw=raw, last=last).logits[0], model(x))
    assert "forward" not in vars(model[1])
