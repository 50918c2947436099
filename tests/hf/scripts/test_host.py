"""Transformers as a host of the command: loading, example inputs, sizes and exports of many kinds of models."""

import copy
import json
import re
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTForImageClassification,
)

from head_pruning import HeadMask, HeadPruningError, full_mask
from head_pruning.cli import main
from head_pruning.commands.export import run as run_export
from head_pruning.commands.inspect import describe
from head_pruning.hosts import HostModel, kept_heads, read_mask
from head_pruning.inference.sizes import mac_bound, measure_sizes
from head_pruning.report.weights import write_weight_artifacts
from head_pruning.surgery.removal import remove_heads
from head_pruning.weights import load_compressed, load_weight_masks, save_weight_masks
from hf_plugin import host, prune_heads, save_compact, save_pruned, unit_map
from hf_plugin.heads.masking import head_mask, mask_heads
from hf_plugin.heads.pruning import remove_query_heads
from hf_plugin.saving.example_inputs import example_inputs
from hf_plugin.saving.programs import export_program
from tests.hf.families import FAMILIES, make, missing, one_of_each
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


@pytest.mark.parametrize("family", one_of_each(), ids=str)
def test_example_inputs_run_through_every_family(family):
    if missing(family):
        pytest.skip(missing(family))
    model = make(family).model
    with torch.no_grad():
        model(**example_inputs(model, 2, 8))


def test_without_a_length_the_text_is_as_long_as_the_model_takes(saved, capsys):
    """Models like RoBERTa count their positions from the one after padding, so that some have no token."""
    roberta = RobertaModel(RobertaConfig(**SIZES, vocab_size=40, max_position_embeddings=64, pad_token_id=1)).eval()
    roberta.save_pretrained(saved("gpt2").parent / "roberta")
    for name, longest in (("gpt2", 64), ("roberta", 62)):
        path = str(saved("gpt2").parent / name)
        for line in (["inspect", path], ["benchmark", path, "--batch", "1", "--rounds", "1"]):
            capsys.readouterr()
            main([*line, "--json"])
            assert json.loads(capsys.readouterr().out)["length"] == longest
            with pytest.raises(SystemExit, match=f"has {longest} positions; --length {longest + 1} is more"):
                main([*line, "--length", str(longest + 1)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "gpt2", "bart"])
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["olmo2", "prophetnet"])
def test_programs_of_heads_that_do_not_stand_alone(name, tmp_path):
    """A norm over all heads, and positions that heads read from each other; batch and length stay free."""
    family = next(family for family in FAMILIES if family.name == name)
    if missing(family):
        pytest.skip(missing(family))
    model = copy.deepcopy(make(family).model)
    sites = unit_map(model)
    prune_heads(model, HeadMask(sites, np.arange(sites.num_heads) % 4 != 1))
    assert (
        export_program(model, lambda batch, length: example_inputs(model, batch, length), tmp_path / "program.pt2")
        < 1e-5
    )


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


