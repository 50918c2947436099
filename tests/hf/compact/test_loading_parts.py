"""Compact models by other ways than from_pretrained of their own class: halves, configs, quantized folders."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from head_pruning import HeadPruningError
from head_pruning.surgery.remaining import recipe_of
from hf_plugin import prune_heads, pruned_heads
from tests.hf.tiny import tiny_bert

IDS = torch.arange(5, 11)[None]
T5 = {"d_model": 16, "d_kv": 4, "num_layers": 2, "num_heads": 4, "d_ff": 16, "vocab_size": 40}


def t5(cut: str) -> T5ForConditionalGeneration:
    torch.manual_seed(2)
    model = T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0)).eval()
    prune_heads(model, {f"{cut}.block.1.layer.0.SelfAttention": [0, 2]})
    return model


@pytest.mark.parametrize("cut", ["encoder", "decoder"])
def test_the_encoder_of_a_model_that_was_cut(tmp_path, cut):
    model = t5(cut)
    model.save_pretrained(tmp_path / "whole")
    encoder = T5EncoderModel.from_pretrained(tmp_path / "whole").eval()
    with torch.no_grad():
        expected = model.encoder(input_ids=IDS)[0]
        torch.testing.assert_close(encoder(input_ids=IDS)[0], expected, rtol=0, atol=1e-6)
    assert (recipe_of(encoder) is None) == (cut == "decoder")
    encoder.save_pretrained(tmp_path / "half")
    again = T5EncoderModel.from_pretrained(tmp_path / "half").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=IDS)[0], expected, rtol=0, atol=1e-6)
    if cut == "decoder":  # of which nothing is in its folder
        assert (
            not {"quantization_config", "auto_map"}
            & json.loads((tmp_path / "half" / "config.json").read_text()).keys()
        )


def test_a_recipe_of_another_model_is_still_refused(tmp_path):
    t5("decoder").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    tiny_bert().save_pretrained(tmp_path)
    bert = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**bert, "quantization_config": config["quantization_config"]}))
    with pytest.raises(HeadPruningError, match="damaged or not made for BertForSequenceClassification"):
        BertForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(HeadPruningError, match="damaged or not made for BertForSequenceClassification"):
        AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(tmp_path))


def test_the_config_of_a_compact_model_makes_compact_models(tmp_path):
    model = t5("decoder")
    model.save_pretrained(tmp_path / "compact")
    config = AutoConfig.from_pretrained(tmp_path / "compact")
    before = config.to_dict()
    for auto in (AutoModelForSeq2SeqLM, AutoModel):
        fresh = auto.from_config(config)
        assert pruned_heads(fresh).kept == pruned_heads(model).kept
        sizes = {name: value.shape for name, value in model.named_parameters()}
        assert all(sizes[name] == value.shape for name, value in fresh.named_parameters())
        fresh.save_pretrained(tmp_path / "fresh")
        assert pruned_heads(auto.from_pretrained(tmp_path / "fresh")).kept == pruned_heads(model).kept
    assert config.to_dict() == before  # the caller's own
    trusted = AutoModelForSeq2SeqLM.from_config(config, trust_remote_code=True)
    assert recipe_of(trusted)["sites"] == recipe_of(model)["sites"]
    assert recipe_of(AutoModel.from_config(T5Config(**T5))) is None


QUANTIZED = """
import json, sys, torch, transformers, hf_plugin
root = sys.argv[1]
model = transformers.AutoModelForCausalLM.from_pretrained(root + "/int8").eval()
torch.manual_seed(0)
ids = torch.arange(5, 11)[None]
with torch.no_grad():
    before = model(ids).logits
weight = model.model.layers[0].self_attn.q_proj.weight
kept = hf_plugin.pruned_heads(model).kept
print("FOUND", json.dumps([type(weight).__name__, list(weight.shape), before.tolist(), kept]))
"""


@pytest.mark.slow
def test_a_quantized_compact_model_loads_after_one_import(tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    from transformers import AutoModelForCausalLM, TorchAoConfig

    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=40)).eval()
    prune_heads(model, {0: [1, 3]})
    model.save_pretrained(tmp_path / "compact")
    scheme = TorchAoConfig(quantization.Int8WeightOnlyConfig(version=2), modules_to_not_convert=["lm_head"])
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path / "compact", trust_remote_code=True, quantization_config=scheme
    ).eval()
    quantized.save_pretrained(tmp_path / "int8")
    with torch.no_grad():
        expected = quantized(IDS).logits
    run = subprocess.run(
        [sys.executable, "-c", QUANTIZED, str(tmp_path)],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("FOUND ")]
    kind, shape, logits, kept = json.loads(line.removeprefix("FOUND "))
    assert kind != "Parameter" and shape == [8, 16] and kept == 6
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=0, atol=1e-6)
