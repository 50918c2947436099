"""What no other test noticed when a line of the product said something else: defaults, bounds, rare paths."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from head_pruning import (
    AttentionSite,
    FeedForwardSite,
    HeadMask,
    HeadPruningError,
    PruningSession,
    UnitMap,
    build_pruner,
)
from head_pruning.gates import GateBank
from head_pruning.gates.engine.top_k import Rounds, SoftTopK
from head_pruning.gates.gpp import selected, squared_cosine
from head_pruning.gates.voita import VoitaPruner
from head_pruning.importance import ImportanceAccumulator
from head_pruning.registry import methods
from head_pruning.surgery.plans import plan_of
from head_pruning.surgery.remaining import mask_of_original, recipe_of, sites_left
from head_pruning.surgery.removal import remove_heads, remove_query_heads, removed_parameters
from head_pruning.surgery.zeros import zero_heads
from head_pruning.weights import weight_targets
from head_pruning.weights.engine import portions
from head_pruning.weights.engine.allocation import mapped, parse_map
from head_pruning.weights.engine.masks import BoolMasks, SignMasks
from head_pruning.weights.engine.selection import kth_smallest
from head_pruning.weights.engine.targets import _is_cut_out
from tests.core import test_contract
from tests.core.distillation import test_spd
from tests.core.gates import test_gpp
from tests.core.surgery import test_surgery
from tests.core.surgery.test_surgery import units  # noqa: F401
from tests.core.test_methods import mask_file, train  # noqa: F401
from tests.core.test_session import build, update
from tests.core.weights import test_weights

# -- methods and sessions --------------------------------------------------------------------------------------------


def test_methods_say_what_hosts_must_do(toy):
    assert [name for name, method in methods("heads").items() if not method.pruner.needs_training] == ["given"]
    session = build(toy)[1]
    assert session.step == 0 and session.skips_parameters is False and session.keeps_optimizer is False
    assert "lr_factor" not in session.metrics()
    student, teacher = test_contract.make(0), test_spd.other()
    distilled = test_spd.open_session(
        student, test_spd.build("spd", **methods(None)["spd"].example), load_teacher=teacher
    )
    assert distilled.skips_parameters is True and distilled.keeps_optimizer is False


def test_l0_gates_of_bert_are_trained_alone_unless_they_are_asked_to_join():
    assert VoitaPruner.bert_options({"l0_penalty": 2.0})["l0_pipelined"] is True
    assert VoitaPruner.bert_options({"joint_pruning": True})["l0_pipelined"] is False
    with pytest.raises(HeadPruningError, match="contradict each other"):
        VoitaPruner.bert_options({"joint_pruning": True, "l0_pipelined": True})


def test_a_schedule_that_is_not_over_is_told_once(toy, caplog):
    _, session, _ = build(toy, session={"total_steps": 8})
    session.before_update(0)
    for _ in range(2):
        session.tell_unfinished()
    assert len(caplog.records) == 1


@pytest.mark.parametrize("error", [IndexError("of 3"), TypeError("no float"), ValueError("2 values"), KeyError("z")])
def test_what_a_pruner_trips_over_is_told_as_a_damaged_state(toy, monkeypatch, error):
    _, session, pruner = build(toy)
    state = session.state_dict()

    def load(state):
        raise error

    monkeypatch.setattr(pruner, "load_state_dict", load)
    with pytest.raises(HeadPruningError, match="checkpoint's state of dsp"):
        session.load_state_dict(state)


@pytest.mark.parametrize("name", sorted(methods(None)))
def test_a_state_of_before_the_first_update_goes_on_as_a_new_run(toy, mask_file, name):  # noqa: F811
    state, session, pruner = train(toy, name, mask_file, range(0))
    assert state["session"]["step"].tolist() == [0]
    session.load_state_dict(state["session"])
    assert all(np.array_equal(value, state["session"][key]) for key, value in session.state_dict().items())
    assert pruner.kind != "weights" or name == "lock" or math.isnan(pruner.selected)


@pytest.mark.parametrize("name, key, place", [("gpp", "place", 1), ("magnitude", "progress", 1)])
@pytest.mark.parametrize("value", [1.5, -1.5])
def test_a_ratio_in_a_state_is_one(toy, mask_file, name, key, place, value):  # noqa: F811
    state, session, _ = train(toy, name, mask_file, range(2))
    state["session"][f"{name}.{key}"][place] = value
    with pytest.raises(HeadPruningError):
        session.load_state_dict(state["session"])


# -- gates -----------------------------------------------------------------------------------------------------------


def test_a_temperature_that_stays_is_saved_and_loaded(toy):
    model, session, _ = build(toy, annealing=False, final_temperature=0.5)
    update(toy, model, session, 0)
    other = build(toy, annealing=False, final_temperature=0.5)[1]
    other.load_state_dict(session.state_dict())
    assert other.metrics()["temperature"] == 0.5


def test_the_log_of_head_sensitivity_counts_the_heads_that_are_open(toy):
    _, session, pruner = build(toy, "head_sensitivity", session={"total_steps": 10})
    session.before_update(0)
    assert session.metrics() == {"heads_expected": float(pruner.opened.sum()), "heads_kept": 5.0}


@pytest.mark.parametrize("hardened", [False, True])
def test_head_sensitivity_goes_on_with_the_gates_that_it_had(toy, hardened):
    sessions = [build(toy, "head_sensitivity", session={"total_steps": 10})[1] for _ in range(2)]
    first, second = sessions
    first.pruners[0].scores = np.arange(12.0)[::-1].copy()
    if hardened:
        first.harden()
    second.load_state_dict(first.state_dict())
    wanted = second.pruners[0].keep().astype(np.float32)
    assert wanted.sum() == 5 and np.array_equal(second.gates.evaluation_values.numpy(), wanted)
    assert np.array_equal(second.gates.training_values.numpy(), wanted) == hardened


def test_a_minimum_holds_where_softmaxes_are_exact():
    """Head 0 is first by far, but the only round may choose among the others."""
    mask = SoftTopK(np.array([9.0, 1.0, 0.0]), Rounds((np.array([1, 2]),)), 1e-6).mask
    assert mask.tolist() == [0.0, 1.0, 0.0]


def test_importance_is_of_absolute_values_unless_signs_are_asked_for(toy):
    model, unit_map = toy.make()
    gates = GateBank(model.eval(), unit_map)
    gates.attach()
    found = []
    for options in ({}, {"signed": False}, {"signed": True}):
        accumulator = ImportanceAccumulator(gates, **options)
        with accumulator.probing(HeadMask(unit_map, np.ones(12, dtype=bool))):
            toy.loss(model, toy.batch(0)).backward()
            accumulator.add()
        found.append(accumulator.scores())
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])


def test_a_site_that_never_ran_is_named_as_a_user_writes_it(toy):
    model, unit_map = toy.make()
    session = PruningSession(model, unit_map, [build(toy)[2].__class__(build(toy)[2].config)]).attach()
    session.before_update(0)
    source = toy.batch(0)[0]
    model.encoder[0](source, source).sum().backward()
    with pytest.raises(HeadPruningError, match='AttentionSite\\("cross", "decoder_cross", "decoder", heads=3'):
        session.after_backward()


# -- GPP -------------------------------------------------------------------------------------------------------------


def test_gpp_as_published_takes_what_is_above_the_next():
    assert selected(np.array([3.0, -5, 1, 2]), 0.5, published=True).tolist() == [True, True, False, False]
    assert not selected(np.array([5.0, 5, 5, 1]), 0.5, published=True).any()


def test_gpp_sets_its_indicators_once_per_percent():
    session = test_gpp.opened(test_gpp.model(), pruner := test_gpp.build("gpp"), total_steps=400)
    assert pruner.period == 4 and not pruner.gradient().any()
    found = []
    for step in range(9):
        session.before_update(step)
        found.append(pruner.sparsity)
    wanted = [squared_cosine(step, 200, 0.5) for step in (0, 4, 8)]
    assert found == [wanted[step // 4] for step in range(9)]


def test_a_phase_of_gpp_begins_where_it_began():
    pruner = test_gpp.build("gpp", prepruning_finetune_epochs=1, prune_epochs=2)
    session = test_gpp.opened(test_gpp.model(), pruner)
    assert [session.schedule_span(step)[0] for step in range(12)] == [0] * 2 + [2] * 4 + [6] * 6


# -- surgery ---------------------------------------------------------------------------------------------------------


class Transposed(nn.Module):
    """A projection that keeps its weight as [in, out], as GPT-2's do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.nf, self.weight = width, nn.Parameter(torch.ones(width, width))


