"""Sparse progressive distillation and its parts in a loop of one's own: schedules, draws, grafts, teachers, losses."""

import copy
import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from head_pruning import HeadPruningError, PruningSession, build_pruner
from head_pruning.distillation.grafting import Grafts
from head_pruning.distillation.losses import cosine_distance, divergence, layer_pairs, mean_square, soft_cross_entropy
from head_pruning.distillation.spd import SCHEDULERS, replacing_rate
from head_pruning.registry import get_method
from tests.core.test_contract import MAP, batch, make, task_loss

rates = st.floats(0.0, 1.0)


def build(name: str, **options):
    return build_pruner(get_method(name), SimpleNamespace(**options))


def open_session(model, *pruners, total=24, epoch=4, **options) -> PruningSession:
    return PruningSession(model, MAP, list(pruners), total_steps=total, steps_per_epoch=epoch, **options).attach()


def update(model, session, step: int, optimizer=None) -> torch.Tensor:
    session.enter_phase(step)
    session.before_update(step)
    model.zero_grad()
    loss = session.loss(task_loss(model, step))
    if loss.requires_grad:
        loss.backward()
    session.after_backward()
    session.before_step(optimizer)
    if optimizer is not None:
        optimizer.step()
    session.after_step()
    return loss


def other(seed: int = 1):
    """A teacher that is no copy of the student."""
    return lambda path, needs: (make(seed), MAP)


# -- schedules --------------------------------------------------------------------------------------------------------


@given(st.sampled_from(SCHEDULERS), rates, rates, st.floats(0, 0.1), st.integers(0, 60))
def test_rates_are_probabilities_that_rise(kind, rate, base, slope, start):
    base = max(rate, base)
    found = [replacing_rate(n, kind, rate=rate, base=base, slope=slope, start=start) for n in range(80)]
    assert all(0.0 <= value <= 1.0 for value in found) and found == sorted(found)
    assert found[0] == rate


def test_recorded_rates(reference):
    about = json.loads((spd(reference) / "spd_schedules.json").read_text())
    with np.load(spd(reference) / "spd_schedules.npz") as recorded:
        for i, case in enumerate(about):
            if case["type"] == "lr":
                continue
            ours = [
                replacing_rate(
                    n,
                    case["type"],
                    rate=case["rate"],
                    slope=case.get("k", 0.0),
                    start=case.get("steps", 0),
                    base=case.get("base"),
                )
                for n in range(201)
            ]
            np.testing.assert_allclose(ours, recorded[f"rate{i}"], rtol=0, atol=1e-12, err_msg=str(case))


def spd(reference):
    if not (reference / "spd" / "spd_schedules.json").is_file():
        pytest.skip(f"there are no recorded numbers of SPD in {reference}")
    return reference / "spd"


def test_recorded_learning_rates_of_the_two_phases(reference):
    about = json.loads((spd(reference) / "spd_schedules.json").read_text())
    with np.load(spd(reference) / "spd_schedules.npz") as arrays:
        recorded = [arrays["lr0"], arrays["lr1"]]
    for case, theirs in zip([case for case in about if case["type"] == "lr"], recorded):
        epoch = case["loader_len"]
        pruner = build(
            "spd", replacing_rate=0.8, published_schedule=True, num_prune_epochs=float(case["num_prune_epochs"])
        )
        session = open_session(make(), pruner, total=epoch * case["num_train_epochs"], epoch=epoch)
        second = epoch * case["num_prune_epochs"]
        for step, factor in enumerate(theirs):
            if step == second:  # the published code's second schedule sets in one update late
                assert session.phase(step) != session.phase(step - 1)
                continue
            begin, end = session.schedule_span(step)
            assert begin == (second if step > second else 0) and end - begin == case["horizon"]
            warmup, done = case["warmup_steps"], step - begin
            ours = done / warmup if done < warmup else (case["horizon"] - done) / (case["horizon"] - warmup)
            assert max(0.0, ours) == pytest.approx(factor, abs=1e-12), step
        session.detach()


