"""Which weights of the families are pruned by default, and that all others are listed."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hf_plugin import open_session, pruner, unit_map
from tests.hf.families import FAMILIES, GROUPED, build, make, missing

PLATON = {"final_threshold": 0.1, "warmup_steps": 1, "initial_warmup": 1, "final_warmup": 2}
EXPERTS = dict(GROUPED, num_local_experts=2, num_experts_per_tok=1, intermediate_size=24, pad_token_id=0)
#: Experts as tensors of each layout.
MIXED = {
    "mixtral": EXPERTS,
    "gpt_oss": dict(EXPERTS, intermediate_size=32),
    "llama4_text": dict(EXPERTS, intermediate_size_mlp=40, interleave_moe_layer_step=1),
    "qwen3_moe": dict(GROUPED, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=24),
}
FAMILY = {family.name: family for family in FAMILIES}


def is_outside(model: nn.Module, name: str) -> bool:
    """Whether a parameter is an embedding, a norm, a router or a task head."""
    owner = model.get_submodule(name.rpartition(".")[0])
    kind = type(owner).__name__.lower()
    return isinstance(owner, nn.Embedding) or any(word in kind for word in ("norm", "embedding", "router"))


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_every_matrix_is_pruned_or_listed(family):
    reason = missing(family)
    if reason:
        pytest.skip(reason)
    model = copy.deepcopy(make(family).model)
    session = open_session(model, [pruner("platon", **PLATON)])
    found = session.pruners[0].found
    known = {target.name for target in found.chosen} | set(found.left)
    for name, parameter in model.named_parameters():
        if parameter.dim() in (2, 3) and not name.endswith("bias") and not is_outside(model, name):
            assert name in known, name
    listed = [name for name in found.left if name in session.pruners[0].sizes]
    assert not listed and set(found.overlooked) <= set(found.left)


@pytest.mark.parametrize("name", ["llama", "mt5", "umt5", "qwen2_moe", "cohere", "helium", "deepseek_v3"])
def test_the_gates_of_feed_forward_blocks_are_pruned(name):
    if missing(FAMILY[name]):
        pytest.skip(missing(FAMILY[name]))
    model = build(FAMILY[name])
    mapped = unit_map(model)
    assert all(len(block.gates) == 1 for block in mapped.feed_forward)
    for block in mapped.feed_forward:
        gate, first = (model.get_submodule(part) for part in (block.gates[0], block.in_proj))
        assert gate.weight.shape == first.weight.shape and gate is not first
    pruned = {target.name for target in open_session(model, [pruner("platon", **PLATON)]).pruners[0].targets}
    assert {f"{block.gates[0]}.weight" for block in mapped.feed_forward} <= pruned


@pytest.mark.parametrize("name", ["bert", "gpt2", "opt", "phi3", "bart", "vit", "distilbert"])
def test_blocks_without_gates_beside_them_have_none(name):
    assert not any(block.gates for block in unit_map(build(FAMILY[name])).feed_forward)


def causal(name: str) -> torch.nn.Module:
    try:
        config = AutoConfig.for_model(name, **copy.deepcopy(MIXED[name]))
    except (KeyError, ValueError):
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def train(model, session, steps: int = 4) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    words = torch.randint(5, 60, (4, 8), generator=torch.Generator().manual_seed(1))
    for step in range(steps):
        session.before_update(step)
        optimizer.zero_grad()
        session.loss(model(input_ids=words, labels=words, use_cache=False).loss).backward()
        session.after_backward()
        session.before_step()
        optimizer.step()
        session.after_step()
    session.harden()


def density(model: nn.Module) -> float:
    """Of all 2-D and 3-D weights that are no embedding, norm, router or output layer."""
    kept = total = 0
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "bias" not in name and "lm_head" not in name and not is_outside(model, name):
            kept, total = kept + int(torch.count_nonzero(parameter)), total + parameter.numel()
    return kept / total


def test_swiglu_reaches_its_true_density():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **GROUPED))
    session = open_session(model, [pruner("platon", **PLATON)], total_steps=4)
    train(model, session)
    assert density(model) == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize("name", MIXED)
def test_experts_are_pruned_to_the_density_and_along_their_inputs(name):
    model = causal(name)
    session = open_session(model, [pruner("platon", **PLATON)], total_steps=4)
    train(model, session)
    assert density(model) == pytest.approx(0.1, abs=5e-3)  # biases are of the budget
    session.detach()

    model = causal(name)
    options = {"target_sparsity": 0.5, "pruning_frequency": 1, "policy_end_step": 1, "weight_selection": "2:4"}
    session = open_session(model, [pruner("gradual_magnitude", **options)], total_steps=4)
    train(model, session)
    (_, up), *_ = ((n, p) for n, p in model.named_parameters() if n.endswith("experts.gate_up_proj"))
    (_, down), *_ = ((n, p) for n, p in model.named_parameters() if n.endswith("experts.down_proj"))
    wide = model.config.hidden_size
    for tensor, inputs in ((up, wide), (down, up.numel() // (2 * len(up) * wide))):
        dim = [length == inputs for length in tensor.shape[1:]].index(True) + 1
        if name == "gpt_oss":  # as many units as the model is wide
            dim = 1
        groups = tensor.movedim(dim, -1).unflatten(-1, (-1, 4))
        assert ((groups != 0).sum(-1) <= 2).all() and (groups != 0).float().mean() == pytest.approx(0.5, abs=1e-3)


def test_the_pattern_of_gpt2_runs_along_the_inputs():
    model = AutoModel.from_config(AutoConfig.for_model("gpt2", **FAMILY["gpt2"].overrides))
    options = {"target_sparsity": 0.5, "pruning_frequency": 1, "policy_end_step": 1, "weight_selection": "2:4"}
    session = open_session(model, [pruner("gradual_magnitude", **options)], total_steps=4)
    for step in range(3):
        session.before_update(step)
        session.before_step()
        session.after_step()
    for layer in model.h:
        for part in (layer.attn.c_attn, layer.attn.c_proj, layer.mlp.c_fc, layer.mlp.c_proj):
            groups = part.weight.t().unflatten(-1, (-1, 4))  # [out, in / 4, 4]
            assert ((groups != 0).sum(-1) == 2).all()


def test_what_is_overlooked_is_told(caplog):
    model = build(FAMILY["longformer"])
    open_session(model, [pruner("platon", **PLATON)])
    assert "encoder.layer.*.attention.self.query_global.weight" in caplog.text
    caplog.clear()
    open_session(build(FAMILY["bert"]), [pruner("platon", **PLATON)])
    assert not caplog.text
