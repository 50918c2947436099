"""GPP on heads and feed-forward units, and DFD, in a loop of one's own."""

import copy
import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from head_pruning import FeedForwardSite, HeadPruningError, PruningSession, UnitMap, build_pruner
from head_pruning.distillation.engine.fusion import fused_loss, shares
from head_pruning.gates.gpp import selected, squared_cosine
from head_pruning.registry import get_method
from tests.core.test_contract import HEADS, Classifier, site

UPDATES, PER_EPOCH = 12, 2
BOTH = "structured_heads+structured_mlp"


def units() -> UnitMap:
    blocks = [
        FeedForwardSite(f"layers.{i}.ffn", f"layers.{i}", 12, f"layers.{i}.up", f"layers.{i}.down") for i in range(3)
    ]
    return UnitMap(tuple(site(i) for i in range(3)), tuple(blocks))


def build(method: str, **options):
    return build_pruner(get_method(method), SimpleNamespace(**options))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    return torch.randint(20, (8, 5), generator=draw), torch.randint(3, (8,), generator=draw)


def opened(model, *pruners, **options) -> PruningSession:
    given = {"total_steps": UPDATES, "steps_per_epoch": PER_EPOCH, **options}
    return PruningSession(model, units(), list(pruners), **given).attach()


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Classifier()