@given(
    st.sampled_from(SCHEDULERS),
    rates,
    st.floats(0, 0.01),
    st.sampled_from([0, 3, 0.3, 90]),
    st.integers(2, 60),
    st.sampled_from([None, 0.5, 3.0, 400.0]),
)
def test_the_rate_reaches_one_before_training_ends(kind, rate, slope, start, total, prune_epochs):
    options = {"scheduler_linear_k": slope} if kind in ("linear", "constantLinearWithGap") else {}
    pruner = build(
        "spd",
        replacing_rate=rate,
        scheduler_type=kind,
        steps_for_replacing=start,
        num_prune_epochs=prune_epochs,
        distill_attention=0.0,
        **options,
    )
    session = open_session(make(), pruner, total=total)
    pruner._plan()
    found = [pruner._rate(step) for step in range(total)]
    assert found == sorted(found) and found[-1] == 1.0
    assert {session.phase(step) for step in range(total)} <= {(0,), (1,)}
    session.detach()


def test_the_published_rate_stays_and_the_log_says_so(caplog):
    caplog.set_level(logging.INFO)
    options = {"replacing_rate": 0.8, "num_prune_epochs": 3.0}
    for published, words in ((True, "replacing rate never reaches 1"), (False, "raised to reach 1 by update 18")):
        pruner = build("spd", published_schedule=published, **options)
        session = open_session(make(), pruner)
        session.before_update(0)
        assert words in caplog.text
        assert pruner._rate(23) == (0.8 if published else 1.0)
        session.detach()
        caplog.clear()


# -- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prune_epochs", [None, 1.0, 3.0, 99.0])
@pytest.mark.parametrize("published", [False, True])
def test_masks_are_nested_cubic_and_exact_before_the_last_update(prune_epochs, published):
    model = make()
    options = {"sparsity": 0.9, "num_prune_epochs": prune_epochs, "published_schedule": published}
    masks = build("spd_magnitude", **options)
    session = open_session(model, masks)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    past, seen = {}, []
    for step in range(24):
        update(model, session, step, optimizer)
        now = session.weight_masks()
        for name, keep in now.items():
            parameter = model.get_parameter(name)
            assert parameter.dim() == 2 and not parameter[~keep].any()
            assert not (keep & ~past.get(name, torch.ones_like(keep))).any(), "a weight came back"
        past = now
        seen.append(sum(int(keep.sum()) for keep in now.values()) if now else None)
        if step == 22 and not published:
            assert session.at_target()
    assert len(past) == 18 or published and prune_epochs == 99.0
    session.harden()
    for name, keep in session.weight_masks().items():
        wanted = int(keep.numel() * (1.0 - 0.9) + (0.0 if published else 1e-6))
        assert int(keep.sum()) == wanted, name


def test_the_recorded_masks(load_arrays):
    """The published ``Prune`` on a fixed MLP, whose final density it misses."""
    recorded = load_arrays("spd_default_device.npz")
    names = ("intermediate.dense.weight", "output.dense.weight")
    model = nn.ModuleDict({part: nn.ModuleDict({"dense": nn.Linear(1, 1)}) for part in ("intermediate", "output")})
    for name in names:
        owner = model.get_submodule(name.rpartition(".")[0])
        owner.weight = nn.Parameter(torch.from_numpy(recorded[f"{name}.before.0"]))
    steps = sum(key.startswith(f"{names[0]}.before.") for key in recorded)
    options = {"sparsity": 0.9, "mask_frequency": 4, "num_prune_epochs": 50.0, "published_schedule": True}
    masks = build("spd_magnitude", weights_include="weight", **options)
    session = PruningSession(model, None, [masks], total_steps=max(steps, 60), steps_per_epoch=1).attach()
    first = 0 if f"{names[0]}.after.0" in recorded else 1
    for t in range(first, steps):
        session.before_update(t)
        with torch.no_grad():
            for name in names:
                model.get_parameter(name).copy_(torch.from_numpy(recorded[f"{name}.before.{t}"]))
        session.after_step()
        for name in names:
            assert np.array_equal(model.get_parameter(name).detach(), recorded[f"{name}.after.{t}"]), (name, t)


# -- grafting ---------------------------------------------------------------------------------------------------------