def _llama():
    """4 query heads of 4 in 2 groups, two layers."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=40)).eval()


def test_inspect_shows_single_query_heads_that_were_removed(tmp_path, capsys):
    model = _llama()
    remove_query_heads(model, {0: [1, 2]})
    prune_heads(model, {1: [0]})
    save_compact(model, tmp_path)
    main(["inspect", str(tmp_path), "--length", "8", "--json"])
    first, second = json.loads(capsys.readouterr().out)["sites"]
    assert (first["kept"], first["query_heads_kept"], first["query_heads"]) == ([0, 1], [0, 3], 4)
    assert second["kept"] == [1] and "query_heads" not in second  # a whole group
    main(["inspect", str(tmp_path), "--length", "8"])
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if first["site"] in line).split()[1:] == ["##", "2/2", "#..#", "2/4"]
    assert next(line for line in lines if second["site"] in line).split()[1:] == [".#", "1/2"]


def test_quantized_models_are_described():
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    torch.manual_seed(0)
    model = BertForQuestionAnswering(BertConfig(**SIZES, vocab_size=40, max_position_embeddings=64)).eval()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    sites = unit_map(model)
    found = describe(HostModel(model, sites, None, lambda batch, length: example_inputs(model, batch, length)), 8)
    assert found["state"] == "dense" and found["zeros_of_matrices"] < 0.05


def test_inspect_tells_that_weights_were_pruned(tmp_path, capsys):
    torch.manual_seed(0)
    model = BertForQuestionAnswering(BertConfig(**SIZES, vocab_size=40, max_position_embeddings=64)).eval()
    model.save_pretrained(tmp_path / "dense")
    matrices = {name: p for name, p in model.named_parameters() if p.dim() == 2 and "encoder" in name}
    masks = {name: torch.arange(p.numel()).reshape(p.shape) % 4 == 0 for name, p in matrices.items()}
    for name, p in matrices.items():
        p.data *= masks[name]
    for folder in ("told", "untold"):
        model.save_pretrained(tmp_path / folder)
    write_weight_artifacts(tmp_path / "told", masks, dict(model.named_parameters()), method="platon", options={})

    def inspect(folder, *more):
        main(["inspect", str(tmp_path / folder), "--length", "8", *more])
        return capsys.readouterr().out

    found = json.loads(inspect("told", "--json"))
    total = sum(p.numel() for p in matrices.values())
    assert found["state"] == "with pruned weights" and found["heads_kept"] == 8
    assert found["weights"] == {
        "method": "platon",
        "weights_kept": total // 4,
        "weights_total": total,
        "density": 0.25,
    }
    every = [p for p in model.parameters() if p.dim() == 2]
    zeros = sum(int((p == 0).sum()) for p in every) / sum(p.numel() for p in every)
    assert found["zeros_of_matrices"] == pytest.approx(zeros) and zeros > 0.3
    assert "density of 25.00% (platon)" in inspect("told") and "dense" not in inspect("told")
    found = json.loads(inspect("untold", "--json"))
    assert found["weights"] is None and found["state"] == "with zeros of unknown origin"
    assert f"{zeros:.1%} are zero" in inspect("untold") and "dense" not in inspect("untold")
    assert json.loads(inspect("dense", "--json"))["state"] == "dense"


@pytest.fixture
def rounds(tmp_path):
    """Folders of one model: dense, masked once, without those heads, and the latter masked and cut again."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZES, vocab_size=40)).eval()
    sites = unit_map(model)
    model.save_pretrained(tmp_path / "dense")
    save_pruned(model, HeadMask(sites, np.array([0, 0, 0, 0, 1, 0, 1, 1])), tmp_path / "masked")
    host.exports["compact"](tmp_path / "masked", tmp_path / "compact", None)
    model = host.load_model(tmp_path / "compact")
    save_pruned(model, HeadMask(unit_map(model), np.array([True, False, True])), tmp_path / "again")
    host.exports["compact"](tmp_path / "again", tmp_path / "smaller", None)
    return tmp_path


@pytest.mark.parametrize(
    ("first", "second", "both", "only_first", "only_second"),
    [
        ("compact", "again", [0, 3], [2], []),
        pytest.param("again", "masked", [0, 3], [], [2], marks=pytest.mark.slow),
        pytest.param("smaller", "masked", [0, 3], [], [2], marks=pytest.mark.slow),
        pytest.param("again", "smaller", [0, 3], [], [], marks=pytest.mark.slow),
        ("again/masks.safetensors", "compact/masks.safetensors", [0, 3], [], [2]),
        pytest.param("dense", "smaller", [0, 3], [1, 2], [], marks=pytest.mark.slow),
        ("compact", "dense", [0, 2, 3], [], [1]),
    ],
)
def test_diff_numbers_heads_as_in_the_original(rounds, first, second, both, only_first, only_second, capsys):
    main(["diff", str(rounds / first), str(rounds / second), "--json"])
    found = json.loads(capsys.readouterr().out)["sites"]
    site = found["bert.encoder.layer.1.attention"]
    assert site == {"both": both, "only_first": only_first, "only_second": only_second}
    assert found["bert.encoder.layer.0.attention"]["both"] == []