def test_heads_of_transposed_projections_are_rows_of_the_output():
    site = AttentionSite("a", "self", "a", heads=2, head_dim=3, out_proj="a.out", projections=("a.q", "a.k", "a.v"))
    module = nn.ModuleDict({name: nn.Linear(6, 6) for name in "kv"} | {name: Transposed(6) for name in ("q", "out")})
    model = nn.ModuleDict({"a": module})
    zero_heads(model, HeadMask(UnitMap((site,)), [False, True]))
    assert module["out"].weight.sum(1).tolist() == [0.0] * 3 + [6.0] * 3
    assert module["q"].weight.all()  # it is not known how they lie
    for name in "kv":
        assert not module[name].weight[:3].any() and module[name].weight[3:].all()


def test_units_are_rows_of_what_makes_them_whatever_the_width_of_the_model():
    block, site = FeedForwardSite("b", "b", 12, "b.up", "b.down"), AttentionSite("a", "self", "b", 2, 4, "a.out")
    model = nn.ModuleDict({"b": nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8)})})
    plan = plan_of(model, UnitMap((site,), (block,)), block)
    found = {name: (dim, blocks) for name, dim, blocks in plan.tensors}
    assert not plan.refuse and found["b.up.weight"] == (0, ((1, 1),)) and found["b.down.weight"] == (1, ((1, 1),))