def test_draws_are_of_the_seed_and_the_update_alone():
    def draws(seed, start=0):
        pruner = build("spd", replacing_rate=0.5, published_schedule=True)
        session = open_session(make(), pruner, seed=seed)
        found = []
        for step in range(start, 24):
            session.enter_phase(step)
            session.before_update(step)
            found.append(pruner.drawn.tolist())
        session.detach()
        return found

    one = draws(1)
    assert one == draws(1) and one[7:] == draws(1, 7) and one != draws(2)
    assert 0.3 < np.mean(one) < 0.7 and len({tuple(each) for each in one}) > 4


def test_something_learns_in_every_update():
    pruner = build("spd", replacing_rate=0.0, published_schedule=True)
    session, found = open_session(make(), pruner, seed=3), set()
    for step in range(12):
        session.before_update(step)
        assert pruner.drawn.sum() == 1
        found.add(int(pruner.drawn.argmax()))
    assert len(found) > 1


def test_a_layer_that_learns_is_drawn_where_others_are_frozen():
    model = make()
    for layer in model.layers[:2]:
        layer.requires_grad_(False)
    pruner = build("spd", replacing_rate=0.0, published_schedule=True)
    session = open_session(model, pruner, seed=3)
    for step in range(6):
        assert update(model, session, step).requires_grad
        assert pruner.drawn.tolist() == [False, False, True]


@pytest.mark.parametrize("drawn", [(0, 0, 0), (1, 0, 1), (1, 1, 1)])
def test_a_grafted_student_is_its_teacher_where_they_are_equal(drawn):
    model = make().train()
    expected = model(batch(0)[0])
    pruner = build("spd")
    session = open_session(model, pruner)
    pruner.draw = lambda step: np.array(drawn, dtype=bool)
    session.before_update(0)
    assert torch.equal(model(batch(0)[0]), expected)
    session.detach()


@pytest.mark.parametrize("drawn", [(0, 0, 0), (1, 0, 1), (0, 1, 1)])
def test_a_graft_computes_the_teachers_layer_and_only_in_training(drawn):
    model = make()
    teacher = make(1)
    pruner = build("spd", teacher_path="other")
    session = open_session(model, pruner, load_teacher=lambda path, needs: (teacher, MAP))
    pruner.draw = lambda step: np.array(drawn, dtype=bool)
    mixed, alone = copy.deepcopy(make()), make()(batch(0)[0])
    for number, mine in enumerate(drawn):
        if not mine:
            mixed.layers[number].load_state_dict(make(1).layers[number].state_dict())
    own = {name: id(parameter) for name, parameter in model.named_parameters()}
    session.before_update(0)
    assert torch.equal(model(batch(0)[0]), mixed(batch(0)[0]))
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == own
    assert torch.equal(model.eval()(batch(0)[0]), alone)
    model.train()
    with session.evaluating():
        assert torch.equal(model(batch(0)[0]), alone)
    assert torch.equal(model(batch(0)[0]), mixed(batch(0)[0]))
    update(model, session, 0)
    for number, mine in enumerate(drawn):
        grads = [p.grad for p in model.layers[number].parameters()]
        assert all((grad is not None) == bool(mine) for grad in grads), number
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("anew", [False, True])
def test_the_teachers_layer_stands_in_for_one_that_is_quantized(anew):
    """The quantizer puts linear layers of its own in their places, after the distiller was attached."""
    pytest.importorskip("torchao", reason="needs torchao")
    model, pruner = make(), build("spd", teacher_path="other")
    qat = build("qat", quantization_begin=3)
    session = open_session(model, pruner, qat, load_teacher=other())
    pruner.draw = lambda step: np.array([True, False, True])
    if anew:
        session.before_update(0)
        session.begin_anew()
    mixed = make()
    mixed.layers[1].load_state_dict(make(1).layers[1].state_dict())
    session.before_update(0)
    assert torch.equal(model(batch(0)[0]), mixed(batch(0)[0]))
    session.before_update(3)
    quantized = model(batch(0)[0])
    assert 0 < (quantized - mixed(batch(0)[0])).abs().max() < 0.02
    quantized.sum().backward()
    for number, layer in enumerate(model.layers):
        assert all((p.grad is None) == (number == 1) for p in layer.parameters()), number
    session.detach()
    assert torch.equal(model(batch(0)[0]), make()(batch(0)[0]))


