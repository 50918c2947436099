"""Exact K-subsets: the distribution against all subsets, one by one; the pruner; the falling number of open heads."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from head_pruning import HeadPruningError, PruningSession, build_pruner, methods
from head_pruning.gates.engine import conditional_bernoulli
from head_pruning.gates.engine.conditional_bernoulli import ConditionalBernoulli


def enumerated(logits: np.ndarray, keep: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance over all masks of ``keep`` of N."""
    masks = np.array([z for z in itertools.product((0.0, 1.0), repeat=logits.size) if sum(z) == keep])
    score = masks @ logits
    p = np.exp(score - score.max())
    p /= p.sum()
    mean = p @ masks
    return mean, (masks * p[:, None]).T @ masks - np.outer(mean, mean)


@given(st.data())
def test_mean_and_covariance_are_those_of_all_subsets(data):
    size = data.draw(st.integers(1, 9))
    scale = data.draw(st.sampled_from([0.0, 0.3, 2.0, 16.0, 300.0]))
    values = hnp.arrays(np.float64, size, elements=st.floats(-1, 1, width=32))
    logits, gradient = scale * data.draw(values), data.draw(values)
    keep = data.draw(st.integers(0, size))
    mean, covariance = enumerated(logits, keep)
    subset = ConditionalBernoulli(logits, keep)
    np.testing.assert_allclose(subset.marginals, mean, rtol=0, atol=1e-13)
    np.testing.assert_allclose(subset.covariance_times(gradient), covariance @ gradient, rtol=0, atol=1e-13)
    assert subset.sample(np.random.default_rng(0)).sum() == keep


@pytest.mark.parametrize("size, keep", [(144, 12), (144, 132), (3000, 1400)])
@pytest.mark.parametrize("scale", [0.1, 4.0, 80.0])
def test_large_subsets_keep_their_sums_and_their_symmetry(size, keep, scale):
    """Marginals sum to K, gradients to 0; keeping K is dropping N - K; a shift changes nothing."""
    rng = np.random.default_rng(size + keep)
    logits, gradient = scale * rng.normal(size=size), rng.normal(size=size)
    subset = ConditionalBernoulli(logits, keep)
    through = subset.covariance_times(gradient)
    assert subset.marginals.sum() == pytest.approx(keep, abs=1e-8)
    assert through.sum() == pytest.approx(0.0, abs=1e-9)
    dropped = ConditionalBernoulli(-logits, size - keep)
    np.testing.assert_allclose(subset.marginals, 1.0 - dropped.marginals, rtol=0, atol=1e-10)
    np.testing.assert_allclose(through, dropped.covariance_times(gradient), rtol=0, atol=1e-10)
    shifted = ConditionalBernoulli(logits + 1000.0, keep)
    np.testing.assert_allclose(subset.marginals, shifted.marginals, rtol=0, atol=1e-9)
    # The gradient is the derivative of the marginals.
    up, down = (ConditionalBernoulli(logits + sign * 1e-5 * gradient, keep).marginals for sign in (1, -1))
    np.testing.assert_allclose(through, (up - down) / 2e-5, rtol=0, atol=1e-5)


@pytest.mark.parametrize("many", [2048, 1])
def test_draws_have_the_marginals_as_their_mean(monkeypatch, many):
    """Also where they are made of halves, down to single coins."""
    monkeypatch.setattr(conditional_bernoulli, "_MANY", many)
    logits = np.random.default_rng(1).normal(size=7)
    subset, generator = ConditionalBernoulli(logits, 3), np.random.default_rng(2)
    draws = np.array([subset.sample(generator) for _ in range(20_000 if many > 1 else 1_000)])
    assert (draws.sum(axis=1) == 3).all()
    near = 0.015 if many > 1 else 0.06
    np.testing.assert_allclose(draws.mean(axis=0), subset.marginals, atol=near)
    # Pairs too: the draws are those of the joint distribution.
    np.testing.assert_allclose(
        np.cov(draws.T.astype(float), bias=True), enumerated(logits, 3)[1], atol=0.015 if many > 1 else 0.06
    )


