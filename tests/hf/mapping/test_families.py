"""What must hold of every family of transformers that is mapped, over tiny models with random weights."""

import contextlib
import copy
from typing import Iterator

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModel

from head_pruning import AttentionSite
from head_pruning.gates.engine.bank import GateBank
from hf_plugin.mapping.layouts import features
from hf_plugin.mapping.unit_map import unit_map
from tests.hf.families import FAMILIES, HEADS, LAYERS, build, covered, make, missing, one_of_each


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def host(request):
    """One family's model, its batch and its unit map."""
    return host_of(request.param)


@pytest.fixture(scope="module", params=one_of_each(), ids=str)
def layout(request):
    """That of one family of each layout."""
    return host_of(request.param)


def host_of(family):
    reason = missing(family)
    if reason:
        pytest.skip(reason)
    host = make(family)
    host.family = family
    host.unit_map = unit_map(host.model)
    return host


def tensors(value) -> list[torch.Tensor]:
    """All floating tensors of a model's output."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for part in value for tensor in tensors(part)] if isinstance(value, (tuple, list)) else []


def run(host, model=None) -> list[torch.Tensor]:
    with torch.no_grad():
        return tensors((model or host.model)(**host.inputs))


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) > 0 and all(torch.equal(a, b) for a, b in zip(first, second))


def furthest(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(first, second))


@contextlib.contextmanager
def gated(host, values=None, model=None) -> Iterator[GateBank]:
    """Gates on the host's model or another one like it, with ``values`` (default: ones) in evaluation."""
    bank = GateBank(model or host.model, host.unit_map)
    bank.set_evaluation(np.ones(host.unit_map.num_heads) if values is None else values)
    bank.attach()
    try:
        yield bank
    finally:
        bank.detach()


def some_gates(host) -> np.ndarray:
    return np.random.default_rng(3).uniform(0.2, 1.0, host.unit_map.num_heads)


def columns(projection: nn.Module) -> torch.Tensor:
    """The weight of a projection as ``[out, in]``."""
    return projection.weight.data.t() if hasattr(projection, "nf") else projection.weight.data


def seen(host, site: AttentionSite) -> torch.Tensor:
    """What the output projection of a site reads, ``[tokens, heads, head_dim]``."""
    caught = []
    handle = host.model.get_submodule(site.out_proj).register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    run(host)
    handle.remove()
    return caught[0].reshape(-1, site.heads, site.head_dim)


def test_at_least_45_families():
    assert len(set(covered())) == len(FAMILIES) >= 45


def test_sites_and_their_order(host):
    kinds = [site.kind for site in host.unit_map.attention]
    both = "to text" in host.family.feed
    assert kinds == sorted(kinds, key=["encoder_self", "decoder_cross", "decoder_self"].index)
    assert set(kinds) == ({"encoder_self", "decoder_cross", "decoder_self"} if both else set(kinds[:1]))
    expected = {"albert": 1, "clip": 2 * LAYERS}.get(host.family.name, 3 * LAYERS if both else LAYERS)
    assert len(kinds) == expected
    told = host.family.overrides
    heads = told.get("num_key_value_heads") or told.get("num_kv_heads") or told.get("num_heads") or HEADS
    assert [site.heads for site in host.unit_map.attention] == (heads if heads == [2, 4] else [heads] * expected)
    for kind in set(kinds):
        layers = [site.layer for site in host.unit_map.attention if site.kind == kind]
        assert layers == list(dict.fromkeys(layers))
        assert [name for name, _ in host.model.named_modules() if name in layers] == layers
    if host.family.name in ("flaubert", "xlm"):  # attention and feed-forward blocks in a list each
        assert host.unit_map.layers == tuple(f"attentions.{index}" for index in range(LAYERS))
        assert [site.layer for site in host.unit_map.feed_forward] == list(host.unit_map.layers)


def test_gates_of_one_change_no_bit(layout):
    plain = run(layout)
    with gated(layout) as bank:
        assert equal(run(layout), plain)
        with bank.forced("training"):
            assert equal(run(layout), plain)
        bank.check_fired()
    assert equal(run(layout), plain)
    assert all(torch.isfinite(tensor).all() for tensor in plain)


