"""Feed-forward units as units: for every family that is mapped, cutting them out equals masking them."""

import copy
import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertForSequenceClassification

from head_pruning import HeadMask, HeadPruningError
from head_pruning.cli import main
from head_pruning.masks import mask_without
from head_pruning.surgery.remaining import heads_left
from head_pruning.surgery.removal import remove_heads, removed_parameters
from head_pruning.surgery.zeros import zeroed_heads
from hf_plugin import host as command_host
from hf_plugin import open_session, pruner, save_compact, save_pruned
from hf_plugin.heads.masking import head_mask, mask_heads, masked_heads, restore_heads
from hf_plugin.heads.pruning import prune_heads, pruned_heads
from hf_plugin.mapping.unit_map import unit_map
from hf_plugin.saving.example_inputs import example_inputs
from tests.hf.families import FAMILIES, make, missing, one_of_each
from tests.hf.mapping.test_families import tensors

# All of whose units lie in experts, or whose blocks are of no known layout.
WITHOUT = {"mixtral", "qwen3_moe"}


@pytest.fixture(scope="module", params=one_of_each(), ids=str)
def host(request) -> SimpleNamespace:
    reason = missing(request.param)
    if reason:
        pytest.skip(reason)
    found = make(request.param)
    units = unit_map(found.model)
    if request.param.name in WITHOUT:
        with pytest.raises(HeadPruningError, match="no feed-forward block"):
            units.numbering("both")
        pytest.skip("has no block")
    return SimpleNamespace(model=found.model, inputs=found.inputs, units=units.numbering("both"))


def run(host: SimpleNamespace, model: torch.nn.Module) -> list[torch.Tensor]:
    np.random.seed(0)
    torch.manual_seed(0)
    with torch.no_grad():
        return tensors(model(**host.inputs))


def furthest(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    assert len(found) == len(expected) > 0
    return max(float((mine - other).abs().max()) for mine, other in zip(found, expected))


def some(host: SimpleNamespace, share: float, seed: int = 1) -> np.ndarray:
    """Which heads and units stay: all units of the first block go, and of each other site some stay."""
    draw = np.random.default_rng(seed)
    keep = draw.random(host.units.num_heads) < share
    for _, where in host.units.slices():
        keep[draw.integers(where.start, where.stop)] = True
    first = next(where for site, where in host.units.slices() if site.kind == "feed_forward")
    keep[first] = False
    return keep


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def masked(host: SimpleNamespace, keep: np.ndarray) -> list[torch.Tensor]:
    with head_mask(host.model, HeadMask(host.units, keep)):
        return run(host, host.model)


def test_cut_in_two_steps_equals_masked(host):
    """Heads and units together, uneven, one block without any; then the rest of the units."""
    keep, last = some(host, 0.5), some(host, 0.3, 2)
    for site, where in host.units.slices():
        last[where] = keep[where] & (last[where] if site.kind != "feed_forward" else False)
        if site.kind != "feed_forward" and not last[where].any():
            last[where] = keep[where]
    model = copy.deepcopy(host.model)
    for now in (keep, last):
        size, sites = parameters(model), unit_map(model)
        before = np.ones_like(keep) if heads_left(model) is None else heads_left(model).keep
        there = {site.name: now[where][before[where]] for site, where in host.units.slices()}
        numbered = sites.numbering("both") if any(s.name in there for s in sites.feed_forward) else sites
        mask = HeadMask(numbered, np.concatenate([there[site.name] for site in numbered.sites]))
        fewer = removed_parameters(model, sites, mask)
        remove_heads(model, sites, mask)
        assert parameters(model) == size - fewer < size
        expected = masked(host, now)
        assert furthest(run(host, model), expected) < 1e-5
        assert furthest(run(host, host.model), expected) > 1e-3
        with zeroed_heads(host.model, HeadMask(host.units, now)):
            assert furthest(run(host, host.model), expected) < 1e-5
        assert (heads_left(model).keep == now).all()
    assert unit_map(model).feed_forward == () or all("experts" in s.name for s in unit_map(model).feed_forward)


# -- what a user does with them ------------------------------------------------------------------------------------

SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, vocab_size=40)


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES, initializer_range=0.3, max_position_embeddings=64)).eval()