@pytest.mark.parametrize("keep", [1, 16_000])
def test_a_draw_of_as_many_units_as_models_have_takes_no_longer_than_a_few_sums(keep):
    logits = np.random.default_rng(keep).normal(size=37_000)
    subset, generator = ConditionalBernoulli(logits, keep), Thrown(np.random.default_rng(0))
    drawn = subset.sample(generator)
    assert drawn.sum() == keep and generator.numbers < 30 * logits.size


class Thrown:
    """A generator that counts what it is asked for."""

    def __init__(self, generator) -> None:
        self.generator, self.numbers = generator, 0

    def random(self, shape=()):
        self.numbers += int(np.prod(shape))
        return self.generator.random(shape)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_cannot_be_are_refused(bad):
    with pytest.raises(HeadPruningError, match="lower --pruning-lr"):
        ConditionalBernoulli(np.array([0.0, bad, 1.0]), 2)


# -- the pruners ---------------------------------------------------------------------------------------------------


def opened(toy, name: str, **options) -> PruningSession:
    method = methods()[name]
    given = {**method.example, **options}
    model, unit_map = toy.make(0)
    return PruningSession(model, unit_map, [build_pruner(method, SimpleNamespace(**given))], total_steps=20).attach()


def update(toy, session: PruningSession, step: int) -> np.ndarray:
    """One update without an optimizer; the gates of it."""
    session.before_update(step)
    session.model.zero_grad()
    session.loss(toy.loss(session.model, toy.batch(step))).backward()
    session.after_backward(denominator=24)
    session.before_step(None)
    session.after_step()
    return session.gates.training_values.numpy().copy()


@pytest.mark.parametrize("name, more", [("subset", {}), ("head_sensitivity", {}), ("ste", {}), ("dsp", {})])
def test_the_number_of_open_heads_falls_from_all_to_k(toy, name, more):
    session = opened(toy, name, count_schedule="2:0.5", **more)
    sums, targets = [], []
    for step in range(12):
        sums.append(update(toy, session, step).sum())
        targets.append(session.at_target())
    begin, end, size, keep = 2, 10, 12, 4
    progress = np.clip((np.arange(12) - begin) / (end - begin), 0, 1)
    np.testing.assert_allclose(sums, np.round(keep + (size - keep) * (1 - progress) ** 3), atol=1e-5)
    assert not any(targets[:9]) and all(targets[10:])


@pytest.mark.parametrize("name", ["subset", "head_sensitivity"])
def test_the_heads_that_stay_are_settled_when_the_fall_ends(toy, name):
    session = opened(toy, name, count_schedule="0:0.5")
    gates = [update(toy, session, step) for step in range(14)]
    assert all(set(each) <= {0.0, 1.0} for each in gates)
    assert len({each.tobytes() for each in gates[10:]}) == 1 and gates[10].sum() == 4
    np.testing.assert_array_equal(gates[-1], session.head_mask().keep)
    np.testing.assert_array_equal(session.gates.evaluation_values.numpy(), gates[-1])


@pytest.mark.parametrize("name", ["subset", "head_sensitivity"])
def test_the_log_tells_of_the_heads_that_are_open_now(toy, name):
    """Also where the fall is so steep that the last draw had more than K."""
    session = opened(toy, name, count_schedule="0:2")
    for step in range(4):
        opened_now = update(toy, session, step).sum()
        assert session.metrics()["heads_expected"] == opened_now == (12, 5, 4, 4)[step]
    assert session.metrics().get("gate_norm", 0.0) == 0.0  # no gradient is looked at any more


@pytest.mark.parametrize("name", ["subset", "head_sensitivity"])
def test_a_run_that_has_settled_is_not_resumed_with_another_number_of_heads(toy, name):
    """It would be trained with one mask and saved with another."""
    first = opened(toy, name, count_schedule="0:2")
    for step in range(3):
        update(toy, first, step)
    opened(toy, name, count_schedule="0:2").load_state_dict(first.state_dict())
    other = opened(toy, name, count_schedule="0:2", num_of_heads=2)
    with pytest.raises(HeadPruningError, match="settled on 4 heads, and this run's options give 2; resume with"):
        other.load_state_dict(first.state_dict())