def test_heads_found_with_a_task_head_are_cut_from_the_base_and_back(rounds, tmp_path, capsys):
    whole = host.load_model(rounds / "dense")
    whole.bert.save_pretrained(tmp_path / "base")
    mask = HeadMask.load(rounds / "masked" / "masks.safetensors")
    base = mask.fitted(unit_map(whole.bert))
    assert set(base.by_site()) == {name.removeprefix("bert.") for name in mask.by_site()}
    base.save(tmp_path / "base.safetensors")
    ids = torch.arange(1, 13).reshape(2, 6)
    with head_mask(whole, base), torch.no_grad():
        expected = whole.bert(ids).last_hidden_state
    small = prune_heads(copy.deepcopy(whole.bert), mask)
    assert small.kept_heads() == base.kept_heads() == mask_heads(copy.deepcopy(whole.bert), mask).kept_heads()
    for model, file, read in (
        ("base", rounds / "masked" / "masks.safetensors", lambda model: model),
        ("dense", tmp_path / "base.safetensors", lambda model: model.bert),
    ):
        for format in ("compact", "masked"):
            main(["export", str(tmp_path / model), str(tmp_path / format), "--to", format, "--mask", str(file)])
            loaded = host.load(tmp_path / format)
            with torch.no_grad():
                found = read(loaded.model)(ids).last_hidden_state
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            assert kept_heads(loaded).kept == 3
        capsys.readouterr()
        main(["inspect", str(tmp_path / model), "--mask", str(file), "--length", "8", "--json"])
        told = json.loads(capsys.readouterr().out)
        assert [site["kept"] for site in told["sites"]] == [[], [0, 2, 3]] and told["mac_bound"] > 1
        assert all(site["site"].startswith("bert.") == (model == "dense") for site in told["sites"])
    main(["diff", str(rounds / "again"), str(tmp_path / "base.safetensors"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["sites"]["bert.encoder.layer.1.attention"] == {"both": [0, 3], "only_first": [], "only_second": [2]}
    assert (found["both"], found["only_second"]) == (2, 1)


def test_diff_of_models_that_lost_query_heads_or_weights(rounds, tmp_path, capsys):
    model = _llama()
    model.save_pretrained(tmp_path / "whole")
    remove_query_heads(model, {0: [0]}, expand=True)
    prune_heads(model, {1: [0]})
    save_pruned(model, HeadMask(unit_map(model), np.array([True, False, False, True])), tmp_path / "llama")
    main(["diff", str(tmp_path / "whole"), str(tmp_path / "llama"), "--json"])
    found = json.loads(capsys.readouterr().out)["sites"]
    assert [(site["both"], site["only_first"]) for site in found.values()] == [([0], [1]), ([1], [0])]
    dense = dict(host.load_model(rounds / "dense").named_parameters())
    write_weight_artifacts(
        rounds / "dense", {name: p != 0 for name, p in dense.items()}, dense, method="platon", options={}
    )
    main(["diff", str(rounds / "dense"), str(rounds / "compact"), "--json"])
    assert json.loads(capsys.readouterr().out)["kept"] == [8, 3]
    for pair in (("whole", "compact"), ("llama", "again")):
        with pytest.raises(SystemExit, match="another architecture"):
            main(["diff", *(str(tmp_path / folder) for folder in pair)])


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


def test_a_model_that_lacks_weights_is_refused(saved, tmp_path):
    """transformers would fill them with random numbers, each time others."""
    source = saved("gpt2")
    weights = load_file(source / "model.safetensors")
    lost = sorted(name for name in weights if ".h.1." in name)
    save_file({name: value for name, value in weights.items() if name not in lost}, source / "model.safetensors")
    words = rf"incomplete: {re.escape(lost[0])} is missing \(and {len(lost) - 1} more\); copy the model again"
    with pytest.raises(HeadPruningError, match=words):
        host.load(source)


def test_a_model_that_lacks_what_is_not_used_is_a_model(tmp_path, caplog):
    BertModel(BertConfig(**SIZES, vocab_size=40), add_pooling_layer=False).save_pretrained(tmp_path)
    assert host.load(tmp_path).mask is None
    assert caplog.messages == [
        f"{tmp_path} has no pooler.dense.bias, pooler.dense.weight, which keeps the numbers of a new model"
    ]


def test_a_file_of_a_model_is_not_replaced_by_an_export(saved, tmp_path):
    source, other = saved("gpt2"), tmp_path / "other"
    shutil.copytree(source, other)
    for target in (source / "model.safetensors", other / "config.json"):
        before = target.read_bytes()
        with pytest.raises(SystemExit, match=re.escape(f"{target} is part of the model in")):
            main(["export", str(source), str(target), "--to", "compressed"])
        assert target.read_bytes() == before
    for name in ("model.compressed.safetensors", "small.safetensors") * 2:  # its own files may be written anew
        main(["export", str(source), str(other / name), "--to", "compressed"])


def test_scores_of_the_model_that_was_there_go(saved, tmp_path):
    source, target = saved("gpt2"), tmp_path / "target"
    shutil.copytree(source, target)
    for name in ("all_results.json", "eval_results.json", "trainer_state.json", "notes.json"):
        (target / name).write_text("{}")
    host.exports["masked"](source, target, None)
    assert {path.name for path in target.glob("*.json")} >= {"notes.json", "pruning.json"}
    assert not [*target.glob("*_results.json"), *target.glob("trainer_state.json")]


def _files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


@pytest.mark.parametrize("to", ["compact", "masked"])
def test_of_a_folder_only_the_model_is_replaced(saved, tmp_path, to):
    folder = tmp_path / "run"
    mask = read_mask(saved("vit"))
    (tmp_path / "vit").rename(tmp_path / "moved")
    model = host.load_model(tmp_path / "moved")
    model.save_pretrained(folder, max_shard_size="5KB")
    shutil.copytree(tmp_path / "moved", folder / "best")
    assert (folder / "model.safetensors.index.json").exists()
    kept = {"checkpoint-5/model.safetensors", ".git/HEAD", "notes.txt", "data.safetensors", "vocab.txt"}
    for name in {*kept, "quantization.json", "pytorch_model.bin"}:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x", encoding="utf-8")
    inside = {f"best/{name}": (folder / "best" / name).read_bytes() for name in _files(folder / "best")}
    (tmp_path / "link").symlink_to(folder)
    main(["export", str(folder / "best"), str(tmp_path / "link"), "--to", to])
    assert (tmp_path / "link").is_symlink()
    assert all((folder / name).read_text(encoding="utf-8") == "x" for name in kept)
    assert all((folder / name).read_bytes() == data for name, data in inside.items())
    model = {"config.json", "model.safetensors", "masks.safetensors", "pruning.json", "head_mask.png", "README.md"}
    assert _files(folder) == {*kept, *inside, *model, *(["compact_heads.py"] if to == "compact" else [])}
    assert kept_heads(host.load(folder)) == mask


def test_a_tokenizer_of_several_chat_templates_is_saved_twice_and_exported(saved, tmp_path):
    source = saved("gpt2")
    model, mask = host.load_model(source), read_mask(source)
    words = Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    for more in ("more", "other"):
        tokenizer.chat_template = {"default": "{{messages}}", more: "{{messages}} of all"}
        shutil.rmtree(source / "additional_chat_templates", ignore_errors=True)
        for _ in range(2):
            save_pruned(model, mask, source, processing_class=tokenizer)
        host.exports["compact"](source, tmp_path / "out", None)
        assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
    (source / "qformer_tokenizer").mkdir()
    (source / "qformer_tokenizer" / "vocab.txt").write_text("x", encoding="utf-8")
    host.exports["masked"](source, tmp_path / "masked", None)
    assert (tmp_path / "masked" / "qformer_tokenizer" / "vocab.txt").exists()


def test_an_export_goes_into_the_folder_where_one_is_and_brings_its_tokenizer(saved, tmp_path, monkeypatch):
    source = saved("vit")
    (source / "vocab.txt").write_text("new", encoding="utf-8")
    (tmp_path / "out" / ".saving-of-a-killed-export").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "out")
    main(["export", str(source), ".", "--to", "compact"])
    assert kept_heads(host.load(tmp_path / "out")) == read_mask(source) and Path("config.json").exists()
    for name in ("vocab.txt", "merges.txt"):
        Path(name).write_text("of another tokenizer", encoding="utf-8")
    main(["export", str(source), ".", "--to", "masked"])
    assert Path("vocab.txt").read_text(encoding="utf-8") == "new" and not Path("merges.txt").exists()
    assert not Path("compact_heads.py").exists() and not list(Path().glob(".saving-*"))
    with pytest.raises(HeadPruningError, match="is the model itself"):
        run_export(Namespace(model=str(source), output=str(source), to="masked", int8=False, mask=None))


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


@pytest.mark.slow
def test_question_answering_runs_in_onnxruntime(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    model = BertForQuestionAnswering(BertConfig(**SIZES, vocab_size=40, max_position_embeddings=64))
    model.save_pretrained(tmp_path / "model")
    printed = host.exports["onnx"](tmp_path / "model", tmp_path / "model.onnx", None)
    assert float(printed.split()[-1]) < 1e-4
    names = [output.name for output in runtime.InferenceSession(tmp_path / "model.onnx").get_outputs()]
    assert names == ["start_logits", "end_logits"]
