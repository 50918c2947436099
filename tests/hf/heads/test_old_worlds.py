"""Masks of the published DSP code, and checkpoints whose heads transformers 4 removed."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from head_pruning import HeadPruningError
from head_pruning.masks import mask_without
from head_pruning.old_masks import read_old_mask
from head_pruning.surgery.remaining import heads_left
from hf_plugin import load_pruned_v4, prune_heads, unit_map
from tests.hf import few_models

# -- mask{K}.pt ----------------------------------------------------------------------------------------------------


def bart_with_equal_heads():
    config = few_models.make("bart").config
    config.decoder_attention_heads = config.encoder_attention_heads
    return few_models.BartForConditionalGeneration(config)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64, torch.bool])
def test_a_mask_of_the_published_code(tmp_path, dtype):
    """Rows: encoder self-attention, cross-attention, decoder self-attention; of a BERT, its layers."""
    for model, rows in ((few_models.make("bert"), 2), (bart_with_equal_heads(), 3)):
        values = torch.zeros(rows, 4, dtype=dtype)
        values[0, 1] = values[1, 2] = values[-1, 3] = 1
        torch.save(values, tmp_path / "mask3.pt")
        mask = read_old_mask(tmp_path / "mask3.pt", unit_map(model))
        assert np.array_equal(mask.keep.reshape(rows, 4), values.numpy())
    assert mask.kept_heads() == {
        "model.encoder.layers.0.self_attn": [1],
        "model.decoder.layers.0.encoder_attn": [2],
        "model.decoder.layers.0.self_attn": [3],
    }


@pytest.mark.parametrize(
    ("held", "sentence"),
    [
        (torch.zeros(3, 4), r"the shape \[3, 4\], but the model's sites and heads are \[2, 4\]"),
        (torch.full((2, 4), 0.5), "does not hold a matrix of zeros and ones"),
        ({"w": torch.zeros(2, 4)}, "does not hold a matrix of zeros and ones"),
        (few_models.batch_of, "is no head mask of the published code"),
    ],
)
def test_other_files_are_refused(tmp_path, held, sentence):
    torch.save(held, tmp_path / "mask.pt")
    with pytest.raises(HeadPruningError, match=sentence):
        read_old_mask(tmp_path / "mask.pt", unit_map(few_models.make("bert")))


def test_missing_and_damaged_masks(tmp_path):
    units = unit_map(few_models.make("bert"))
    with pytest.raises(HeadPruningError, match="There is no file"):
        read_old_mask(tmp_path / "mask.pt", units)
    for content in (b"", b"no pickle at all"):
        (tmp_path / "mask.pt").write_bytes(content)
        with pytest.raises(HeadPruningError, match="is no head mask of the published code"):
            read_old_mask(tmp_path / "mask.pt", units)


# -- config.pruned_heads -------------------------------------------------------------------------------------------


def bert(folder, pruned, kept):
    """What save_pretrained of transformers 4 left after prune_heads: rows of q, k and v, columns of the output."""
    model = few_models.make("bert")
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    for layer, heads in kept.items():
        rows = torch.cat([torch.arange(4 * head, 4 * head + 4) for head in heads])
        attention = f"bert.encoder.layer.{layer}.attention"
        for name in ("query", "key", "value"):
            for leaf in ("weight", "bias"):
                full = f"{attention}.self.{name}.{leaf}"
                state[full] = state[full][rows].contiguous()
        full = f"{attention}.output.dense.weight"
        state[full] = state[full][:, rows].contiguous()
    return model, state, pruned


def gpt2(folder, pruned, kept):
    torch.manual_seed(7)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16, "vocab_size": few_models.VOCABULARY}
    model = GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.3, bos_token_id=1, eos_token_id=1)).eval()
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    for layer, heads in kept.items():
        rows = torch.cat([torch.arange(4 * head, 4 * head + 4) for head in heads])
        attention = f"transformer.h.{layer}.attn"
        columns = torch.cat([rows, rows + 16, rows + 32])
        for leaf in ("weight", "bias"):
            full = f"{attention}.c_attn.{leaf}"
            state[full] = state[full].index_select(-1, columns)
        full = f"{attention}.c_proj.weight"
        state[full] = state[full][rows].contiguous()
    return model, state, pruned


@pytest.mark.parametrize(("make", "auto"), [(bert, AutoModelForSequenceClassification), (gpt2, AutoModelForCausalLM)])
def test_a_checkpoint_that_transformers_4_pruned(tmp_path, make, auto):
    old, new = tmp_path / "old", tmp_path / "new"
    model, state, pruned = make(old, {"0": [0, 2], "1": [3]}, {0: [1, 3], 1: [0, 1, 2]})
    save_file(state, old / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((old / "config.json").read_text())
    (old / "config.json").write_text(json.dumps({**config, "pruned_heads": pruned}))
    units = unit_map(model)
    mask = mask_without(units, {units.attention[0].name: [0, 2], units.attention[1].name: [3]})
    loaded = load_pruned_v4(old)
    assert heads_left(loaded) == mask and not hasattr(loaded.config, "pruned_heads")
    loaded.save_pretrained(new)
    again = auto.from_pretrained(new)
    prune_heads(model, mask)
    batch = {key: value for key, value in few_models.batch_of("bert").items() if key != "labels"}
    with torch.no_grad():
        wanted = model(**batch).logits
        torch.testing.assert_close(loaded(**batch).logits, wanted, atol=1e-5, rtol=0)
        assert torch.equal(again(**batch).logits, loaded(**batch).logits)


def test_configs_that_do_not_fit(tmp_path):
    few_models.make("bert").save_pretrained(tmp_path)
    with pytest.raises(HeadPruningError, match="names no pruned_heads"):
        load_pruned_v4(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for pruned, sentence in (
        ({"7": [0]}, "but the model has 2 layers"),
        ([1, 2], "but the model has 2 layers"),
        ({"0": [9]}, "has heads 0 to 3; 9 is not one of them"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, "pruned_heads": pruned}))
        with pytest.raises(HeadPruningError, match=sentence):
            load_pruned_v4(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "pruned_heads": {"0": [1]}, "architectures": ["No"]}))
    with pytest.raises(HeadPruningError, match="names No, not a class of transformers"):
        load_pruned_v4(tmp_path)