def learn(toy, session, step):
    """An update in which the loss falls by 1 with each of heads 2, 5 and 7; the others only make noise."""
    session.before_update(step)
    with torch.no_grad():
        toy.loss(session.model, toy.batch(step))
    noise = np.random.default_rng(step).normal(size=12)
    session.gates.gradients += torch.from_numpy(0.3 * noise - np.isin(np.arange(12), [2, 5, 7]))
    session.after_backward()
    session.before_step(None)
    session.after_step()


@pytest.mark.parametrize("name", ["subset", "head_sensitivity"])
def test_the_heads_that_lower_the_loss_stay(toy, name):
    session = opened(toy, name, num_of_heads=3, count_schedule="0:0.9")
    for step in range(19):
        learn(toy, session, step)
    np.testing.assert_array_equal(np.flatnonzero(session.harden().keep), [2, 5, 7])


@pytest.mark.parametrize("name", ["subset", "head_sensitivity"])
@pytest.mark.parametrize("minimum", [{"min_heads_per_layer": 1}, {"min_heads_per_kind": 1}])
def test_groups_have_their_minimum_in_every_update(toy, name, minimum):
    session = opened(toy, name, count_schedule="0:8", **minimum)
    groups = session.unit_map.rows() if "min_heads_per_layer" in minimum else session.unit_map.kinds().values()
    for step in range(10):
        gates = update(toy, session, step)
        assert all(gates[group].sum() >= 1 for group in groups)
    assert session.head_mask().kept == 4


def one_of_each_kind_first(logits: np.ndarray, keep: int, gradient: np.ndarray) -> tuple[float, np.ndarray]:
    """The mean of gradient.z over draws of ``keep`` of two kinds, one of each first; of their gradient, too."""
    half = logits.size // 2
    kinds = [np.arange(half), np.arange(half, logits.size)]
    first = [ConditionalBernoulli(logits[kind], 1) for kind in kinds]
    mean, chained = 0.0, np.zeros(logits.size)
    for kind, stage in zip(kinds, first):
        mean += stage.marginals @ gradient[kind]
        chained[kind] += stage.covariance_times(gradient[kind])
    for pair in itertools.product(range(half), repeat=2):
        rest = np.delete(np.arange(logits.size), [pair[0], half + pair[1]])
        stage = ConditionalBernoulli(logits[rest], keep - 2)
        share = first[0].marginals[pair[0]] * first[1].marginals[pair[1]]
        mean += share * (stage.marginals @ gradient[rest])
        chained[rest] += share * stage.covariance_times(gradient[rest])
    return mean, chained


@pytest.mark.parametrize("keep, least", [(2, 1.0), (4, 0.97), (7, 0.80)])
def test_with_minima_the_gradient_is_nearly_that_of_the_mean(keep, least):
    """Not exactly, as what a draw leaves for the next one is held fixed: least where nearly all heads are open."""
    alike = []
    for seed in range(20):
        logits, gradient = np.random.default_rng(seed).normal(size=(2, 8))
        step = 1e-5 * np.eye(8)
        up, down = ([one_of_each_kind_first(logits + s * each, keep, gradient)[0] for each in step] for s in (1, -1))
        true, ours = (np.array(up) - down) / 2e-5, one_of_each_kind_first(logits, keep, gradient)[1]
        alike.append(true @ ours / np.linalg.norm(true) / np.linalg.norm(ours))
    assert np.mean(alike) > least - 1e-6
    assert keep == 2 or max(alike) < 1.0 - 1e-6


