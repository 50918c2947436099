"""Patterns and blocks run along the inputs, whatever dimension of a tensor holds them."""

import pytest
import torch
from torch import nn

from head_pruning import AttentionSite, ExpertSite, FeedForwardSite, HeadPruningError, PruningSession, UnitMap
from head_pruning.weights.engine.targets import find_targets, numbered
from tests.core.weights.test_weights import make_pruner


class InOut(nn.Module):
    """As transformers' Conv1D: ``x @ weight + bias``, weight ``[in, out]``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))


class Experts(nn.Module):
    """Three experts of 8 inputs and 12 units, with gates."""

    def __init__(self, transposed: bool, told: bool) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 24) if transposed else torch.randn(3, 24, 8))
        self.gate_up_proj_bias = nn.Parameter(torch.randn(3, 24))
        self.down_proj = nn.Parameter(torch.randn(3, 12, 8) if transposed else torch.randn(3, 8, 12))
        if told:
            self.is_transposed = transposed


def module(name: str) -> nn.Module:
    torch.manual_seed(0)
    return {
        "linear": lambda: nn.Linear(8, 12),
        "conv1d of transformers": lambda: InOut(8, 12),
        "convolution": lambda: nn.Conv2d(8, 12, 3),
        "transposed convolution": lambda: nn.ConvTranspose1d(8, 12, 3),
        "experts": lambda: Experts(False, True),
        "transposed experts": lambda: Experts(True, True),
    }[name]()


NAMES = (
    "linear", "conv1d of transformers", "convolution", "transposed convolution", "experts", "transposed experts",
)  # fmt: skip


def by_outputs(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """``[..., out, in]``, worked out here once more."""
    return {
        "linear": lambda: tensor,
        "conv1d of transformers": lambda: tensor.t(),
        "convolution": lambda: tensor.permute(2, 3, 0, 1),
        "transposed convolution": lambda: tensor.permute(2, 1, 0),
        "experts": lambda: tensor,
        "transposed experts": lambda: tensor.transpose(1, 2),
    }[name]()


def pruned(model: nn.Module, selection: str, method: str = "gradual_magnitude", unit_map=None, **options):
    """What one mask makes of the model."""
    defaults = {"initial_sparsity": 0.0, "threshold_decay": 0.0, "pruning_frequency": 1, "policy_end_step": 1}
    defaults["target_sparsity"] = 0.0 if ":" in selection else 0.5
    if method != "gradual_magnitude":
        defaults = {"warmup_steps": 1, "final_warmup": 2, "deltaT": 1, "final_threshold": 0.5}
    options = {**defaults, "begin_pruning_step": 0, "policy_begin_step": 0, **options}
    pruner = make_pruner(method, weight_selection=selection, **options)
    session = PruningSession(model, unit_map, [pruner], total_steps=4).attach()
    for step in range(4):
        session.before_update(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter, generator=None)
        session.before_step()
        session.after_step()
    session.harden()
    return pruner


@pytest.mark.parametrize("method", ["gradual_magnitude", "platon", "platon, nested"])
@pytest.mark.parametrize("name", NAMES)
def test_two_of_four_inputs_stay(name, method):
    model = module(name)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    pruner = pruned(model, "2:4", method, weights_include=".")
    assert pruner.targets and not any("bias" in target.name for target in pruner.targets)
    for target in pruner.targets:
        groups = by_outputs(name, target.parameter.detach()).unflatten(-1, (-1, 4))
        mask = by_outputs(name, pruner.weight_masks()[target.name]).unflatten(-1, (-1, 4))
        assert (mask.sum(-1) == 2).all() and not groups[~mask].any(), target.name
        if method == "gradual_magnitude":  # those of the largest magnitude
            old = by_outputs(name, before[target.name]).unflatten(-1, (-1, 4)).abs()
            assert torch.equal(groups != 0, old >= old.sort(-1).values[..., 2:3])
    assert torch.equal(model.state_dict().get("bias", torch.ones(1)), before.get("bias", torch.ones(1)))


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_outputs_by_inputs(name):
    model = module(name)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    for target in pruned(model, "4x2", weights_include=".").targets:
        blocks, old = (
            by_outputs(name, tensor).unflatten(-1, (-1, 2)).unflatten(-3, (-1, 4)).movedim(-2, -3).flatten(-2)
            for tensor in (target.parameter.detach(), before[target.name])
        )
        kept = (blocks != 0).all(-1)
        assert torch.equal(kept, (blocks != 0).any(-1)) and kept.sum() == kept.numel() // 2
        assert old.abs().mean(-1)[kept].min() > old.abs().mean(-1)[~kept].max()


def test_what_does_not_divide_is_refused_by_outputs_and_inputs():
    with pytest.raises(
        HeadPruningError, match=r"weight of shape \[8, 12\] does not divide into 8x2 .outputs by inputs"
    ):
        pruned(module("conv1d of transformers"), "8x2", weights_include="weight")
    pruned(module("conv1d of transformers"), "6x8", weights_include="weight")


def test_a_layout_that_is_not_known_is_refused_where_it_matters():
    model = Experts(True, False)
    with pytest.raises(HeadPruningError, match="It is not known which dimension of gate_up_proj, of shape .3, 8, 24."):
        pruned(model, "2:4", weights_include="proj$")
    pruned(model, "tensor", weights_include="proj$")


def test_the_map_tells_the_layout_of_experts():
    model = nn.Module()
    model.out, model.experts = nn.Linear(8, 8), Experts(True, False)
    site = AttentionSite("out", "encoder_self", "layer", 2, 4, "out")
    weights = ("experts.gate_up_proj", "experts.down_proj")
    experts = ExpertSite("experts", "layer", weights, ("experts.gate_up_proj_bias",), True)
    unit_map = UnitMap((site,), experts=(experts,))
    assert UnitMap.from_dict(unit_map.to_dict()) == unit_map
    pruner = pruned(model, "2:4", unit_map=unit_map)
    assert [target.name for target in pruner.targets] == ["out.weight", *weights]
    for name in weights:
        groups = model.get_parameter(name).transpose(1, 2).unflatten(-1, (-1, 4))
        assert ((groups != 0).sum(-1) == 2).all()
    every = find_targets(model, unit_map)
    assert [t.name for t in every.chosen] == ["out.weight", "out.bias", weights[0], experts.biases[0], weights[1]]


def test_gates_are_pruned_and_what_is_overlooked_in_a_layer_is_told(caplog):
    model = nn.ModuleDict({"pooler": nn.Linear(4, 4), "words": nn.Embedding(5, 4)})
    model["layers"] = nn.ModuleList(
        nn.ModuleDict({part: nn.Linear(4, 4) for part in ("out", "up", "gate", "down", "adapter")}) for _ in range(2)
    )
    sites = tuple(
        AttentionSite(f"layers.{i}.out", "encoder_self", f"layers.{i}", 2, 2, f"layers.{i}.out") for i in (0, 1)
    )
    blocks = tuple(
        FeedForwardSite(f"layers.{i}", f"layers.{i}", 4, f"layers.{i}.up", f"layers.{i}.down", (f"layers.{i}.gate",))
        for i in (0, 1)
    )
    unit_map = UnitMap(sites, blocks)
    found = find_targets(model, unit_map, biases=False)
    assert [t.name for t in found.chosen] == [
        f"layers.{i}.{part}.weight" for i in (0, 1) for part in ("out", "up", "gate", "down")
    ]
    assert found.overlooked == ["layers.0.adapter.weight", "layers.1.adapter.weight"]
    assert found.left == {"pooler.weight": 16, "layers.0.adapter.weight": 16, "layers.1.adapter.weight": 16}
    pruned(model, "tensor", unit_map=unit_map)
    assert "2 matrices in the layers of the model are not pruned: layers.*.adapter.weight;" in caplog.text
    caplog.clear()
    pruned(model, "tensor", unit_map=unit_map, weights_exclude="adapter")
    assert "not pruned" not in caplog.text
    model["layers"].requires_grad_(False)
    model["layers"][0]["out"].requires_grad_(True)
    assert find_targets(model, unit_map).overlooked == []


def test_names_that_differ_in_numbers_alone_are_one():
    assert numbered(["a.0.w", "a.1.w", "b.0.w", "head"]) == "a.*.w, b.0.w, head"
