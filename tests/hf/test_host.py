"""Transformers as a host of the command: loading, example inputs, sizes and exports of many kinds of models."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from head_pruning import HeadMask, HeadPruningError, full_mask
from head_pruning.cli import main
from head_pruning.hosts import kept_heads, read_mask
from head_pruning.report.sizes import mac_bound, measure_sizes
from head_pruning.surgery import remove_heads
from head_pruning.weights import load_compressed, load_weight_masks, save_weight_masks, write_weight_artifacts
from hf_plugin import host, prune_heads, save_pruned, unit_map
from hf_plugin.example import example_inputs
from tests.hf.families import FAMILIES, make, missing
from tests.macs import stack_macs

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
SIDES = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in {"layers": 1, "attention_heads": 4, "ffn_dim": 16}.items()
}
MODELS = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**SIZES, image_size=8, patch_size=4)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=4, n_positions=64, vocab_size=40)),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(d_model=16, vocab_size=40, max_position_embeddings=64, **SIDES)
    ),
}
#: Keeps 12 of a BERT-base's heads, in five layers.
TWELVE = np.isin(np.arange(144), (0, 5, 7, 30, 31, 60, 61, 62, 63, 100, 101, 140))


@pytest.fixture
def saved(tmp_path):
    """Writes a model of which every second head is to go."""

    def save(name: str):
        torch.manual_seed(0)
        model = MODELS[name]().eval()
        sites = unit_map(model)
        save_pruned(model, HeadMask(sites, np.arange(sites.num_heads) % 2 == 0), tmp_path / name)
        return tmp_path / name

    return save


def _bert_base(heads: "np.ndarray | None" = None):
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig(num_labels=3)).eval()
    sites = unit_map(model)
    if heads is not None:
        remove_heads(model, sites, HeadMask(sites, heads))
    inputs = {"input_ids": torch.zeros(1, 128, dtype=torch.long, device="meta")}
    return measure_sizes(model, sites, inputs)


@pytest.mark.parametrize(
    ("keep", "parameters"),
    [(144, 109_484_547), (132, 107_122_947), (72, 95_314_947), (36, 88_230_147), (12, 83_506_947)],
)
def test_bert_base_has_as_many_parameters_as_the_heads_that_stay_need(keep, parameters):
    heads = np.random.default_rng(0).permutation(np.arange(144) < keep)
    assert _bert_base(heads).parameters == parameters


def test_bert_base_with_12_heads_can_be_one_and_a_half_times_as_fast():
    dense, compact = _bert_base(), _bert_base(TWELVE)
    assert dense.macs == stack_macs(768, 3072, 128, layers=12) + 768 * 768 + 768 * 3
    assert dense.attention_macs / compact.attention_macs == pytest.approx(12.0)
    assert mac_bound(dense, compact) == pytest.approx(1.48, abs=0.006)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_example_inputs_run_through_every_family(family):
    if missing(family):
        pytest.skip(missing(family))
    model = make(family).model
    with torch.no_grad():
        model(**example_inputs(model, 2, 8))


@pytest.mark.parametrize("name", MODELS)
def test_all_exports_of_all_kinds_of_models(saved, name, tmp_path):
    pytest.importorskip("onnxruntime")
    source = saved(name)
    loaded = host.load(source)
    assert type(loaded.model).__name__ == type(MODELS[name]()).__name__ and not loaded.model.training
    half = loaded.mask.kept
    assert f"{half} of {2 * half} heads" in host.exports["compact"](source, tmp_path / "compact", None)
    compact = host.load(tmp_path / "compact")
    assert compact.mask is None and kept_heads(compact) == loaded.mask == read_mask(tmp_path / "compact")
    assert compact.unit_map.num_heads == half
    inputs = loaded.example(2, 6)
    with torch.no_grad():
        expected = loaded.model(**inputs).logits
        torch.testing.assert_close(compact.model(**inputs).logits, expected, rtol=0, atol=1e-5)
    for format in ("onnx", "torch-export"):
        printed = host.exports[format](source, tmp_path / format, None)
        assert float(printed.split()[-1]) < 1e-4
    program = torch.export.load(tmp_path / "torch-export").module()
    torch.testing.assert_close(program(**inputs)["logits"], expected, rtol=0, atol=1e-5)


def test_a_model_is_loaded_in_the_class_of_its_config(saved):
    config = json.loads((saved("bart") / "config.json").read_text())
    del config["architectures"]
    folder = saved("bart")
    (folder / "config.json").write_text(json.dumps(config))
    assert type(host.load_model(folder)).__name__ == "BartModel"
    assert type(AutoModelForSeq2SeqLM.from_pretrained(folder)).__name__ == "BartForConditionalGeneration"


def test_a_run_on_a_compact_model_is_inspected_and_cut_out(tmp_path, capsys):
    model = BertForSequenceClassification(BertConfig(**SIZES, vocab_size=40)).eval()
    prune_heads(model, {0: range(4), 1: [1]})
    second = HeadMask(unit_map(model), np.array([True, False, True]))
    save_pruned(model, second, tmp_path / "run")
    with torch.no_grad():
        expected = host.load_model(tmp_path / "run")(**example_inputs(model, 2, 6)).logits
    main(["inspect", str(tmp_path / "run"), "--length", "8", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["state"] == "compact, with a head mask" and (found["heads_kept"], found["heads_total"]) == (2, 8)
    assert found["sizes"]["compact"]["parameters"] < found["sizes"]["now"]["parameters"]
    for name, mask in (("own", None), ("given", HeadMask.load(tmp_path / "run" / "masks.safetensors"))):
        assert "2 of 8 heads" in host.exports["compact"](tmp_path / "run", tmp_path / name, mask)
        compact = host.load(tmp_path / name)
        assert compact.mask is None and [kept for kept in kept_heads(compact).kept_heads().values()] == [[], [0, 3]]
        with torch.no_grad():
            torch.testing.assert_close(compact.model(**compact.example(2, 6)).logits, expected, rtol=0, atol=1e-5)


def test_example_inputs_of_two_models_in_one():
    sides = [BertConfig(**SIZES, vocab_size=40), BertConfig(**SIZES, vocab_size=30, is_decoder=True)]
    model = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(*sides)).eval()
    inputs = example_inputs(model, 2, 8)
    assert inputs["decoder_input_ids"].max() < 30 and model(**inputs).logits.shape == (2, 8, 30)


def test_what_cannot_be_exported_is_said(saved, tmp_path):
    source = saved("gpt2")
    whole = full_mask(host.load(source).unit_map)
    with pytest.raises(HeadPruningError, match="keeps every head"):
        host.exports["compact"](source, tmp_path / "out", whole)
    (source / "masks.safetensors").unlink()
    with pytest.raises(HeadPruningError, match="has no head mask.*--mask"):
        host.exports["masked"](source, tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


def test_a_folder_is_replaced_as_a_whole(saved, tmp_path):
    source = saved("vit")
    host.exports["masked"](source, tmp_path / "out", None)
    (tmp_path / "out" / "left-over.bin").write_bytes(b"")
    host.exports["compact"](source, tmp_path / "out", None)
    assert not (tmp_path / "out" / "left-over.bin").exists()
    assert kept_heads(host.load(tmp_path / "out")) == read_mask(source)


def test_the_masked_export_keeps_what_is_told_of_pruned_weights(saved, tmp_path):
    source = saved("vit")
    model = host.load(source).model
    (name, weight), *_ = [(name, p) for name, p in model.named_parameters() if p.dim() == 2]
    masks = {name: torch.rand_like(weight) < 0.5}
    folder = tmp_path / "both"
    shutil.copytree(source, folder)
    parameters, mask = dict(model.named_parameters()), read_mask(source)
    write_weight_artifacts(folder, masks, parameters, method="platon", options={}, head_mask=mask)
    host.exports["masked"](folder, tmp_path / "out", None)
    assert torch.equal(load_weight_masks(tmp_path / "out" / "masks.safetensors")[name], masks[name])
    assert read_mask(tmp_path / "out") == mask
    assert json.loads((tmp_path / "out" / "pruning.json").read_text())["weights"]["method"] == "platon"


def test_a_model_of_which_only_weights_were_pruned(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
    model = BertForQuestionAnswering(BertConfig(**sizes, vocab_size=40, max_position_embeddings=64)).eval()
    matrices = {name: p for name, p in model.named_parameters() if p.dim() == 2 and "encoder" in name}
    masks = {name: torch.rand_like(p) < 0.1 for name, p in matrices.items()}
    for name, p in matrices.items():
        p.data *= masks[name]
    source = tmp_path / "source"
    model.save_pretrained(source)
    save_weight_masks(source / "masks.safetensors", masks)
    assert host.load(source).mask is None
    with pytest.raises(HeadPruningError, match="masks of weights but no head mask"):
        read_mask(source)
    with pytest.raises(HeadPruningError, match="has no head mask"):
        host.exports["masked"](source, tmp_path / "out", None)
    words = host.exports["compressed"](source, tmp_path / "sparse", None)
    found = load_compressed(tmp_path / "sparse")
    state = model.state_dict()
    assert set(found) == set(state) and all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert float(words.split(": ")[1].partition("%")[0]) < 75
    with pytest.raises(HeadPruningError, match="is a folder"):
        host.exports["compressed"](source, tmp_path, None)


def test_compressed_are_the_zeros_of_removed_heads_too(saved, tmp_path):
    source = saved("vit")
    host.exports["compressed"](source, tmp_path / "sparse", None)
    stored = host.load_model(source).state_dict()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in load_compressed(tmp_path / "sparse").items())


def test_question_answering_runs_in_onnxruntime(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    model = BertForQuestionAnswering(BertConfig(**SIZES, vocab_size=40, max_position_embeddings=64))
    model.save_pretrained(tmp_path / "model")
    printed = host.exports["onnx"](tmp_path / "model", tmp_path / "model.onnx", None)
    assert float(printed.split()[-1]) < 1e-4
    names = [output.name for output in runtime.InferenceSession(tmp_path / "model.onnx").get_outputs()]
    assert names == ["start_logits", "end_logits"]