@pytest.mark.parametrize("minimum", [{}, {"min_heads_per_layer": 1}, {"min_heads_per_kind": 1}])
def test_nothing_is_learnt_where_all_heads_are_open(toy, minimum):
    """Also where groups are drawn one after the other."""
    session = opened(toy, "subset", count_schedule="2:0.5", **minimum)
    assert update(toy, session, 0).all()
    assert not session.pruners[0].logits.any()
    for step in range(1, 5):
        update(toy, session, step)
    assert session.pruners[0].logits.any()


def test_draws_follow_from_seed_and_update_and_not_from_the_order(toy):
    one, other = opened(toy, "subset"), opened(toy, "subset")
    for step in (0, 3):
        one.before_update(step)
    other.before_update(3)
    assert one.gates.training_values.equal(other.gates.training_values)
    other.before_update(4)
    assert not one.gates.training_values.equal(other.gates.training_values)


@pytest.mark.parametrize("mixed", [False, True])
def test_heads_are_chosen_by_the_task_loss_alone_unless_the_teacher_may_join(toy, mixed):
    teacher, unit_map = toy.make(5)
    options = SimpleNamespace(num_of_heads=4, joint_pruning=True, count_schedule="0:0.5", teacher_path="teacher")
    options.distill_while_choosing = mixed
    pruners = [build_pruner(methods(None)[name], options) for name in ("subset", "logits")]
    session = PruningSession(toy.make(0)[0], unit_map, pruners, total_steps=20)
    session.load_teacher = lambda path, needs: (teacher.eval(), unit_map)
    session.attach()
    learnt, asked = [], []
    teacher.register_forward_hook(lambda *_: asked.append(step))
    for step in range(12):
        session.before_update(step)
        task = toy.loss(session.model, toy.batch(step))
        learnt.append(session.loss(task) is not task)
        session.after_backward()
        session.before_step(None)
        session.after_step()
    assert learnt == [mixed] * 10 + [True] * 2
    assert asked == (list(range(12)) if mixed else [0, 10, 11])  # at first, to see whether it fits


@pytest.mark.parametrize("options, widths, sentence", [
    ({}, {"head": 7}, "logits are of the shape .*; take a teacher of the same task"),
    ({"distill_hidden": 1.0, "distill_layers": "0:0,1:99"}, {}, "--distill-layers 0:0,1:99 names the pair 1:99, but"),
])  # fmt: skip
def test_a_teacher_that_does_not_fit_is_told_of_before_the_heads_are_chosen(toy, options, widths, sentence):
    teacher, unit_map = toy.make(5)
    for name, width in widths.items():
        setattr(teacher, name, torch.nn.Linear(getattr(teacher, name).in_features, width))
    given = SimpleNamespace(num_of_heads=4, joint_pruning=True, count_schedule="0:0.5", teacher_path="it", **options)
    pruners = [build_pruner(methods(None)[name], given) for name in ("subset", "logits")]
    session = PruningSession(toy.make(0)[0], unit_map, pruners, total_steps=20)
    session.load_teacher = lambda path, needs: (teacher.eval(), unit_map)
    session.attach()
    session.before_update(0)
    task = toy.loss(session.model, toy.batch(0))
    with pytest.raises(HeadPruningError, match=sentence):
        session.loss(task)


def first_gradients(toy, name: str, distil: bool, **options) -> tuple[torch.Tensor, dict, float]:
    """Of one update: the gates' gradients, the parameters', and the objective."""
    model, unit_map = toy.make(0)
    teacher = toy.make(5)[0]
    method = methods()[name]
    given = SimpleNamespace(**{**method.example, "teacher_path": "teacher", **options})
    pruners = [build_pruner(method, given)] + ([build_pruner(methods(None)["logits"], given)] if distil else [])
    session = PruningSession(model, unit_map, pruners, total_steps=20)
    session.load_teacher = lambda path, needs: (teacher.eval(), unit_map)
    session.attach()
    torch.manual_seed(0)
    session.before_update(0)
    objective = 1000.0 * session.loss(toy.loss(session.model, toy.batch(0)))
    objective.backward()
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return session.gates.gradients.clone(), found, float(objective.detach())