def test_gradients_under_checkpointing_and_accumulation_are_the_same():
    found = []
    for reentrant in (None, False):
        model = make()
        model.reentrant = reentrant
        pruner = build("spd", teacher_path="other")
        session = open_session(model, pruner, load_teacher=other())
        pruner.draw = lambda step: np.array([True, False, True])
        session.before_update(0)
        for number in (0, 1):
            session.loss(task_loss(model, number), weight=0.5).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    one, two = found
    for name, gradient in one.items():
        assert (gradient is None) == (two[name] is None) and (gradient is None or torch.equal(gradient, two[name]))


def test_reentrant_checkpointing_is_refused_but_not_a_grafted_model():
    model = make()
    pruner = build("spd", teacher_path="other")
    session = open_session(model, pruner, load_teacher=other())
    pruner.draw = lambda step: np.zeros(3, dtype=bool)
    session.before_update(0)
    session.loss(task_loss(model, 0))  # no layer of the student's runs, so none lacks its gradient
    model.reentrant = True
    pruner.draw = lambda step: np.ones(3, dtype=bool)
    session.before_update(0)
    with pytest.raises(HeadPruningError, match="carries no gradient.*use_reentrant=False"):
        session.loss(task_loss(model, 0))


def test_probabilities_on_which_nothing_that_learns_acts_are_no_mistake():
    model = make().train().requires_grad_(False)
    for layer in model.layers:
        layer.attention.v.requires_grad_(True)
    session = open_session(model, build("logits", distill_attention=1.0, teacher_path="other"), load_teacher=other())
    assert update(model, session, 0).requires_grad  # those of the first layer follow from the embeddings alone
    assert model.layers[0].attention.v.weight.grad is not None


def test_copies_and_state_of_a_grafted_model_are_plain(tmp_path):
    model, pruner = make(), build("spd", teacher_path="other")
    keys, plain = list(model.state_dict()), make()(batch(0)[0])
    session = open_session(model, pruner, load_teacher=other())
    pruner.draw = lambda step: np.zeros(3, dtype=bool)
    session.before_update(0)
    assert list(model.state_dict()) == keys
    assert not torch.equal(model(batch(0)[0]), plain)
    assert torch.equal(copy.deepcopy(model).train()(batch(0)[0]), plain)
    torch.save(model, tmp_path / "model.pt")
    assert (tmp_path / "model.pt").stat().st_size < 2 * sum(p.numel() * 4 for p in model.parameters()) + 60_000
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(loaded.train()(batch(0)[0]), plain)


def test_a_layer_that_fails_leaves_the_student_its_own():
    model, pruner = make(), build("spd", teacher_path="other")
    session = open_session(model, pruner, load_teacher=other())
    pruner.draw = lambda step: np.zeros(3, dtype=bool)
    session.before_update(0)
    own = {name: id(parameter) for name, parameter in model.named_parameters()}
    with pytest.raises(RuntimeError):
        model.layers[1](torch.zeros(2, 3, 5))
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == own


def test_layers_that_differ_are_refused():
    one, other_ = make(), make()
    other_.layers[1].up = nn.Linear(8, 13)
    with pytest.raises(HeadPruningError, match=r"layers\.1 of the student and its teacher's differ in .*up\.weight"):
        Grafts(one, other_, MAP.layers, MAP.layers)
    with pytest.raises(HeadPruningError, match="3 layers and its teacher 2"):
        Grafts(one, other_, MAP.layers, MAP.layers[:2])


# -- teachers ---------------------------------------------------------------------------------------------------------


def test_detach_leaves_both_models_bit_equal():
    model, teacher = make(), make(1)
    before, theirs = copy.deepcopy(model.state_dict()), copy.deepcopy(teacher.state_dict())
    requires = [p.requires_grad for p in model.parameters()]
    pruner = build("spd", teacher_path="other")
    session = open_session(model, pruner, build("logits"), load_teacher=lambda path, needs: (teacher, MAP))
    update(model, session, 0)
    session.detach()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, theirs[name]) for name, value in teacher.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == requires
    for module in (*model.modules(), *teacher.modules()):
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_what_lies_outside_of_the_layers_is_held_once_and_frozen():
    model, pruner = make(), build("spd")
    session = open_session(model, pruner)
    theirs = dict(pruner.teacher.model.named_parameters())
    for name, parameter in model.named_parameters():
        assert (theirs[name] is parameter) == (not name.startswith("layers.")) == (not parameter.requires_grad), name
    session.detach()
    # Another teacher has another head, so the student's own learns.
    session = open_session(model, build("spd", teacher_path="other"), load_teacher=other())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("first", ["weights", "spd"])
