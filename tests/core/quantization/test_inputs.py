"""Fake quantization of inputs: when the average of their range moves, and what happens before there is one.

And which layers of a model are quantized, and when.
"""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from head_pruning import HeadPruningError, PruningSession
from head_pruning.quantization.engine.inputs import QuantizedInput, begin_update, end_update, undo_update
from head_pruning.quantization.qat import QatConfig, QatPruner

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


def moved_by(batches, over_ranks=None, start=None) -> QuantizedInput:
    """One update of these micro-batches."""
    layer = quantized()
    if start is not None:
        layer.load(start)
    begin_update([layer])
    for batch in batches:
        layer(batch)
    end_update([layer], over_ranks)
    return layer


@pytest.mark.parametrize("start", [None, [-0.5, 2.5, 3.0 / 255, 42.0]])
def test_the_range_of_an_update_is_that_of_all_its_micro_batches(start):
    whole = quantized()
    if start:
        whole.load(start)
    expected = whole(torch.cat(list(BATCHES)))
    several, alone = moved_by(BATCHES, start=start), moved_by([torch.cat(list(BATCHES))], start=start)
    assert several.state() == alone.state() == whole.state()
    assert torch.equal(several.eval()(torch.cat(list(BATCHES))), expected)
    for batch in BATCHES:  # and between updates each forward is one
        whole(batch), several.train()(batch)
    assert several.state() == whole.state()


def test_two_ranks_hold_the_range_of_both():
    """The second is told what the first would send; what each computes before is as on one process."""
    sent: list[torch.Tensor] = []
    moved_by(BATCHES[:1], over_ranks=sent.append)
    moved_by(BATCHES[1:], over_ranks=sent.append)
    first, second = (moved_by(part, lambda t: t.copy_(torch.maximum(*sent))) for part in (BATCHES[:1], BATCHES[1:]))
    assert first.state() == second.state() == moved_by(BATCHES).state()


def test_a_layer_that_no_micro_batch_reached_keeps_its_range():
    start = quantized()
    start(BATCHES[0])
    layer, other = quantized(), quantized()
    layer.load(start.state())
    begin_update([layer, other])
    other(BATCHES[0]), other(BATCHES[1])
    end_update([layer, other])
    assert layer.state() == start.state() != other.state()


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("start", [None, [-0.5, 2.5, 3.0 / 255, 42.0]])
def test_an_update_that_is_taken_back_leaves_no_range(start, ended, count):
    """Overflows among its micro-batches, too; and one that comes to no end is taken back by the next."""
    layer, never = quantized(), quantized()
    for each in (layer, never):
        each.load(start or [0.0] * 4)
    begin_update([layer])
    for batch in (BATCHES[0] * torch.inf, *BATCHES[1:])[:count]:
        layer(batch)
    if ended:
        end_update([layer])
        undo_update([layer])
    for each in (layer, never):
        begin_update([each])
    expected = never.eval()(BATCHES[0])
    assert torch.equal(layer.eval()(BATCHES[0]), expected) and layer.state() == never.state()
    for each in (layer.train(), never.train()):
        each(BATCHES[1]), each(BATCHES[2])
        end_update([each])
    assert layer.state() == never.state() and layer.state()[2]


def test_a_micro_batch_that_overflows_is_in_no_range():
    start = [-0.5, 2.5, 3.0 / 255, 42.0]
    for spoilt in (torch.inf, torch.nan):
        batch = BATCHES[0].clone()
        batch[0, 0] = spoilt  # one end of the range alone
        assert moved_by([batch, BATCHES[1]], start=start).state()[:2] == start[:2]


# -- layers of a model ------------------------------------------------------------------------------------------------


def attached(model, total=20, **options) -> PruningSession:
    pytest.importorskip("torchao", reason="needs torchao")
    return PruningSession(model, None, [QatPruner(QatConfig(**options))], total_steps=total).attach()


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 5))


@pytest.mark.parametrize("ranges", ["token", "average"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_is_made_half_precision_later_keeps_ranges_in_float32(ranges, dtype):
    model = layers()
    session = attached(model, input_ranges=ranges)
    session.before_update(0)
    model(BATCHES[0])
    session.after_backward()
    session.after_step()
    state = session.state_dict()
    model.to(dtype)
    assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(state[k])) for k, v in session.state_dict().items())
    session.before_update(1)
    assert model(BATCHES[1].to(dtype)).dtype == dtype
    assert model[0].activation_fake_quantizer.low.dtype == torch.float32
    assert model.to("meta")[0].activation_fake_quantizer.low.is_meta


def test_numbers_that_cannot_be_quantized_are_refused():
    model = layers().double()
    with pytest.raises(HeadPruningError, match=r"The weights of 0 are float64, .*model.float\(\)"):
        attached(model)
    assert type(model[0]) is nn.Linear
    assert attached(model.float())


class Twice(nn.Module):
    """A layer under two names, and a block under two, whose layer has one place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(5, 5), nn.Sequential(nn.Linear(5, 5))
        self.parts = nn.ModuleList([self.first, self.block])

    def forward(self, x):
        return self.parts[1](self.parts[0](self.block(self.first(x))))


def test_a_layer_under_two_names_is_left_out():
    model = Twice()
    modules = dict(model.named_modules(remove_duplicate=False))
    expected = model(BATCHES[0])
    session = attached(model)
    assert model.first is model.parts[0] is modules["first"]
    assert type(model.block[0]) is not nn.Linear and model.parts[1] is model.block
    session.detach()
    assert dict(model.named_modules(remove_duplicate=False)) == modules
    assert torch.equal(model(BATCHES[0]), expected)


def test_a_layer_of_one_input_is_left_out():
    """Such as what is left of a feed-forward block."""
    model = nn.Sequential(nn.Linear(5, 1), nn.Linear(1, 5))
    attached(model).before_update(0)
    model(BATCHES[0]).sum().backward()
    assert type(model[0]) is not nn.Linear and type(model[1]) is nn.Linear


def test_a_resumed_run_keeps_the_begin_that_it_was_started_with():
    """A share of the training that was planned then; a state of an earlier version does not tell."""

    def begins(session) -> int:
        return next(step for step in range(100) if session.before_update(step) or session.at_target())

    session = attached(layers(), quantization_begin=0.2)
    assert session.state_dict()["qat.begin"] == [-1]
    session.before_update(0)
    state = session.state_dict()
    for change, expected in ((set(), 4), ({"qat.begin"}, 20)):
        resumed = attached(layers(), total=100, quantization_begin=0.2)
        resumed.load_state_dict({name: value for name, value in state.items() if name not in change})
        assert begins(resumed) == expected
        resumed.begin_anew()
        assert begins(resumed) == 20