@pytest.mark.parametrize("name", ["dsp", "ste", "voita"])
def test_what_a_teacher_says_reaches_the_weights_and_not_gates_that_learn_to_the_end(toy, name):
    more = {"joint_pruning": True}
    alone, taught, mixed = (
        first_gradients(toy, name, distil, **more, **options)
        for distil, options in ((False, {}), (True, {}), (True, {"distill_while_choosing": True}))
    )
    torch.testing.assert_close(taught[0], alone[0], rtol=1e-4, atol=1e-4 * float(alone[0].abs().max()))
    assert not torch.allclose(mixed[0], alone[0], rtol=1e-2)
    assert taught[1].keys() == mixed[1].keys() and taught[2] == mixed[2] != alone[2]
    for parameter, gradient in taught[1].items():
        torch.testing.assert_close(gradient, mixed[1][parameter], rtol=0, atol=0)
    assert any(not torch.allclose(gradient, alone[1][parameter]) for parameter, gradient in taught[1].items())


def test_gates_that_would_have_nothing_to_learn_from_are_refused(toy):
    with pytest.raises(HeadPruningError, match="--distill-task 0 the gates of ste have nothing .* --distill-while-ch"):
        first_gradients(toy, "ste", True, distill_task=0.0)
    first_gradients(toy, "ste", True, distill_task=0.0, distill_while_choosing=True)
    first_gradients(toy, "subset", True, distill_task=0.0)  # has chosen by then


@pytest.mark.parametrize("text", ["0", "a:b", "0.5:0.2", "-1:3", "0:0", "0:inf", "5:5", "0:1:2"])
def test_schedules_that_cannot_be_are_refused(toy, text):
    with pytest.raises(HeadPruningError, match="--count-schedule is"):
        opened(toy, "ste", count_schedule=text)


@pytest.mark.parametrize("name", ["subset", "head_sensitivity", "ste", "dsp"])
def test_a_fall_that_training_is_too_short_for_is_refused(toy, name):
    """Before the first update, where hosts ask for the numbers of the log: fairseq saves what breaks off in one."""
    session = opened(toy, name, count_schedule="0:21")
    with pytest.raises(HeadPruningError, match="within training"):
        session.settle()


def test_noise_that_anneals_leaves_the_last_draws_on_the_heads_that_stay(toy):
    schedule = {"initial_temperature": 1.0, "final_temperature": 1e-3, "cooldown_steps": 5.0}
    overlap = {}
    for anneal in (False, True):
        session = opened(toy, "dsp", anneal_noise=anneal, noise_after_cooldown=True, **schedule)
        gates = [update(toy, session, step) for step in range(12)]
        kept = session.head_mask().keep
        overlap[anneal] = np.mean([each[kept].sum() for each in gates[6:]])
    assert overlap[True] > 3.9 > overlap[False]


def test_the_second_head_of_a_site_counts_half(toy):
    scores = np.array([9.0, 8, 7, 1, 5, 2, 6, 4, 3, 0, 0, 0])
    kept = {}
    for discount in (0.0, 1.0):
        pruner = opened(toy, "head_sensitivity", site_discount=discount).pruners[0]
        pruner.scores = scores
        kept[discount] = np.flatnonzero(pruner.keep()).tolist()
    assert kept == {0.0: [0, 1, 2, 6], 1.0: [0, 1, 4, 6]}


# -- from nothing --------------------------------------------------------------------------------------------------

SPREAD = {
    "subset": {"count_schedule": "0:0.1", "min_heads_per_kind": 1},
    "head_sensitivity": {"count_schedule": "0:0.1", "min_heads_per_kind": 1, "site_discount": 2.0},
}
GOES_ON = {
    "subset": {"count_schedule": "0:0.4", "min_heads_per_kind": 0},
    "head_sensitivity": {"count_schedule": "0:0.2", "min_heads_per_kind": 0, "site_discount": 1.0},
}
both = pytest.mark.parametrize("name", SPREAD)