def test_weights_that_are_pruned_are_not_the_teachers(first):
    model, spd = make().train(), build("spd", replacing_rate=0.5, distill_hidden=0.0)
    weights = build("magnitude", final_threshold=0.2, weights_include="head|attention")
    session = open_session(model, *((weights, spd) if first == "weights" else (spd, weights)))
    session.detach()
    session.attach()
    theirs = dict(spd.teacher.model.named_parameters())
    assert theirs["head.weight"] is not model.head.weight and model.head.weight.requires_grad
    assert theirs["embed.weight"] is model.embed.weight and not model.embed.weight.requires_grad
    before, optimizer = theirs["head.weight"].clone(), torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(24):
        update(model, session, step, optimizer)
    session.harden()
    assert (model.head.weight == 0).any() and torch.equal(theirs["head.weight"], before)


def test_a_model_whose_forward_its_copy_would_share_is_no_teacher_of_its_own():
    model, compiled = make(), make()
    compiled.forward = torch.compile(compiled.forward, backend="eager")
    with pytest.raises(HeadPruningError, match=r"forward of Classifier is a function of its own.*model.compile\(\)"):
        open_session(compiled, build("logits"))
    compiled = open_session(compiled, build("logits", teacher_path="other"), load_teacher=other())
    model.forward = model.forward  # bound to the model, as a copy's is to the copy
    distiller = build("logits")
    open_session(model, distiller)
    with torch.no_grad():
        model.head.weight += 1
    ids = batch(0)[0]
    assert not torch.equal(distiller.teacher.model(ids), model(ids))


@pytest.mark.parametrize("names", [("spd", "logits"), ("logits", "spd")])
def test_spd_beside_plain_distillation_shares_its_teacher(names):
    model = make()
    pruners = [build(name) for name in names]
    session = open_session(model, *pruners)
    assert pruners[0].teacher is pruners[1].teacher
    assert [p.requires_grad for n, p in model.named_parameters() if not n.startswith("layers.")] == [False] * 3
    session.before_update(0)
    session.loss(task_loss(model, 0)).backward()
    session.detach()
    assert all(parameter.requires_grad for parameter in model.parameters())


class Counting(nn.Module):
    """A teacher that counts how often it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = make(1), 0

    def forward(self, ids):
        assert not self.training and not torch.is_grad_enabled()
        self.calls += 1
        return self.inner(ids)


def test_distillers_of_one_teacher_ask_it_once_per_micro_batch():
    model, teacher = make(), Counting()
    pruners = [build("logits", teacher_path="other"), build("logits", teacher_path="other", distill_task=0.5)]
    pruners[1].name = "more"
    session = open_session(model, *pruners, load_teacher=lambda path, needs: (teacher, None))
    assert pruners[0].teacher is pruners[1].teacher
    session.before_update(0)
    session.loss(task_loss(model, 0))
    assert pruners[0].teacher._answer is None  # forgotten at once
    session.loss(task_loss(model, 1))
    assert teacher.calls == 2


def test_a_teacher_of_its_own_type_and_one_that_follows_the_student():
    model = make()
    low = build("logits", teacher_dtype="bfloat16")
    session = open_session(model, low)
    assert {p.dtype for p in low.teacher.model.parameters()} == {torch.bfloat16}
    session.before_update(0)
    session.loss(task_loss(model, 0)).backward()
    session.detach()
    same = build("logits")
    session = open_session(model, same)
    model.double()
    session.before_update(0)
    session.loss(task_loss(model, 0)).backward()
    assert {p.dtype for p in same.teacher.model.parameters()} == {torch.float64}


def test_layers_that_stand_in_follow_the_student():
    """They run before the teacher is asked, and what lies outside of them is the student's already."""
    model, given = make(), build("spd", replacing_rate=0.1)
    session = open_session(model, given)
    assert given.teacher.shared
    model.double()
    update(model, session, 0)
    assert not given.drawn.all()
    assert {p.dtype for p in given.teacher.model.parameters()} == {torch.float64}