def test_masks_of_a_cut_model_are_told_in_heads_of_the_whole_one(toy, units):  # noqa: F811
    model, first = toy.make(0)[0], test_surgery.some(units)
    remove_heads(model, units, first)
    recipe = recipe_of(model)
    whole = HeadMask(units, np.arange(12) % 2 == 0)
    assert np.array_equal(mask_of_original(recipe, whole).keep, whole.keep)
    # Query heads 0 and 1 of head 0 and query head 2 of head 1 are left, each with keys and values of its own.
    recipe["sites"]["cross"] = {"heads": 3, "kept": [0, 1], "per_group": 2, "queries": [0, 1, 2], "expanded": True}
    left = sites_left(recipe)
    assert [site.heads for site in left.attention] == [1, 0, 3, 2]
    mask = mask_of_original(recipe, HeadMask(left, [True, False, False, True, True, True]))
    assert mask.kept_heads() == {"encoder.0": [1], "encoder.1": [], "cross": [1], "decoder": [0, 2]}


def test_a_site_that_keeps_its_query_heads_does_not_stop_the_next(toy):
    def grouped(model, site):
        """Each head is a key/value head with two query heads."""
        plan = test_surgery.planner(model, site)
        tensors = [(name, dim, ((2, 2),) if name.split(".")[-2] in ("q", "out") else blocks)
                   for name, dim, blocks in plan.tensors]  # fmt: skip
        return dataclasses.replace(plan, tensors=tuple(tensors), per_group=2)

    model, unit_map = toy.make(0)
    unit_map = dataclasses.replace(unit_map, planner=grouped)
    sites = remove_query_heads(model, unit_map, {"encoder.0": [], "encoder.1": [0, 2, 4]})["sites"]
    assert [sites[name].get("queries") for name in ("encoder.0", "encoder.1")] == [None, [1, 3, 5]]


def test_sites_that_were_emptied_before_do_not_count_again(toy, units):  # noqa: F811
    model = toy.make(0)[0]
    remove_heads(model, units, test_surgery.some(units))
    left = dataclasses.replace(sites_left(recipe_of(model)), planner=test_surgery.planner)
    mask = HeadMask(left, [True, True, True, True, True, False])  # the second of the decoder's two heads
    before = sum(parameter.numel() for parameter in model.parameters())
    told = removed_parameters(model, left, mask)
    remove_heads(model, left, mask)
    assert told == before - sum(parameter.numel() for parameter in model.parameters()) == 4 * 4 * 12 + 3 * 4


# -- weights ---------------------------------------------------------------------------------------------------------