def gpt2() -> torch.nn.Module:
    """Its projections are of a class that cannot read nothing, so that a block without units is put to the test."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=64)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes)).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**example_inputs(model, 2, 6)).logits


def names_of(model: torch.nn.Module) -> list[str]:
    return [site.name for site in unit_map(model).feed_forward]


@pytest.mark.parametrize("make_model", [bert, pytest.param(gpt2, marks=pytest.mark.slow)])
def test_a_folder_is_written_read_inspected_and_exported(make_model, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    model = make_model()
    first, second = names_of(model)
    width = unit_map(model).feed_forward[0].width
    gone = {first: range(width), second: range(0, width, 2), 0: [1, 2]}
    mask_heads(model, gone)
    expected = logits(model)
    mask = masked_heads(model)
    assert mask.words == f"6 of 8 heads and {width // 2} of {2 * width} units"
    restore_heads(model)
    assert float((logits(model) - expected).abs().max()) > 1e-4
    save_pruned(model, mask, tmp_path / "masked")
    assert mask.words in command_host.exports["compact"](tmp_path / "masked", tmp_path / "compact", None)
    for folder in ("masked", "compact"):
        found = command_host.load_model(tmp_path / folder)
        torch.testing.assert_close(logits(found), expected, rtol=0, atol=1e-5)
        report = json.loads((tmp_path / folder / "pruning.json").read_text())
        assert (report["units_kept"], report["units_total"], report["heads_kept"]) == (width // 2, 2 * width, 6)
        assert mask.words.replace("heads", "attention heads") in (tmp_path / folder / "README.md").read_text()
        capsys.readouterr()
        main(["inspect", str(tmp_path / folder), "--length", "8", "--json"])
        told = json.loads(capsys.readouterr().out)
        assert (told["units_kept"], told["heads_kept"]) == (width // 2, 6)
        assert HeadMask.load(tmp_path / folder / "masks.safetensors") == mask
    small = command_host.load(tmp_path / "compact")
    dense = sum(parameter.numel() for parameter in model.parameters())
    assert (
        told["sizes"]["now"]["parameters"]
        == parameters(small.model)
        == dense - removed_parameters(model, unit_map(model), mask)
    )
    for format in ("onnx", "torch-export") if make_model is gpt2 else ():  # slow
        printed = command_host.exports[format](tmp_path / "compact", tmp_path / format, None)
        assert float(printed.split()[-1]) < 1e-5
    main(["diff", str(tmp_path / "masked"), str(tmp_path / "compact"), "--plot", str(tmp_path / "picture.png")])
    shown = capsys.readouterr().out
    assert mask.words in shown and "jaccard index 1.00" in shown and (tmp_path / "picture.png").stat().st_size > 1000


def test_a_loaded_model_loses_more_heads_and_units(tmp_path):
    model = bert()
    first, second = names_of(model)
    prune_heads(model, {first: range(20), 1: [0]})
    save_compact(model, tmp_path)
    again = command_host.load_model(tmp_path)
    assert pruned_heads(again) == pruned_heads(model)
    prune_heads(again, {first: range(10, 25), second: [3], 0: [2]})
    at_once = bert()
    prune_heads(at_once, {first: range(25), second: [3], 0: [2], 1: [0]})
    assert pruned_heads(again) == pruned_heads(at_once)
    assert pruned_heads(again).words == "6 of 8 heads and 38 of 64 units"
    torch.testing.assert_close(logits(again), logits(at_once), rtol=0, atol=1e-6)
    # A mask of the heads alone, and one of what there is now.
    heads = mask_without(unit_map(again), {unit_map(again).attention[0].name: [0]})
    assert prune_heads(again, heads).words == "5 of 8 heads and 38 of 64 units"
    now = unit_map(again).numbering("ffn")
    assert prune_heads(again, HeadMask(now, np.arange(now.num_heads) % 2 == 0)).words.endswith("19 of 64 units")
    assert [site.width for site in unit_map(again).feed_forward] == [4, 15]
    for layer, width in zip(again.bert.encoder.layer, (4, 15)):
        assert layer.intermediate.dense.out_features == layer.output.dense.in_features == width


def test_units_that_cannot_be_pruned_are_named(caplog):
    family = next(family for family in FAMILIES if family.name == "qwen2_moe")
    if missing(family):
        pytest.skip(missing(family))
    model = make(family).model
    with caplog.at_level(logging.WARNING):
        session = open_session(model, [pruner("random", num_of_heads=4, prune_units="both")])
    session.detach()
    assert "layers.0.mlp.experts" in caplog.text and "cannot be pruned" in caplog.text
    with pytest.raises(HeadPruningError, match="no feed-forward block"):
        unit_map(make(next(family for family in FAMILIES if family.name == "mixtral")).model).numbering("ffn")


@pytest.mark.parametrize("heads", [{}, {0: range(4)}], ids=["with heads", "without"])
def test_a_block_whose_units_were_cut_out_is_not_missed(heads, tmp_path, caplog):
    model = bert()
    block = unit_map(model).feed_forward[0]
    prune_heads(model, {block.name: range(block.width), **heads})
    save_compact(model, tmp_path)
    for each in (model, command_host.load_model(tmp_path)):
        sites = unit_map(each).numbering("both")
        assert block.layer in sites.layers and sites.sites[-1].layer != block.layer == sites.emptied[0]
        with caplog.at_level(logging.WARNING):
            open_session(each, [pruner("random", num_of_heads=4, prune_units="both")]).detach()
        assert "cannot be pruned" not in caplog.text


def test_a_norm_over_the_units_is_refused():
    model = bert()
    model.bert.encoder.layer[0].output.norm = torch.nn.LayerNorm(32)
    with pytest.raises(HeadPruningError, match="Units of .* cannot be cut out exactly: norm normalizes"):
        prune_heads(model, {names_of(model)[0]: [0]})
