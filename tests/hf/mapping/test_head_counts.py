"""Heads are counted by the module itself, then by its own half of the configuration; lines by hand do for all."""

import re

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartModel,
    MoonshineConfig,
    MoonshineModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from head_pruning import AttentionSite, HeadPruningError, UnitMap
from head_pruning.masks import mask_without
from head_pruning.surgery import remove_heads
from hf_plugin import mask_heads, open_session, prune_heads, pruner, restore_heads, save_compact, save_pruned, unit_map
from hf_plugin.mapping.head_counts import count_heads
from tests.hf.tiny import tiny_bert

FEATURES = torch.linspace(-1, 1, 2 * 8 * 16).view(2, 8, 16)
IDS = torch.arange(1, 7).view(2, 3)


def whisper(encoder: int, decoder: int) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    tokens = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 1}
    heads = {"encoder_attention_heads": encoder, "decoder_attention_heads": decoder, "init_std": 0.3}
    longest = {"vocab_size": 60, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16}
    return WhisperForConditionalGeneration(WhisperConfig(**sizes, **tokens, **heads, **longest)).eval()


@pytest.mark.parametrize("encoder, decoder", [(4, 2), (4, 8), (2, 4), (8, 4), (4, 4)])
def test_halves_with_different_heads(encoder, decoder):
    model = whisper(encoder, decoder)
    assert [site.heads for site in unit_map(model).attention] == [encoder, decoder, decoder]
    removed = {site.name: [0] for site in unit_map(model).attention}
    inputs = {"input_features": FEATURES, "decoder_input_ids": IDS}
    mask_heads(model, removed)
    with torch.no_grad():
        expected = model(**inputs).logits
        restore_heads(model)
        prune_heads(model, removed)
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-5)


def test_grouped_halves():
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "encoder_num_hidden_layers": 1,
        "decoder_num_hidden_layers": 1,
    }
    heads = {"encoder_num_attention_heads": 4, "encoder_num_key_value_heads": 2}
    heads |= {"decoder_num_attention_heads": 4, "decoder_num_key_value_heads": 1}
    model = MoonshineModel(MoonshineConfig(**sizes, **heads, vocab_size=40))
    for site in unit_map(model).attention:
        attention = model.get_submodule(site.name)
        assert site.heads == attention.v_proj.out_features // attention.head_dim < 4


class Silent(nn.Module):
    """Attention that says nothing of its heads; what its configuration says decides."""

    def __init__(self, config) -> None:
        super().__init__()
        self.config = config
        self.q, self.out = nn.Linear(16, 16), nn.Linear(16, 16)


def test_the_configuration_is_asked_by_halves():
    config = BartConfig(encoder_attention_heads=4, decoder_attention_heads=8)
    module = Silent(config)
    parts = {"q": module.q, "out": module.out}
    assert config.num_attention_heads == 4  # another name of the encoder's
    assert count_heads([module], config, parts, "encoder") == (4, 4)
    assert count_heads([module], config, parts, "decoder") == (8, 2)
    with pytest.raises(ValueError, match="nothing tells how many heads"):
        count_heads([module], None, parts, "decoder")


class Strange(nn.Module):
    """Names of no known layout."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("ask", "look", "take", "output_of_all"):
            setattr(self, name, nn.Linear(16, 16))


def by_hand(text: str, heads: int, head_dim: int) -> list[AttentionSite]:
    lines = re.search(r"from head_pruning import AttentionSite\nsites = .*?\n\]\n", text, re.DOTALL)[0]
    scope = {"HEADS": heads, "HEAD_DIM": head_dim}
    exec(lines, scope)
    return scope["sites"]


def test_the_lines_of_a_refusal_do_for_all_calls(tmp_path):
    model = tiny_bert(initializer_range=0.3)
    for layer in model.bert.encoder.layer:
        layer.attention.self.num_attention_heads = 3
    with pytest.raises(HeadPruningError) as refusal:
        unit_map(model)
    for layer in model.bert.encoder.layer:
        layer.attention.self.num_attention_heads = 4
    sites = by_hand(str(refusal.value), 4, 4)
    mapped = unit_map(model, sites=sites)
    assert mapped.attention == unit_map(model).attention
    mask = mask_heads(model, {0: [1]}, unit_map=mapped)
    with torch.no_grad():
        expected = model(IDS).logits
    save_pruned(model, mask, tmp_path / "masked")
    restore_heads(model)
    open_session(model, [pruner("platon", final_threshold=0.5)], unit_map=mapped).detach()
    prune_heads(model, mask, unit_map=mapped)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=1e-5)
    save_compact(model, tmp_path / "compact")


def test_the_lines_name_the_projections_of_unknown_layouts_too():
    model = BartModel(BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4))
    model.more = nn.ModuleDict({"StrangeAttention": Strange()})
    Strange.__name__ = "StrangeAttention"
    with pytest.raises(HeadPruningError) as refusal:
        unit_map(model)
    (site,) = by_hand(str(refusal.value), 4, 4)
    name = "more.StrangeAttention"
    assert site.out_proj == f"{name}.output_of_all"
    assert site.projections == (f"{name}.ask", f"{name}.look", f"{name}.take")
    assert unit_map(model, sites=[site]).attention[0].name


def test_a_site_without_projections_is_completed_or_refused_in_a_sentence():
    model = tiny_bert()
    names = [f"bert.encoder.layer.{layer}.attention" for layer in range(2)]
    sites = [
        AttentionSite(name, "encoder_self", name.rpartition(".")[0], 4, 4, f"{name}.output.dense") for name in names
    ]
    assert unit_map(model, sites=sites).attention == unit_map(model).attention
    bare = UnitMap(tuple(sites))
    for call in (
        lambda: prune_heads(model, {0: [1]}, unit_map=bare),
        lambda: remove_heads(model, bare, mask_without(bare, {names[0]: [1]})),
    ):
        with pytest.raises(HeadPruningError, match="names no projections, .* AttentionSite .projections=."):
            call()