def test_layers_of_another_type_cannot_stand_in():
    with pytest.raises(HeadPruningError, match="whose numbers are float32; drop --teacher-dtype bfloat16"):
        open_session(make(), build("spd", teacher_dtype="bfloat16"))
    model = make()
    open_session(model, build("spd", teacher_dtype="float32")).detach()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_run_is_not_resumed_with_another_teacher():
    first = open_session(make(), build("logits"))
    state = first.state_dict()
    open_session(make(), build("logits")).load_state_dict(state)
    trained = make()
    with torch.no_grad():
        trained.layers[0].up.weight.add_(1e-4)
    with pytest.raises(HeadPruningError, match="distilled from another teacher"):
        open_session(trained, build("logits")).load_state_dict(state)


@pytest.mark.parametrize("own", [None, "bfloat16"])
def test_a_run_whose_host_turns_to_half_precision_is_resumed(own):
    """The student is of float32 when it is attached, and of another type when the checkpoint is loaded."""

    def begun(seed=1):
        model, given = make(), build("logits", teacher_path="other", teacher_dtype=own)
        session = open_session(model, given, load_teacher=other(seed))
        model.bfloat16()
        return model, session

    model, session = begun()
    session.before_update(0)
    session.loss(task_loss(model, 0))
    assert next(session.pruners[0].teacher.model.parameters()).dtype == torch.bfloat16
    state = session.state_dict()
    # Earlier versions wrote the sums of the teacher's numbers as they were by then.
    low = [p.detach().double() for p in session.pruners[0].teacher.model.parameters()]
    sums = [sum(float(p.sum()) for p in low), sum(float(p.abs().sum()) for p in low), float(len(low))]
    assert state["logits.teacher"][0] != sums[0]
    for stored in (state, {**state, "logits.teacher": np.array(sums)}):
        begun()[1].load_state_dict(stored)
        with pytest.raises(HeadPruningError, match="distilled from another teacher"):
            begun(2)[1].load_state_dict(stored)


# -- losses -----------------------------------------------------------------------------------------------------------


def test_golden_losses():
    """Section 9.8 of the mathematics: both losses of logits."""
    theirs, mine = torch.tensor([[1.0, 2, 0], [0, 0, 3]]), torch.tensor([[0.5, 1, 0.2], [0.1, 0, 1]])
    assert float(divergence(mine, theirs, 2.0)) == pytest.approx(0.2998804, abs=1e-6)
    assert float(soft_cross_entropy(mine, theirs, 1.0)) == pytest.approx(0.2624336, abs=1e-6)


def test_padding_counts_only_where_asked_for():
    torch.manual_seed(0)
    mine, theirs = torch.randn(2, 2, 5, 3)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)
    expected = nn.functional.mse_loss(mine[mask], theirs[mask])
    assert float(mean_square(mine, theirs, mask[..., None])) == pytest.approx(float(expected), rel=1e-6)
    junk = mine.clone()
    junk[~mask] += 100.0
    assert torch.equal(mean_square(junk, theirs, mask[..., None]), mean_square(mine, theirs, mask[..., None]))
    whole = torch.ones_like(mask)
    assert float(mean_square(mine, theirs, whole[..., None])) == pytest.approx(
        float(mean_square(mine, theirs, None)), rel=1e-6
    )
    for loss in (divergence, soft_cross_entropy):
        assert torch.allclose(loss(mine, theirs, 2.0, mask), loss(mine[mask], theirs[mask], 2.0))


