"""Cutting heads out of a model that belongs to no framework."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

from head_pruning import HeadMask, HeadPruningError, UnitMap
from head_pruning.compact.no_heads import NoHeads
from head_pruning.compact.recipe import apply_recipe
from head_pruning.compact.slices import slices
from head_pruning.gates.engine.bank import GateBank
from head_pruning.masks import full_mask, mask_without
from head_pruning.surgery.plans import SitePlan, columns_of, plain_plan, rows_of
from head_pruning.surgery.remaining import heads_left, recipe_of
from head_pruning.surgery.removal import remove_heads, remove_query_heads, removed_parameters

INPUTS = torch.linspace(-1, 1, 120).reshape(2, 5, 12), torch.linspace(1, -2, 96).reshape(2, 4, 12)


def planner(model: nn.Module, site) -> SitePlan:
    """What plain_plan says, and how the test's attention counts its heads."""
    plan = plain_plan(model, site)
    options = {"inputs": [["x", 0]], "out": "out", "after": [], "returns": None, "attentions": [None, 0]}
    options["drop"] = ["q", "k", "v"]
    return dataclasses.replace(plan, counts=((f"{site.name}.heads", 1),), empty=(site.name, options))


@pytest.fixture
def model(toy) -> nn.Module:
    return toy.make(0)[0].eval()


@pytest.fixture
def units(toy) -> UnitMap:
    return dataclasses.replace(toy.make(0)[1], planner=planner)


def masked(model: nn.Module, mask: HeadMask) -> torch.Tensor:
    bank = GateBank(model, mask.unit_map)
    bank.set_fixed(mask.keep)
    bank.attach()
    try:
        return model(*INPUTS)
    finally:
        bank.detach()


def some(units: UnitMap) -> HeadMask:
    """Sites keep 1, 0, 3 and 2 heads."""
    return HeadMask(units, [False, True, False, *[False] * 3, *[True] * 3, True, False, True])


def test_uneven_and_emptied_sites_equal_the_mask(model, units):
    mask = some(units)
    expected = masked(model, mask)
    size = sum(parameter.numel() for parameter in model.parameters())
    fewer = removed_parameters(model, units, mask)
    recipe = remove_heads(model, units, mask)
    torch.testing.assert_close(model(*INPUTS), expected, rtol=0, atol=1e-6)
    assert size - fewer == sum(parameter.numel() for parameter in model.parameters())
    assert fewer == 6 * (4 * 12 * 4 + 3 * 4)  # six heads of four features: four weights, three biases
    assert heads_left(model) == mask and recipe_of(model) == recipe == json.loads(json.dumps(recipe))
    empty = model.get_submodule(units.attention[1].name)
    assert isinstance(empty, NoHeads) and empty.q is None and empty.out.weight.shape == (12, 0)
    assert isinstance(empty, type(model.encoder[0])) and type(empty) is NoHeads

    class Another(NoHeads):
        pass

    empty.__class__ = Another  # as a host with a class of its own does
    assert type(empty) is Another
    empty.__class__ = NoHeads
    assert type(copy.deepcopy(empty)) is NoHeads
    assert (empty.out.in_features, empty.out.out_features) == (0, 12)
    untouched = units.attention[2].name
    assert untouched not in recipe["sites"]


class Silent(nn.Module):
    """A host's own attention without heads."""

    def forward(self, x: torch.Tensor, *_) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(x), None


def test_a_host_puts_a_class_of_its_own_in_the_place_of_an_emptied_site(model, units):
    def adapt(cut: nn.Module) -> None:
        cut.get_submodule(units.attention[1].name).__class__ = Silent

    remove_heads(model, dataclasses.replace(units, adapt=adapt), some(units))
    emptied = model.get_submodule(units.attention[1].name)
    assert type(emptied) is Silent and isinstance(copy.deepcopy(emptied), Silent)
    assert not isinstance(emptied, NoHeads)