def train(session: PruningSession, steps=range(UPDATES), rate: float = 0.1) -> list[float]:
    """The learning rates that the optimizer stepped with."""
    rates = []
    for step in steps:
        if session.enter_phase(step) or step == steps[0]:
            optimizer = torch.optim.SGD(session.model.parameters(), lr=rate)
        session.before_update(step)
        inputs, labels = batch(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(session.model(inputs), labels)
        session.loss(loss, inputs).backward()
        session.after_backward()
        session.before_step(optimizer)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        session.after_step()
    return rates


# -- GPP -----------------------------------------------------------------------------------------------------------


def test_the_schedule_and_the_choice_of_the_specification():
    found = [squared_cosine(step, 10, 0.5) for step in (1, 3, 5, 8, 10, 11)]
    np.testing.assert_allclose(found, [0.000299, 0.02124, 0.125, 0.409068, 0.5, 0.5], atol=1e-6)
    gradient = np.array([5, 4, -6, 1, 2, 3, 0.5, 7])
    assert np.flatnonzero(selected(gradient, found[3])).tolist() == [0, 2, 7]
    assert np.flatnonzero(selected(gradient, found[4])).tolist() == [0, 1, 2, 7]
    assert selected(gradient, found[2]).sum() == 1  # an eighth of 8, whatever the rounding of the schedule


@pytest.mark.parametrize(
    "kind, heads, blocks", [(BOTH, 3, 18), ("structured_mlp", 6, 18), ("structured_heads", 3, 36)]
)
def test_half_of_each_type_goes_through_three_phases(kind, heads, blocks):
    gpp = build("gpp", pruning_type=kind, prepruning_finetune_epochs=1.0, prune_epochs=3.0, retrain_lr_factor=0.2)
    session = opened(model(), gpp)
    seen, phases = [], []
    for step in range(UPDATES):
        rates = train(session, range(step, step + 1))
        phases.append(session.phase(step)[0])
        assert rates == [pytest.approx(0.02 if step >= 8 else 0.1)]
        seen.append(gpp.z.copy())
        with session.evaluating():  # fractional values too
            np.testing.assert_allclose(session.gates.evaluation_values, gpp.z, rtol=1e-6)
        assert session.at_target() == (step >= 8)
    assert phases == [0, 0, *[1] * 6, *[2] * 4]
    assert (seen[1] == 1).all() and 0 < seen[6].min() < 1 and len(set(seen[6].tolist())) == 2
    for later in seen[9:]:
        assert (later == seen[8]).all() and set(later.tolist()) == {0.0, 1.0}
    mask = session.harden()
    whole = mask.numbering("both").counts()
    assert whole == {"heads": (heads, 3 * HEADS), "units": (blocks, 36)}


def test_useful_units_have_the_smaller_gradients():
    """A unit whose output is doubled in the loss's favour goes last: the penalty adds the same to all."""
    gpp = build("gpp", pruning_type="structured_mlp", prune_epochs=5.0, target_sparsity=0.25)
    session = opened(model(), gpp)
    train(session, range(4))
    learnt = gpp.gradient() - 0.5 * gpp.steps_above_0
    assert gpp.steps_above_0.tolist() == [4.0] * 36
    rank = np.argsort(np.abs(gpp.gradient()))
    assert set(np.flatnonzero(~gpp.keep())) == set(rank[-9:])
    assert learnt[rank[:9]].mean() < 0 < learnt[rank[-9:]].mean()


def _summed(gradients: torch.Tensor, flat: torch.Tensor) -> None:
    flat.copy_(torch.cat([gradients, flat[-1:] * 2]))


def test_ranks_sum_what_they_saw():
    """Two ranks with half of each batch set the indicators that one with the whole batch sets."""
    alone = opened(model(), build("gpp", prune_epochs=5.0))
    ranks = [opened(copy.deepcopy(model()), build("gpp", prune_epochs=5.0)) for _ in range(2)]
    for step in range(3):
        for session, part in zip((alone, *ranks), (slice(0, 8), slice(0, 4), slice(4, 8))):
            session.enter_phase(step)
            session.before_update(step)
            inputs, labels = (tensor[part] for tensor in batch(step))
            nn.functional.cross_entropy(session.model(inputs), labels).backward()
        both = ranks[0].gates.gradients.double() + ranks[1].gates.gradients.double()
        for session in (alone, *ranks):
            if session is not alone:
                session.all_reduce = functools.partial(_summed, both)
            session.after_backward()
            session.before_step()
            session.after_step()
    for session in ranks:
        np.testing.assert_allclose(session.pruners[0].gradient(), alone.pruners[0].gradient(), rtol=1e-5, atol=1e-7)


def test_a_skipped_update_learns_nothing():
    gpp = build("gpp", prune_epochs=5.0)
    session = opened(model(), gpp)
    session.before_update(0)
    inputs, labels = batch(0)
    (nn.functional.cross_entropy(session.model(inputs), labels) * float("inf")).backward()
    session.after_backward()
    session.skip_update()
    train(session, range(1, 3))
    assert np.isfinite(gpp.gradient()).all() and gpp.steps_above_0.tolist() == [2.0] * 42


def test_gradients_that_are_not_finite_do_not_spoil_the_sums():
    """Hosts without a loss scale step all the same."""
    gpp = build("gpp", prune_epochs=5.0)
    session = opened(model(), gpp)
    train(session, range(2))
    before = gpp.gradient()
    session.before_update(2)
    session.gates.gradients[3] = float("nan")
    session.after_backward()
    session.before_step()
    session.after_step()
    np.testing.assert_array_equal(gpp.gradient(), before + 0.5)


def test_a_run_that_has_pruned_is_not_resumed_with_another_target():
    first = opened(model(), build("gpp", prune_epochs=1.0))
    train(first, range(4))
    opened(model(), build("gpp", prune_epochs=1.0)).load_state_dict(first.state_dict())
    other = opened(model(), build("gpp", prune_epochs=1.0, target_sparsity=0.75))
    with pytest.raises(HeadPruningError, match="has removed 0.5 of the units, and --target-sparsity is 0.75; resume"):
        other.load_state_dict(first.state_dict())


def test_sums_are_restored_where_the_host_moves_the_model_after_it_opened_the_session():
    long = {"total_steps": 600}  # indicators are set every 12 updates; in between the device is not read
    first = opened(model(), build("gpp", prune_epochs=300.0), **long)
    train(first, range(3))
    moved = opened(model(), build("gpp", prune_epochs=300.0), **long)
    moved.model.to("meta")
    moved.load_state_dict(first.state_dict())
    moved.before_update(3)
    nn.functional.cross_entropy(moved.model(batch(3)[0].to("meta")), batch(3)[1].to("meta")).backward()
    moved.after_backward()
    moved.before_step()
    moved.after_step()
    assert moved.pruners[0]._total.device.type == "meta"


@pytest.mark.parametrize("options, sentence", [
    ({"target_sparsity": 0.02}, "--target-sparsity 0.02 takes none of 6 heads and 36 units; raise it"),
    ({"prepruning_finetune_epochs": 6.0}, "Pruning would end with update 13 of 12"),
    ({"target_sparsity": 1.0}, "--target-sparsity is 1.0; it must be a share above 0 and below 1"),
    ({"target_sparsity": 0.0}, "--target-sparsity is 0.0; it must be a share above 0 and below 1; for a model of"),
    ({"pruning_type": "heads"}, "--pruning-type is 'heads'; give structured_heads, structured_mlp or"),
    ({"prune_epochs": 5.0, "prepruning_finetune_epochs": 2.0}, "Pruning would end with update 14 of 12"),
])  # fmt: skip
def test_what_cannot_be_is_refused(options, sentence):
    with pytest.raises(HeadPruningError, match=sentence.replace("+", "[+]")):
        opened(model(), build("gpp", **options)).metrics()


def test_pruning_that_ends_with_training_is_told_of(caplog):
    session = opened(model(), build("gpp", prune_epochs=6.0))
    train(session)
    session.tell_unfinished()
    assert caplog.messages == [
        "training ended before the schedule of gpp did: the model was never trained with exactly the heads that are "
        "kept; lower prune_epochs"
    ]
    assert session.harden().counts() == {"heads": (3, 6), "units": (18, 36)}


def test_epochs_need_their_length():
    with pytest.raises(HeadPruningError, match="need the number of updates in an epoch"):
        opened(model(), build("gpp", prune_epochs=2.0), steps_per_epoch=None).metrics()
    with pytest.raises(HeadPruningError, match="needs the length of training"):
        opened(model(), build("gpp"), total_steps=None).metrics()


# -- DFD -----------------------------------------------------------------------------------------------------------


def states(seed: int, layers: int = 5, examples: int = 3) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(examples, 4, 6, generator=draw, dtype=torch.float64) + 0.3 for _ in range(layers)]


