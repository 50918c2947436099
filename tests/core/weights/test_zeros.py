"""Zeroing the weights of removed heads in a model that belongs to no framework."""

import copy

import pytest
import torch
from torch import nn

from head_pruning import HeadMask, HeadPruningError, UnitMap
from head_pruning.gates.engine.bank import GateBank
from head_pruning.hosts import HostModel, compressed_format
from head_pruning.surgery.zeros import cannot_zero, removed_counts, removed_slices, zero_heads, zeroed_heads

INPUTS = torch.linspace(-1, 1, 120).reshape(2, 5, 12), torch.linspace(1, -2, 96).reshape(2, 4, 12)


@pytest.fixture
def pruned(toy) -> tuple[nn.Module, HeadMask]:
    """A model of four sites of three heads, and a mask that keeps 1, 0, 3 and 2 of them."""
    model, units = toy.make(0)
    return model.eval(), HeadMask(units, [False, True, False, *[False] * 3, *[True] * 3, True, False, True])


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_zeroed_model_gives_what_the_gated_one_gives(pruned):
    model, mask = pruned
    bank = GateBank(model, mask.unit_map)
    bank.set_fixed(mask.keep)
    bank.attach()
    expected = model(*INPUTS)
    bank.detach()
    assert (model(*INPUTS) - expected).abs().max() > 1e-3
    zero_heads(model, mask)
    torch.testing.assert_close(model(*INPUTS), expected, rtol=0, atol=1e-6)
    zeros = sum(int((tensor == 0).sum()) for tensor in model.state_dict().values())
    assert zeros >= 6 * (4 * 12 * 4 + 3 * 4)  # six heads of four features: four weights, three biases


def test_it_lasts_for_a_block_also_where_that_fails_and_where_sites_share_a_tensor(pruned):
    model, mask = pruned
    first, second = (model.get_submodule(site.out_proj) for site in mask.unit_map.attention[:2])
    second.weight = first.weight
    before, done = weights(model), copy.deepcopy(model)
    zero_heads(done, mask)
    with pytest.raises(ZeroDivisionError), zeroed_heads(model, mask):
        torch.testing.assert_close(weights(model), weights(done), rtol=0, atol=0)
        raise ZeroDivisionError
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)


def shared(model: nn.Module, units: UnitMap, names: tuple[str, ...]) -> None:
    """Give the second encoder layer these tensors of the first."""
    first, second = (model.get_submodule(site.name) for site in units.attention[:2])
    for name in names:
        module, _, leaf = name.rpartition(".")
        setattr(second.get_submodule(module), leaf, getattr(first.get_submodule(module), leaf))


def gated(model: nn.Module, mask: HeadMask) -> torch.Tensor:
    bank = GateBank(model, mask.unit_map)
    bank.set_fixed(mask.keep)
    bank.attach()
    found = model(*INPUTS)
    bank.detach()
    return found


@pytest.mark.parametrize("names, says_no", [
    (("q.weight", "q.bias", "k.weight", "k.bias", "v.weight", "v.bias"), False),  # their columns are their own
    (("q.weight", "v.weight", "out.weight"), True),
])  # fmt: skip
def test_sites_that_share_weights_lose_only_what_both_give_up(pruned, names, says_no):
    model, mask = pruned
    units = mask.unit_map
    shared(model, units, names)
    apart = HeadMask(units, [False, False, True, True, False, *[True] * 7])
    alike = HeadMask(units, [False, True, True, False, True, True, *[True] * 6])
    assert not cannot_zero(model, alike)
    assert bool(cannot_zero(model, apart)) == says_no
    for mask in (alike, apart):
        found = list(removed_slices(model, mask))
        assert len({(id(tensor), dim) for tensor, dim, _ in found}) == len(found)  # each place once
        expected = gated(model, mask)
        with zeroed_heads(model, mask):
            if mask is alike or not says_no:
                torch.testing.assert_close(model(*INPUTS), expected, rtol=0, atol=1e-6)
            weight = model.encoder[0].q.weight
            gone = slice(0, 4) if mask is alike else slice(4, 8)
            assert int((weight == 0).sum()) == 48 and not weight[gone].any()
            removed = removed_counts(model, mask)["encoder.0.q.weight"]
            assert removed == 48


def test_an_export_of_zeros_that_would_give_something_else_is_refused(pruned, tmp_path):
    model, mask = pruned
    shared(model, mask.unit_map, ("out.weight",))
    loaded = HostModel(model, mask.unit_map, mask, lambda: None)
    with pytest.raises(HeadPruningError, match=r"encoder.1 and encoder.0 share .*; cut the heads out \(--to compact"):
        compressed_format(lambda *_: loaded)["compressed"](tmp_path, tmp_path / "small")
    assert not any(tmp_path.iterdir())


def test_a_norm_over_the_heads_sees_all_of_them(pruned):
    model, mask = pruned
    site = mask.unit_map.attention[0]
    found = len(list(removed_slices(model, mask)))
    model.get_submodule(site.name).q_norm = nn.LayerNorm(12)
    left = [tensor for tensor, _, _ in removed_slices(model, mask)]
    assert len(left) == found - 6 and any(tensor is model.get_submodule(site.out_proj).weight for tensor in left)


def test_a_mask_of_another_model_is_refused_before_anything_is_zeroed(pruned):
    model, mask = pruned
    before = weights(model)
    sites = [dict(site) for site in mask.unit_map.to_dict()["attention"]]
    sites[-1]["head_dim"] = 5
    other = HeadMask(UnitMap.from_dict({**mask.unit_map.to_dict(), "attention": sites}), mask.keep)
    for zero in (zero_heads, lambda *given: zeroed_heads(*given).__enter__()):
        with pytest.raises(HeadPruningError, match="use a mask made for this model"):
            zero(model, other)
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)