def test_a_recipe_shapes_a_fresh_model_also_on_the_meta_device(model, units):
    fresh = copy.deepcopy(model)
    recipe = remove_heads(model, units, some(units))
    with torch.device("meta"):
        shaped = apply_recipe(copy.deepcopy(fresh).to("meta"), recipe)
    assert {name: tensor.shape for name, tensor in shaped.state_dict().items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    apply_recipe(fresh, recipe).load_state_dict(model.state_dict())
    assert torch.equal(fresh(*INPUTS), model(*INPUTS))


def test_tied_weights_stay_tied(model, units):
    first, second = (model.get_submodule(site.name) for site in units.attention[:2])
    for name in ("q", "k", "v", "out"):
        setattr(second, name, getattr(first, name))
    second.q = nn.Linear(12, 12)
    second.q.weight = first.q.weight
    mask = mask_without(units, {site.name: [1] for site in units.attention[:1]})
    with pytest.raises(HeadPruningError, match="the unit map|cannot"):
        remove_heads(model, UnitMap(units.attention, planner=refusing), mask)
    weights = first.q.weight
    remove_heads(model, units, mask)
    assert first.q.weight.shape == (8, 12) and second.q.weight is weights


def refusing(model: nn.Module, site) -> SitePlan:
    return SitePlan((), refuse="it is made of stone")


def test_refusals_leave_the_model_alone(model, units):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mask = some(units)
    last_head = dataclasses.replace(units, planner=plain_plan)
    for other, message in (
        (dataclasses.replace(units, planner=refusing), "cannot be cut out exactly: it is made of stone; export the"),
        (last_head, "cannot lose all of its heads; keep one of them"),
    ):
        with pytest.raises(HeadPruningError, match=message):
            remove_heads(model, other, mask)
    with pytest.raises(HeadPruningError, match="belongs to another architecture"):
        remove_heads(model, units, full_mask(UnitMap(units.attention[1:])))
    bank = GateBank(model, units)
    bank.attach()
    with pytest.raises(HeadPruningError, match="are gated; detach the session"):
        remove_heads(model, units, mask)
    bank.detach()
    with pytest.raises(HeadPruningError, match="share no keys"):
        remove_query_heads(model, units, {units.attention[0].name: [0]})
    assert recipe_of(model) is None
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_recipe_of_another_model_is_an_error(model, units):
    recipe = remove_heads(copy.deepcopy(model), units, some(units))
    with pytest.raises(ValueError, match="is of version 99, not 1 or 2"):
        apply_recipe(model, {**recipe, "version": 99})
    narrow = copy.deepcopy(model)
    remove_heads(narrow, units, some(units))
    with pytest.raises(ValueError, match="slices where the recipe expects"):
        apply_recipe(narrow, recipe)


@pytest.mark.parametrize(
    "blocks, held, kept, expected",
    [
        ([(1, 2)], [0, 1, 2], [0, 2], [0, 1, 4, 5]),
        ([(1, 1), (0, 2), (1, 1)], [0, 1], [1], [1, 2, 3, 5]),
        ([(1, 2)], [4, 7, 9], [7], [2, 3]),
        ([(1, 1, 0, 2), (1, 1, 2, 4)] * 2, [0, 1, 2, 3], [1, 2, 3], [1, 2, 3, 5, 6, 7]),
        ([(1, 1)], [0, 1], [], []),
    ],
)
def test_slices(blocks, held, kept, expected):
    assert slices(blocks, held, kept) == expected


def test_slices_of_query_heads():
    """Groups 0 and 1 with the query heads 0, 1 and 2, 3."""
    blocks = [(2, 1), (1, 1)]
    assert slices(blocks, [0, 1], [0, 1], ([0, 1, 2, 3], [1, 2])) == [1, 2, 4, 5]
    assert slices(blocks, [0, 1], [0, 1], ([0, 1, 2, 3], [0, 1, 2]), repeat=2) == [0, 1, 2, 4, 4, 5]


def test_projections_of_other_makers():
    """Conv1D holds its weight the other way round; buffers of a quantized layer's shape are cut along."""
    model = nn.Module()
    model.conv = nn.Module()
    model.conv.nf, model.conv.weight, model.conv.bias = (
        6,
        nn.Parameter(torch.zeros(4, 6)),
        nn.Parameter(torch.zeros(6)),
    )
    model.linear = nn.Linear(4, 6)
    model.linear.register_buffer("scale", torch.ones(6))
    model.linear.register_buffer("integers", torch.ones(6, 4))
    blocks = ((1, 2),)
    assert rows_of(model, "conv", blocks) == [("conv.weight", 1, blocks), ("conv.bias", 0, blocks)]
    assert columns_of(model, "conv", blocks) == [("conv.weight", 0, blocks)]
    assert [name for name, _, _ in rows_of(model, "linear", blocks)] == [
        "linear.weight",
        "linear.bias",
        "linear.scale",
        "linear.integers",
    ]
    assert columns_of(model, "linear", blocks) == [("linear.weight", 1, blocks), ("linear.integers", 1, blocks)]


def test_a_site_that_is_cut_again_knows_the_heads_of_the_original(model, units):
    dense = copy.deepcopy(model)
    remove_heads(model, units, mask_without(units, {units.attention[0].name: [0]}))
    sites = (dataclasses.replace(units.attention[0], heads=2), *units.attention[1:])
    now = dataclasses.replace(units, attention=sites)
    recipe = remove_heads(model, now, mask_without(now, {units.attention[0].name: [0]}))
    assert recipe["sites"][units.attention[0].name]["kept"] == [2]
    expected = masked(dense, mask_without(units, {units.attention[0].name: [0, 1]}))
    torch.testing.assert_close(model(*INPUTS), expected, rtol=0, atol=1e-6)
    assert np.array_equal(heads_left(model).keep[:3], [False, False, True])
