"""Many sizes from one run: the stages of --save-at, nested masks, resume."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from head_pruning import HeadPruningError, PruningSession, build_pruner
from head_pruning.gates.engine.stages import plan_stages, read_counts
from head_pruning.registry import methods
from tests.core.gates.test_subset import learn
from tests.few import few

LEARN = {"dsp": {"cooldown_steps": 0.9, "annealing": True, "initial_temperature": 10.0, "pruning_lr": 0.5}}
NAMES = ["head_sensitivity", "subset", "ste", "dsp"]


def opened(toy, name, total_steps=24, **options):
    model, unit_map = toy.make(0)
    given = {"num_of_heads": 2, "joint_pruning": True, "save_at": "12,6,4", **options}
    pruner = build_pruner(methods("heads")[name], SimpleNamespace(**given))
    return PruningSession(model, unit_map, [pruner], total_steps=total_steps).attach()


def update(toy, session, step):
    """One update without an optimizer; the gates that it ran with."""
    torch.manual_seed(step)  # of dropout
    session.enter_phase(step)
    session.before_update(step)
    gates = session.gates.training_values.clone().numpy()
    toy.loss(session.model, toy.batch(step)).backward()
    session.after_backward(1.0, 24.0, 1)
    session.before_step(None)
    session.after_step()
    session.model.zero_grad()
    return gates


@pytest.mark.parametrize("name", NAMES)
def test_each_count_is_trained_on_with_its_own_heads_and_the_masks_are_nested(toy, name):
    session, gates, sizes = opened(toy, name, count_schedule="0:0.5"), [], {}
    for step in range(24):
        if (size := session.size_before(step)) is not None:
            sizes[size] = session.head_mask().keep
        gates.append(update(toy, session, step))
        assert session.at_target() == (step >= 20)
    sizes["end"] = session.harden().keep
    assert [(size, mask.sum()) for size, mask in sizes.items()] == [
        ("heads12", 12),
        ("heads6", 6),
        ("heads4", 4),
        ("end", 2),
    ]
    masks = list(sizes.values())
    assert all((small <= large).all() for large, small in zip(masks, masks[1:]))
    for last, mask in zip((5, 11, 17, 23), masks):  # what is saved is what was trained
        np.testing.assert_array_equal(gates[last], mask)
        np.testing.assert_array_equal(gates[last - 1], mask)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cut", few([6, 9, 12, 13, 20], 9, 13))
def test_a_run_that_is_resumed_ends_bit_equal(toy, name, cut):
    whole, first, resumed = (opened(toy, name, finetune_updates=3) for _ in range(3))
    for step in range(24):
        update(toy, whole, step)
        if step < cut:
            update(toy, first, step)
    resumed.load_state_dict(first.state_dict())
    assert resumed.size_before(cut) == first.size_before(cut)
    np.testing.assert_array_equal(resumed.head_mask().keep, first.head_mask().keep)
    for step in range(cut, 24):
        update(toy, resumed, step)
    ours, theirs = resumed.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys()
    for key in ours:
        np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)


def test_the_learning_rate_begins_anew_with_each_count_and_only_with_save_at(toy):
    session = opened(toy, "head_sensitivity", finetune_updates=3)
    assert session.steers_host and session.keeps_optimizer
    assert [session.schedule_span(step) for step in (0, 3, 8, 9, 23)] == [
        (0, 3),
        (3, 10),
        (3, 10),
        (3, 10),
        (17, None),
    ]
    session.before_update(0)
    with pytest.raises(HeadPruningError, match="A new phase of head_sensitivity begins with update 3"):
        session.before_update(3)
    plain = opened(toy, "head_sensitivity", save_at=None)
    assert not plain.steers_host
    assert plain.size_before(24) is None


def test_a_run_that_ends_early_still_keeps_k(toy):
    session = opened(toy, "head_sensitivity")
    for step in range(8):
        update(toy, session, step)
    assert session.head_mask().kept == 6
    assert session.harden().kept == 2


def test_teachers_are_listened_to_between_the_falls(toy):
    session = opened(toy, "head_sensitivity", finetune_updates=3)
    choosing = []
    for step in range(24):
        update(toy, session, step)
        choosing.append(session.pruners[0].choosing)
    assert choosing == [*[False] * 3, *([True] * 4 + [False] * 3) * 3]


@pytest.mark.parametrize("name", NAMES)
def test_heads_are_chosen_by_what_was_learnt(toy, name):
    session = opened(toy, name, 96, num_of_heads=3, save_at="6", count_schedule="0:0.9", **LEARN.get(name, {}))
    kept = {}
    for step in range(96):
        kept[session.size_before(step)] = session.head_mask().keep
        session.enter_phase(step)
        learn(toy, session, step)
    assert kept["heads6"][[2, 5, 7]].all() and kept["heads6"].sum() == 6
    np.testing.assert_array_equal(np.flatnonzero(session.harden().keep), [2, 5, 7])


def test_k_is_among_the_sizes_if_it_is_listed_and_a_hardened_run_has_no_others(toy):
    for save_at, last in (("12,6,2", "heads2"), ("12,6", None)):
        session = opened(toy, "head_sensitivity", save_at=save_at)
        for step in range(24):
            update(toy, session, step)
        session.harden()
        assert session.size_before(None) == last
        assert not any(session.size_before(step) for step in range(25))
        assert session.phase(0) == session.phase(23)  # trained on: no learning-rate schedules within


def test_a_run_that_was_cut_short_and_hardened_can_be_loaded(toy):
    first, second = opened(toy, "head_sensitivity"), opened(toy, "head_sensitivity")
    for step in range(12):
        update(toy, first, step)
    first.harden()
    second.load_state_dict(first.state_dict())
    assert second.head_mask() == first.head_mask() and second.head_mask().kept == 2


def test_a_run_that_begins_once_more_opens_all_heads_again(toy):
    session = opened(toy, "head_sensitivity")
    for step in (*range(10), *range(3)):
        gates = update(toy, session, step)
    assert gates.all() and session.head_mask().kept == 12


@given(
    counts=st.sets(st.integers(1, 144), min_size=1, max_size=6).map(lambda found: sorted(found, reverse=True)),
    train=st.none() | st.integers(1, 20),
    spare=st.integers(0, 300),
)
def test_stages_fill_training_and_the_count_never_rises(counts, train, spare):
    total = len(counts) * ((train or 2) + 4) + spare
    stages = plan_stages(counts, 144, total, fall=lambda length: (0, max(1, length // 2)), train=train)
    ends = [*(stage.begin for stage in stages[1:]), total]
    assert stages[0].begin == 0
    opened_now = [stage.open_in(step) for stage, end in zip(stages, ends) for step in range(stage.begin, end)]
    assert len(opened_now) == total
    assert all(after <= before for before, after in zip([144, *opened_now], opened_now))
    assert [opened_now[end - 1] for end in ends] == counts
    if train is not None:
        assert all(end - stage.full == train for stage, end in zip(stages, ends) if stage.before > stage.count)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"save_at": "6,x"}, "--save-at is '6,x'; give numbers of heads, such as 72,36,18"),
        ({"save_at": "6,1"}, "--save-at lists 1 heads, fewer than the 2 at which"),
        ({"save_at": "13,6"}, "13 heads to keep are more than the 12 heads of the model"),
        ({"save_at": None, "finetune_updates": 3}, "--finetune-updates trains the models of --save-at"),
        ({"finetune_updates": 0}, "--finetune-updates is 0; it must be a number of updates, 1 or more"),
        ({"name": "ste"}, "and ste closes all at once before it knows any; add --count-schedule"),
        ({"name": "dsp"}, "and dsp closes all at once before it knows any; add --count-schedule"),
        ({"finetune_updates": 2, "count_schedule": "0:0.5"}, "both say how long heads are closed; give one"),
    ],
)
def test_what_cannot_be_is_refused_before_training(toy, options, sentence):
    with pytest.raises(HeadPruningError, match=sentence):
        opened(toy, **{"name": "head_sensitivity", **options})


@pytest.mark.parametrize(
    ("total", "options", "sentence"),
    [
        (None, {}, "--save-at needs the length of training, which is not known here"),
        (6, {}, "4 numbers of heads, which take at least 7 updates, and training has 6"),
        (24, {"finetune_updates": 6}, "take at least 27 updates with --finetune-updates 6, and training has 24"),
        (24, {"count_schedule": "0:6"}, "from update 0 to update 6 of a stage of 6; let it end"),
    ],
)
def test_a_training_that_is_too_short_is_refused_before_its_first_update(toy, total, options, sentence):
    session = opened(toy, "head_sensitivity", total_steps=total, **options)
    with pytest.raises(HeadPruningError, match=sentence):
        session.settle()


def test_a_run_is_not_resumed_with_other_counts(toy):
    first = opened(toy, "head_sensitivity")
    update(toy, first, 0)
    with pytest.raises(HeadPruningError, match="goes through 12, 6, 4, 2 heads of 12, this run through 8, 2 of 12"):
        opened(toy, "head_sensitivity", save_at="8").load_state_dict(first.state_dict())
    with pytest.raises(HeadPruningError, match="trained with --save-at, and this run has none; resume"):
        opened(toy, "head_sensitivity", save_at=None).load_state_dict(first.state_dict())


def test_counts_are_read_in_any_order():
    assert read_counts("18,72,36,18", 12) == [72, 36, 18]
    assert read_counts(None, 12) == []