def test_the_cosine_of_hidden_states_is_that_of_real_tokens():
    torch.manual_seed(0)
    mine, theirs = (torch.randn(2, 5, 3, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)
    for rows, given_mask in ((mask, mask[..., None]), (torch.ones_like(mask), None)):
        expected = 1 - nn.functional.cosine_similarity(mine[rows], theirs[rows], dim=-1)
        assert torch.allclose(cosine_distance(mine, theirs, given_mask), expected.mean())


def test_attentions_alone_may_count_padding():
    tokens = torch.arange(5) < torch.tensor([5, 3, 4, 2])[:, None]

    def distance(**options) -> torch.Tensor:
        kd = build("logits", teacher_path="other", distill_logits=0.0, distill_task=0.0, **options)
        session = open_session(make(), kd, load_teacher=other())
        session.before_update(0)
        return session.loss(task_loss(session.model, 0), masks={"encoder": tokens}).detach()

    states, weights = distance(distill_hidden=1.0), distance(distill_attention=1.0, distill_padding=True)
    assert not torch.allclose(weights, distance(distill_attention=1.0))
    both = distance(distill_hidden=1.0, distill_attention=1.0, distill_attention_padding=True)
    torch.testing.assert_close(both, states + weights)


@given(st.integers(1, 30), st.integers(1, 30))
def test_layers_are_paired_evenly(mine, theirs):
    assert layer_pairs("last", mine, theirs) == [(mine - 1, theirs - 1)]
    pairs = layer_pairs(None, mine, theirs)
    assert [i for i, _ in pairs] == list(range(mine))
    ours = [j for _, j in pairs]
    assert ours == sorted(ours) and ours[-1] == theirs - 1 and (mine == 1 or ours[0] == 0)
    assert mine != theirs or ours == list(range(mine))


@pytest.mark.parametrize("name, options, words", [
    ("spd", {"scheduler_type": "cubic"}, "choose one of none, linear, mixed, constantLinearWithGap"),
    ("spd", {"replacing_rate": 1.5}, "--replacing-rate is 1.5; it must be a probability"),
    ("spd", {"base_replacing_rate": 0.5}, "what --scheduler-type constantLinearWithGap jumps to"),
    ("spd", {"scheduler_type": "mixed", "scheduler_linear_k": 0.1}, "slope of other schedules than mixed"),
    ("spd", {"num_prune_epochs": 0.0}, "--num-prune-epochs is 0.0; it must be a number of epochs above 0"),
    ("spd", {"teacher_dtype": "int8"}, "--teacher-dtype is 'int8'; choose one of float32"),
    ("spd_magnitude", {}, "--sparsity is 0, so nothing would be pruned"),
    ("logits", {"distill_logits": 0.0}, "All weights of logits are 0"),
    ("logits", {"distill_layers": "0:0"}, "neither is compared"),
    ("logits", {"distill_layers": "0-0", "distill_hidden": 1.0}, "--distill-layers 0-0 is no list of pairs"),
    ("logits", {"distill_hidden": -1.0}, "--distill-hidden is -1.0; it must be a weight"),
    ("logits", {"distill_hidden_loss": "cosine"}, "--distill-hidden-loss is given, but --distill-hidden is 0"),
    ("logits", {"distill_hidden": 1.0, "distill_hidden_loss": "l1"}, "is 'l1'; choose one of mse, cosine"),
    ("logits", {"distill_attention_padding": True}, "--distill-attention-padding is given, but --distill-att"),
    ("dfd", {"distill_hidden_loss": "cosine"}, "cosine is not for dfd, which compares fused hidden states"),
])  # fmt: skip
def test_mistakes(name, options, words):
    with pytest.raises(HeadPruningError, match=words):
        build(name, **options).check_options()


def test_what_the_session_lacks_is_said():
    with pytest.raises(HeadPruningError, match="--teacher-path is loaded by the host"):
        open_session(make(), build("logits", teacher_path="there"))
    session = PruningSession(make(), MAP, [build("spd", num_prune_epochs=3.0)], total_steps=9).attach()
    with pytest.raises(HeadPruningError, match="number of updates in an epoch"):
        session.before_update(0)
    wide = make()
    wide.head = nn.Linear(8, 4)
    session = open_session(make(), build("logits", teacher_path="wide"), load_teacher=lambda path, needs: (wide, None))
    session.before_update(0)
    model = session.model
    with pytest.raises(HeadPruningError, match=r"logits are of the shape \[\[4, 3\]\], its teacher's of \[\[4, 4\]\]"):
        session.loss(task_loss(model, 0))
