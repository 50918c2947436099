"""``output_attentions`` has one entry per layer, also of layers that lost all heads."""

import copy

import pytest
import torch
from transformers import AutoModel, BertModel

from head_pruning.surgery.remaining import recipe_of
from hf_plugin import prune_heads, unit_map
from tests.hf.families import Family, build, make, missing, one_of_each
from tests.hf.tiny import tiny_bert

KEYS = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")


def collected(model, inputs) -> dict[str, tuple]:
    with torch.no_grad():
        found = model(**inputs, output_attentions=True)
    return {key: found[key] for key in KEYS if key in found}


def eager(family: Family):
    reason = missing(family)
    if reason:
        pytest.skip(reason)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return build(family, attn_implementation="eager").eval()


@pytest.mark.parametrize("used_before", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("family", one_of_each(), ids=str)
def test_one_entry_per_layer(family, used_before):
    model, inputs = eager(family), make(family).inputs
    sites = {site.kind: site for site in unit_map(model).attention}  # the last of each kind
    expected = collected(model if used_before else copy.deepcopy(model), inputs)
    prune_heads(model, {site.name: range(site.heads) for site in sites.values()})
    found = collected(model, inputs)
    assert {key: len(found[key]) for key in found} == {key: len(expected[key]) for key in expected}
    silent = [entry["dummy"] is not None for entry in recipe_of(model)["sites"].values() if "dummy" in entry]
    for key, layers in found.items():
        for now, before in zip(layers, expected[key]):
            assert (now is None) == (before is None)
            assert not torch.is_tensor(now) or not torch.is_tensor(before) or now.shape[0] == before.shape[0]
        if layers and not silent and torch.is_tensor(layers[-1]):
            assert layers[-1].dim() == 4 and layers[-1].numel() == 0  # the attentions of no head


def test_saved_and_copied(tmp_path):
    model, ids = tiny_bert(attn_implementation="eager"), torch.arange(4)[None]
    prune_heads(model, {0: range(4)})
    model.save_pretrained(tmp_path)
    loaded = BertModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    torch.save(model, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    for other in (model, copy.deepcopy(model), loaded, whole):
        shapes = [tuple(each.shape) for each in collected(other, {"input_ids": ids})["attentions"]]
        assert shapes == [(1, 0, 4, 4), (1, 4, 4, 4)]
    fused = AutoModel.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    with torch.no_grad():
        torch.testing.assert_close(fused(ids)[0], loaded(ids)[0], rtol=0, atol=1e-6)