def ran(toy, name: str, trained: bool, updates: int = 12, **options) -> tuple[PruningSession, list]:
    session = opened(toy, name, **{"count_schedule": None, **options})
    session.starts_trained = trained
    session.settle()
    return session, [seeded(toy, session, step) for step in range(updates)]


def seeded(toy, session: PruningSession, step: int) -> list:
    """The gates of an update whose dropout follows from its number."""
    torch.manual_seed(step)
    return update(toy, session, step).tolist()


@both
@pytest.mark.parametrize("options", [{}, {"num_of_heads": 2}])
def test_from_nothing_heads_are_chosen_early_and_spread(toy, name, options):
    """What the options would say; where K is less than there are kinds, without their minimum."""
    session, gates = ran(toy, name, False, **options)
    enough = session.pruners[0].config.num_of_heads >= len(session.unit_map.kinds())
    spread = SPREAD[name] if enough else {**SPREAD[name], "min_heads_per_kind": 0}
    asked = ran(toy, name, True, **options, **spread)[1]
    assert np.sum(gates, axis=1).tolist() == np.sum(asked, axis=1).tolist()
    assert gates == asked or not enough  # more open heads than kinds have it, on the way there
    assert gates != ran(toy, name, True, **options)[1]
    assert session.pruners[0].options().items() >= spread.items()
    trained = ran(toy, name, True, **options)[0].pruners[0].options()
    assert trained.items() >= GOES_ON[name].items()


@pytest.mark.parametrize(
    "name, given",
    [
        ("subset", {"count_schedule": "0:0.5"}),
        ("subset", {"min_heads_per_kind": 0}),
        ("head_sensitivity", {"count_schedule": "0:0.5"}),
        ("head_sensitivity", {"site_discount": 0.0}),
        ("head_sensitivity", {"min_heads_per_kind": 0}),
    ],
)
def test_options_that_were_given_hold_from_nothing_too(toy, name, given):
    assert ran(toy, name, False, **given)[0].pruners[0].options().items() >= {**SPREAD[name], **given}.items()


@both
def test_the_log_says_what_training_from_nothing_prunes_with(toy, caplog, name):
    with caplog.at_level("INFO", logger="head_pruning"):
        ran(toy, name, True, 1)
        assert not caplog.records
        ran(toy, name, False, 1, min_heads_per_kind=0)
    (said,) = (record.getMessage() for record in caplog.records)
    more = " --site-discount 2.0" if name == "head_sensitivity" else ""
    assert f"{name} prunes with --count-schedule 0:0.1 --min-heads-per-kind 0{more}, by default or as given" in said


@pytest.mark.parametrize("name", ["ste", "dsp"])
def test_methods_without_a_schedule_of_their_own_begin_with_k_heads_from_nothing_too(toy, name):
    session, gates = ran(toy, name, False, 3)
    assert all(sum(each) == pytest.approx(4, abs=1e-5) for each in gates)
    assert gates == ran(toy, name, True, 3)[1] and not any("scratch" in key for key in session.state_dict())


@both
@pytest.mark.parametrize("stop", [1, 5])
def test_a_run_from_nothing_that_was_stopped_goes_on_as_one(toy, name, stop):
    """Its host says then that a checkpoint was loaded."""
    whole, gates = ran(toy, name, False)
    first = ran(toy, name, False, stop)[0]
    second = opened(toy, name, count_schedule=None)
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    second.settle()
    assert [seeded(toy, second, step) for step in range(stop, 12)] == gates[stop:]
    np.testing.assert_array_equal(second.head_mask().keep, whole.head_mask().keep)


@both
def test_a_checkpoint_of_an_earlier_version_goes_on_as_it_began(toy, name):
    session = ran(toy, name, True, 2)[0]
    state = {key: value for key, value in session.state_dict().items() if not key.endswith("scratch")}
    second = opened(toy, name, count_schedule=None)
    second.load_state_dict(state)
    second.starts_trained = False
    assert second.pruners[0].options().items() >= GOES_ON[name].items()