def straightforward(mine, theirs, window):
    """The definition, step by step."""
    theirs = list(theirs)
    for i in range(len(theirs) - 1, 0, -1):
        a, c = theirs[i - 1].sum(), theirs[i].sum()
        theirs[i - 1] = theirs[i - 1] * a / (a + c) + theirs[i] * c / (a + c)
    padded = [*mine, *[mine[-1]] * (window - 1)]
    total = 0.0
    for i, target in enumerate(theirs):
        part = padded[i : i + window]
        sums = [each.sum() for each in part]
        fused = sum(each * own / sum(sums) for each, own in zip(part, sums))
        total = total + (fused - target).square().mean()
    return total


@pytest.mark.parametrize("window", [1, 3, 7])
@pytest.mark.parametrize("layers", [1, 5])
def test_fusion_is_the_definition_at_any_depth(layers, window):
    mine, theirs = states(1, layers), states(2, layers)
    twins = [[each.clone().requires_grad_() for each in mine] for _ in range(2)]
    losses = straightforward(twins[0], theirs, window), fused_loss(twins[1], theirs, window, published=True)
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for one, other in zip(*twins):
        torch.testing.assert_close(one.grad, other.grad)


def test_examples_and_padding_apart():
    mine, theirs = states(3), states(4)
    whole = fused_loss(mine, theirs, 3, per_example=True)
    each = [fused_loss([s[i : i + 1] for s in mine], [s[i : i + 1] for s in theirs], 3) for i in range(3)]
    torch.testing.assert_close(whole, torch.stack(each).mean())
    mask = torch.arange(4).expand(3, 4) < 2
    padded = fused_loss(mine, theirs, 3, mask=mask)
    torch.testing.assert_close(padded, fused_loss([s[:, :2] for s in mine], [s[:, :2] for s in theirs], 3))
    mine, theirs = ([state[:2, :, :2] for state in each[:3]] for each in (mine, theirs))
    for options in ({"per_example": True}, {"mask": mask[:2]}, {"layers": "0:0,2:1"}):
        leaves = [state.clone().requires_grad_() for state in mine]
        assert torch.autograd.gradcheck(lambda *given, o=options: fused_loss(given, theirs, 2, **o), leaves)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tokens_are_counted_beyond_what_half_precision_holds(dtype):
    draw = torch.Generator().manual_seed(0)
    mine, theirs = ([torch.randn(4, 80, 256, generator=draw) + 0.3 for _ in range(2)] for _ in range(2))
    mask = torch.ones(4, 80, dtype=torch.bool)
    low = fused_loss([s.to(dtype) for s in mine], [s.to(dtype) for s in theirs], 2, mask=mask)
    torch.testing.assert_close(low, fused_loss(mine, theirs, 2, mask=mask), rtol=1e-2, atol=0)


def test_shares_are_bounded_where_sums_cancel_out():
    sums = torch.tensor([1.0, -0.999, 0.5, 0.0]).unbind()
    bounded = shares(torch.stack(sums[:2]))
    assert bounded.abs().max() <= 10 and shares(torch.stack(sums[:2]), published=True).abs().max() > 900
    torch.testing.assert_close(shares(torch.stack(sums[:3])), shares(torch.stack(sums[:3]), published=True))
    assert shares(torch.zeros(3)).isfinite().all()


def test_a_student_learns_beside_gpp():
    teacher, student = model(7), model(8)
    dfd = build("dfd", teacher_path="recorded", flooding_b=0.1, window_size=2)
    session = opened(student, build("gpp", prune_epochs=4.0), dfd, load_teacher=lambda path, needs: (teacher, units()))
    train(session, range(1), rate=1e-3)
    first = session.metrics()["dfd_hidden_loss"]
    train(session, range(1, UPDATES), rate=1e-3)
    assert 0 < session.metrics()["dfd_hidden_loss"] < first
    assert session.harden().counts() == {"heads": (3, 6), "units": (18, 36)}


def test_an_update_waits_for_the_device_only_where_indicators_are_set_anew():
    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._local_scalar_dense.default:
                seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list = []
    teacher = model(7)
    session = opened(model(8), build("gpp"), build("dfd", teacher_path="recorded"), total_steps=400,
                     load_teacher=lambda path, needs: (teacher, units()))  # fmt: skip
    gpp = session.pruners[0]
    read = reads_of(gpp)
    assert gpp.period == 4
    with Waits():
        for step in range(9):
            session.before_update(step)
            inputs, labels = batch(step)
            session.loss(nn.functional.cross_entropy(session.model(inputs), labels), inputs).backward()
            session.after_backward()
            session.before_step()
            session.after_step()
    assert not seen and read == [0, 4, 8]


def reads_of(gpp) -> list[int]:
    """The updates in which the sums of gradients are read, while they happen."""
    found: list[int] = []
    original = gpp.gradient

    def gradient():
        found.append(gpp.step)
        return original()

    gpp.gradient = gradient
    return found