def test_a_closed_gate_is_a_zeroed_slice_of_the_output_projection(layout):
    plain = run(layout)
    for site, where in layout.unit_map.slices():
        head = (where.start // site.heads + 1) % site.heads
        values = np.ones(layout.unit_map.num_heads)
        values[where.start + head] = 0.0
        with gated(layout, values):
            closed = run(layout)
        weight = columns(layout.model.get_submodule(site.out_proj))
        columns_of_head = weight[:, head * site.head_dim : (head + 1) * site.head_dim]
        kept = columns_of_head.clone()
        columns_of_head.zero_()
        zeroed = run(layout)
        columns_of_head.copy_(kept)
        assert furthest(closed, zeroed) < 1e-5
        assert furthest(closed, plain) > 1e-4, site.name


def test_a_head_is_what_the_map_says(host):
    """A row of a site's value projection reaches one head's slice, and all heads are reached."""
    draw = torch.Generator().manual_seed(4)
    for site in {site.kind: site for site in reversed(host.unit_map.attention)}.values():
        projection = host.model.get_submodule(site.projections[-1])
        rows = features(projection)[1]
        before = seen(host, site)
        reached = set()
        for row in range(0, rows, 3):  # no head is narrower than 4 rows
            weight = columns(projection)[row]
            kept = weight.clone()
            weight.add_(torch.randn(weight.shape, generator=draw))
            heads = (seen(host, site) != before).any(0).any(-1).nonzero().flatten().tolist()
            weight.copy_(kept)
            assert len(heads) <= 1, (site.name, row, heads)
            if len(site.projections) == 3:
                assert heads == [row * site.heads // rows]
            reached.update(heads)
        assert reached == set(range(site.heads)), site.name


def test_eager_and_sdpa_agree(layout):
    if not layout.model._supports_sdpa:
        pytest.skip(f"{layout.family} has no sdpa attention")
    results = {}
    for implementation in ("eager", "sdpa"):
        model = build(layout.family, attn_implementation=implementation).eval()
        model.load_state_dict(layout.model.state_dict())
        assert model.config._attn_implementation == implementation
        with gated(layout, some_gates(layout), model) as bank:
            results[implementation] = run(layout, model)
        bank.check_fired()
    mask = layout.inputs.get("attention_mask")
    for eager, sdpa in zip(results["eager"], results["sdpa"], strict=True):
        if mask is not None and eager.shape[:2] == mask.shape:  # what padding reads is nobody's business
            eager, sdpa = eager[mask.bool()], sdpa[mask.bool()]
        assert furthest([eager], [sdpa]) < 1e-4


def test_a_deep_copy_has_gates_of_its_own(layout):
    host = layout
    mask = np.arange(host.unit_map.num_heads) % 2
    with gated(host, mask) as bank:
        masked = run(host)
        twin = copy.deepcopy(host.model)
        assert equal(run(host, twin), masked)
        bank.set_evaluation(1 - mask)
        assert not equal(run(host), masked)
        assert equal(run(host, twin), masked)


def checkpointing(model, what: str) -> None:
    """Later releases call gradient checkpointing activation checkpointing, and warn of the old name."""
    getattr(model, f"activation_checkpointing_{what}", getattr(model, f"gradient_checkpointing_{what}"))()


def gate_gradients(host, bank: GateBank) -> tuple[np.ndarray, int]:
    """The gates' gradients of one training pass, and how often the gated projections ran."""
    calls = []
    handles = [
        host.model.get_submodule(site.out_proj).register_forward_pre_hook(lambda *_: calls.append(1))
        for site in host.unit_map.attention
    ]
    bank.set_training(some_gates(host))
    torch.manual_seed(6)
    sum(
        (tensor * torch.linspace(-1, 1, tensor.shape[-1])).sum() for tensor in tensors(host.model(**host.inputs))
    ).backward()
    host.model.zero_grad()
    for handle in handles:
        handle.remove()
    return bank.gradients.numpy().copy(), len(calls)


def test_gradient_checkpointing_keeps_gate_gradients(layout):
    host, model = layout, layout.model
    if not model.supports_gradient_checkpointing:
        pytest.skip(f"{host.family} has no gradient checkpointing")
    model.train()
    try:
        with gated(host) as bank:
            plain, calls = gate_gradients(host, bank)
            checkpointing(model, "enable")
            again, more_calls = gate_gradients(host, bank)
    finally:
        checkpointing(model, "disable")
        model.disable_input_require_grads()  # which disabling leaves on
        model.eval()
    assert more_calls > calls
    assert np.all(plain != 0)
    np.testing.assert_allclose(again, plain, rtol=1e-4, atol=1e-5)


def test_attaching_leaves_the_saved_model_alone(layout, tmp_path):
    host = layout
    before = {name: tensor.clone() for name, tensor in host.model.state_dict().items()}
    host.model.save_pretrained(tmp_path / "plain")
    with gated(host, some_gates(host)):
        run(host)
        assert list(host.model.state_dict()) == list(before)
        host.model.save_pretrained(tmp_path / "gated")
    host.model.save_pretrained(tmp_path / "after")
    for name in ("config.json", "model.safetensors"):
        plain = (tmp_path / "plain" / name).read_bytes()
        assert (tmp_path / "gated" / name).read_bytes() == plain == (tmp_path / "after" / name).read_bytes()
    loaded = AutoModel.from_pretrained(tmp_path / "gated")
    assert unit_map(loaded) == host.unit_map
    for state in (host.model.state_dict(), loaded.state_dict()):
        assert list(state) == list(before)
        assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