def test_a_weight_that_had_a_gradient_once_stays_among_the_pruned(toy):
    model, optimizer, session, pruner = test_weights.start(toy)
    session.before_update(0)
    for targets in ((0,), (1,)):
        for place, target in enumerate(pruner.targets):
            target.parameter.grad = torch.ones_like(target.parameter) if place in targets else None
        pruner._activate()
    assert [target.name for target in pruner.storage.active] == [target.name for target in pruner.targets[:2]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_every_width_of_numbers_is_compressed(tmp_path, dtype):
    from head_pruning.weights import load_compressed, save_compressed

    weight = torch.eye(8, dtype=dtype)
    save_compressed(tmp_path / "c.safetensors", {"weight": weight})
    found = load_compressed(tmp_path / "c.safetensors")["weight"]
    assert found.dtype == dtype and torch.equal(found, weight)


def test_what_is_protected_does_not_hide_what_follows():
    names = {target.name for target in weight_targets(test_contract.make(0), test_contract.MAP)}  # embeddings first
    assert {f"layers.{layer}.{name}.weight" for layer in range(3) for name in ("attention.q", "up", "down")} < names


def test_adapters_do_not_hide_what_follows(toy):
    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.lora = base, nn.Linear(12, 2)

        def get_base_layer(self):
            return self.base

    model, unit_map = toy.make()
    model.encoder[0].q = Adapted(model.encoder[0].q)
    names = {target.name for target in weight_targets(model, unit_map)}
    assert {"encoder.0.q.base.weight", "encoder.0.k.weight", "decoder.out.weight"} < names
    assert not any("lora" in name for name in names)


def test_sensitivity_is_platon_without_uncertainty(toy):
    found = []
    for case in ("sensitivity", "platon, smooth"):
        model, optimizer, session, _ = test_weights.start(toy, case)
        for step in range(10):
            test_weights.update(toy, model, optimizer, session, step)
        found.append(model)
    assert test_weights.same(*(test_weights.bits(model) for model in found))


def test_tracking_begins_early_enough_for_the_slower_average(toy):
    """The average of uncertainty forgets all but a thousandth in 342 windows, that of sensitivity in 43."""
    begins = []
    for beta2 in (0.98, 0.5):
        options = {"initial_warmup": 1000, "warmup_steps": 2, "deltaT": 2, "late_tracking": True, "beta2": beta2}
        _, _, session, pruner = test_weights.start(toy, "platon", total=10_000, **options)
        session.metrics()
        assert pruner.start == 2000
        begins.append(pruner.track_from)
    assert begins == [2 * (1000 - 1 - 342), 2 * (1000 - 1 - 43)]


def test_settled_steps_outlive_another_length_of_training(toy):
    fractions = {"policy_begin_step": 0.25, "policy_end_step": 0.5}
    _, _, first, pruner = test_weights.start(toy, "gradual_magnitude", total=40, **fractions)
    first.metrics()
    _, _, second, resumed = test_weights.start(toy, "gradual_magnitude", total=80, **fractions)
    second.load_state_dict(first.state_dict())
    second.metrics()
    assert [resumed.steps[name] for name in fractions] == [10, 20] and resumed.steps == pruner.steps


def test_a_mask_is_due_where_the_number_of_masks_rises():
    options = {"sparsity": 0.5, "mask_frequency": 2, "num_prune_epochs": 600}
    pruner = test_spd.build("spd_magnitude", **options)
    test_spd.open_session(test_contract.make(0), pruner, total=3000).metrics()
    assert [pruner.due(t) for t in (2, 3, 4, 1000, 1001, 1002)] == [True, False, True, True, False, True]


def test_a_run_that_goes_back_before_its_end_gives_weights_back(toy):
    model, optimizer, session, pruner = test_weights.start(toy, "magnitude")
    for step in range(12):
        test_weights.update(toy, model, optimizer, session, step)
    state = session.state_dict()
    session.harden()
    session.load_state_dict(state)
    assert not pruner.locked and not pruner.nested


def test_radix_selection_orders_negative_scores():
    scores = [torch.tensor([-3.0, 2.0, -1.0, 0.5, -2.0])]
    found = [kth_smallest(lambda: [scores], k, signed=True).value.item() for k in range(1, 6)]
    assert found == [-3.0, -2.0, -1.0, 0.5, 2.0]


@pytest.mark.parametrize("masks", [BoolMasks(), SignMasks("average")])
def test_the_threshold_itself_stays_unless_it_is_inclusive(masks):
    for inclusive, kept in ((False, [False, True, True]), (True, [False, False, True])):
        state = {"mask": [torch.zeros(3, dtype=torch.bool)], "average": [torch.ones(3)]}
        portion = SimpleNamespace(state=state, scratch=lambda number=0: [torch.empty(3)])
        masks.store_above(portion, [torch.tensor([1.0, 2.0, 3.0])], torch.tensor(2.0), inclusive)
        assert masks.keep(portion)[0].tolist() == kept


def test_masks_hide_in_averages_where_there_are_any(toy):
    assert isinstance(test_weights.start(toy, "platon")[3].storage.masks, SignMasks)
    assert isinstance(test_weights.start(toy, "magnitude")[3].storage.masks, BoolMasks)


def test_zeros_that_were_there_stay_between_masks(toy):
    model, optimizer, session, pruner = test_weights.start(toy, "magnitude", start_from_zeros=True)
    with torch.no_grad():
        for target in pruner.targets:
            target.parameter[..., ::2] = 0.0
    for step in range(2):  # before the first mask
        test_weights.update(toy, model, optimizer, session, step)
        assert not pruner.has_mask
        assert not any(target.parameter[..., ::2].any() for target in pruner.targets)
        assert all(target.parameter[..., 1::2].any() for target in pruner.targets)


def test_weights_of_removed_heads_are_gone_whatever_the_portions(toy, monkeypatch):
    """In portions of a few rows as in one; the count of those that stay is that of the masks."""
    found = []
    for size in (None, 60):
        if size is not None:
            monkeypatch.setattr(portions, "CPU_PORTION", size)
        model, unit_map = toy.make()
        both = [
            build_pruner(methods()["random"], SimpleNamespace(num_of_heads=5)),
            test_weights.make_pruner("magnitude"),
        ]
        session = PruningSession(model, unit_map, both, total_steps=24).attach()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(12):
            test_weights.update(toy, model, optimizer, session, step)
        assert both[1].has_mask
        masks, storage = session.weight_masks(), both[1].storage
        for name, parts in session.weights_without(session.head_mask()).items():
            for dim, places in parts if name in masks else ():
                assert not masks[name].index_select(dim, places).any()
        assert int(storage.count_kept()) == sum(int(mask.sum()) for mask in masks.values()) > 0
        session.harden()
        found.append(test_weights.bits(model))
    assert test_weights.same(*found)


def test_the_number_of_heads_alone_settles_the_schedule(toy):
    options = build(toy, annealing=None, initial_temperature=None, cooldown_steps=None)[2].options()
    assert options["cooldown_steps"] == 0.6 and options["initial_temperature"] == 10.0


# -- found later -----------------------------------------------------------------------------------------------------


def test_defaults_of_lengths():
    assert methods("heads")["random"].options["macs_length"].default == 128
    assert methods("weights")["gradual_magnitude"].options["pruning_frequency"].default == 100


def test_a_session_without_a_quantizer_stores_the_model_as_it_is(toy):
    model, session, _ = build(toy)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with session.stored():
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("value, refused", [(-0.1, True), (0.0, False), (1.0, True)])
def test_decay_rates_of_adam_have_bounds(toy, value, refused):
    if not refused:
        build(toy, gate_adam_beta1=value)
        return
    with pytest.raises(HeadPruningError, match="at least 0 and below 1"):
        build(toy, gate_adam_beta1=value)


def test_a_map_of_ratios_tells_that_of_each_tensor():
    assert mapped(["a.weight", "b.weight"], parse_map('{"^a": 0.5}'), 0.9) == {"a.weight": 0.5, "b.weight": 0.9}


def test_the_weight_of_a_layer_without_heads_is_empty():
    empty, single = nn.Linear(4, 0), nn.Linear(1, 1)
    assert _is_cut_out(empty, empty.weight) and _is_cut_out(empty, empty.bias)
    assert not _is_cut_out(single, single.weight)
    assert not _is_cut_out(nn.LayerNorm(0), nn.LayerNorm(0).weight)


def test_uneven_ratios_are_together_the_target(toy):
    model, sites = toy.make()
    options = SimpleNamespace(target_sparsity=0.6, init_strategy="er")
    pruner = build_pruner(methods("weights")["gradual_magnitude"], options)
    session = PruningSession(model, sites, [pruner], total_steps=10).attach()
    assert pruner.final_density() == pytest.approx(0.4, abs=1e-9)
    session.detach()
