"""Compact models are saved and loaded the way people load models, with this package and without it."""

import copy
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForSequenceClassification,
    BertTokenizerFast,
    PreTrainedModel,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
    pipeline,
)

import hf_plugin
from head_pruning import HeadMask, HeadPruningError
from head_pruning.masks import full_mask, mask_without
from head_pruning.surgery.remaining import heads_left, recipe_of
from head_pruning.surgery.removal import remove_heads
from hf_plugin import mark_compact, save_compact, save_pruned, unit_map
from hf_plugin.compact import model_classes
from hf_plugin.compact.model_classes import CORE, CompactModel, auto_map
from hf_plugin.compact.quantizer import HeadPruningConfig
from hf_plugin.heads.masking import mask_heads
from hf_plugin.heads.pruning import prune_heads
from tests.hf import few_models
from tests.hf.families import FAMILIES
from tests.hf.tiny import arguments, collate, sentences, tiny_bert

ROOT = Path(__file__).parents[3]
AUTO = {
    "bert": "AutoModelForSequenceClassification",
    "gpt2": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",
    "olmo2": "AutoModelForCausalLM",
    "prophetnet": "AutoModelForSeq2SeqLM",
    "t5": "AutoModelForSeq2SeqLM",
    "vit": "AutoModelForImageClassification",
}
CODE = "compact_heads.py"


def dense(name):
    if name in few_models.MODELS:
        return few_models.make(name)
    torch.manual_seed(7)
    if name != "vit":
        sizes = next(family.overrides for family in FAMILIES if family.name == name)
        model = (
            getattr(transformers, AUTO[name]).from_config(AutoConfig.for_model(name, **copy.deepcopy(sizes))).eval()
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, initializer_range=0.3)).eval()


def inputs(name):
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))}
    targets = AUTO[name] == "AutoModelForSeq2SeqLM"
    return {key: value for key, value in few_models.batch_of(name).items() if targets or key != "labels"}


def outputs(model, name):
    with torch.no_grad():
        return model(**inputs(name)).logits


def uneven(units):
    """Without head 0 of every site, heads 0 and 2 of the first, and all heads of the last."""
    removed = {site.name: [0] for site in units.attention}
    first, last = units.attention[0], units.attention[-1]
    removed[first.name] = [0, 2] if first.heads > 2 else [1]
    return mask_without(units, {**removed, last.name: range(last.heads)})


def cut(name):
    model = dense(name)
    units = unit_map(model)
    remove_heads(model, units, (first_layers if name == "t5" else uneven)(units))
    if name == "gpt2":  # units of feed-forward blocks, too: one block loses all
        blocks = unit_map(model).numbering("ffn")
        remove_heads(model, blocks, HeadMask(blocks, np.arange(blocks.num_heads) >= 50))
    return model


def first_layers(units):
    """Without all heads of the first layers, which make the position bias of T5, and head 0 of the others."""
    firsts = {next(site for site in units.attention if site.kind == kind) for kind in units.kinds()}
    return mask_without(units, {site.name: range(site.heads) if site in firsts else [0] for site in units.attention})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders that plain ``save_pretrained`` wrote, each with its model's outputs."""
    root = tmp_path_factory.mktemp("compact")
    for name in AUTO:
        model = cut(name)
        model.save_pretrained(root / name)
        save_file({**inputs(name), "want": outputs(model, name)}, root / f"{name}.safetensors")
    return root


@pytest.fixture
def bert(folders):
    return AutoModelForSequenceClassification.from_pretrained(folders / "bert")


def difference(one, other, name="bert"):
    return float((outputs(one, name) - outputs(other, name)).abs().max())


def reload(model, folder):
    model.save_pretrained(folder)
    return AutoModelForSequenceClassification.from_pretrained(folder)


def test_no_other_model_is_imported_to_save_one(monkeypatch):
    everything = lambda mapping: pytest.fail("every model of transformers was imported")  # noqa: E731
    monkeypatch.setattr("transformers.models.auto.auto_factory._LazyAutoMapping.keys", everything)
    assert auto_map(dense("bert"))["AutoModel"] == "compact_heads.BertModel"


# -- in a fresh process --------------------------------------------------------------------------------------------

MEASURE = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
root, names = Path(sys.argv[1]), json.loads(sys.argv[2])
found = {}

def difference(model, name):
    tensors = load_file(root / f"{name}.safetensors")
    want = tensors.pop("want")
    with torch.no_grad():
        return float((model(**tensors).logits - want).abs().max())
"""
WITH_PACKAGE = (
    """
import hf_plugin
"""
    + MEASURE
    + """
import transformers
from safetensors.torch import load_file
for name, auto in names.items():
    model = getattr(transformers, auto).from_pretrained(root / name)
    found[name] = [type(model).__name__, difference(model, name)]
    try:  # there is no hub here; what would have gone there lies in the folder
        (root / name / "compact_heads.py").unlink()
        model._upload_modified_files(root / name, "someone/model", {})
    except Exception as error:
        found[name].append((root / name / "compact_heads.py").is_file())
print("FOUND", json.dumps(found))
"""
)
WITHOUT_PACKAGE = (
    """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("head_pruning", "hf_plugin", "fairseq_plugin"):
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Missing())
try:
    import head_pruning
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the package can still be imported")
"""
    + MEASURE
    + """
import importlib.util
import transformers
from safetensors.torch import load_file
for name, auto in names.items():
    auto = getattr(transformers, auto)
    try:
        auto.from_pretrained(root / name)
        found[f"{name} plain"] = "loaded"
    except (RuntimeError, ValueError) as error:
        found[f"{name} plain"] = type(error).__name__
    model = auto.from_pretrained(root / name, trust_remote_code=True)
    model.save_pretrained(root / f"{name}-again")
    again = auto.from_pretrained(root / f"{name}-again", trust_remote_code=True)
    base = transformers.AutoModel.from_pretrained(root / name, trust_remote_code=True)
    half = type(model).from_pretrained(root / name, dtype=torch.bfloat16)
    found[name] = [type(model).__name__, difference(model, name), difference(again, name), type(base).__name__]
    found[name].append(str(half.dtype))
if importlib.util.find_spec("torchao"):
    from torchao.quantization import Int8WeightOnlyConfig
    # The layer without heads has an empty output projection, which torchao cannot take.
    skipped = ["lm_head", "model.layers.1.self_attn.o_proj"]
    scheme = transformers.TorchAoConfig(Int8WeightOnlyConfig(version=2), modules_to_not_convert=skipped)
    auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(root / "llama", trust_remote_code=True, quantization_config=scheme)
    model.save_pretrained(root / "llama-int8")
    again = auto.from_pretrained(root / "llama-int8", trust_remote_code=True)
    weight = again.model.layers[0].self_attn.q_proj.weight
    tensors = load_file(root / "llama.safetensors")
    tensors.pop("want")
    with torch.no_grad():
        same = float((model(**tensors).logits - again(**tensors).logits).abs().max())
    found["int8"] = [difference(model, "llama"), same, type(weight).__name__, list(weight.shape)]
print("FOUND", json.dumps(found))
"""
)


def fresh_process(code, root, cwd, *flags):
    modules = {"HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, *flags, "-c", code, str(root), json.dumps(AUTO)],
        cwd=cwd,
        env={**os.environ, **modules},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("FOUND ")]
    return json.loads(line.removeprefix("FOUND "))


@pytest.mark.slow
def test_loads_after_one_import(folders, tmp_path):
    found = fresh_process(WITH_PACKAGE, folders, ROOT)
    assert {name: values[1] for name, values in found.items()} == pytest.approx(dict.fromkeys(AUTO, 0.0), abs=1e-6)
    assert all(values[0] == type(dense(name)).__name__ and values[2] for name, values in found.items())


def test_loads_where_the_package_is_not_installed(folders, tmp_path):
    found = fresh_process(WITHOUT_PACKAGE, folders, tmp_path, "-I")
    for name in AUTO:
        kind, first, again, base, dtype = found[name]
        assert (kind, dtype) == (type(dense(name)).__name__, "torch.bfloat16")
        assert max(first, again) < 1e-6 and base == type(AutoModel.from_config(dense(name).config)).__name__
        assert found[f"{name} plain"] != "loaded"  # and not a wrong model
        config, saved = (
            json.loads((folders / folder / "config.json").read_text()) for folder in (name, f"{name}-again")
        )
        assert config == saved
    if "int8" in found:
        from_dense, from_file, kind, shape = found["int8"]
        assert 0 < from_dense < 0.2 and from_file == 0 and kind != "Parameter" and shape == [8, 16]


# -- what lies in the folder ---------------------------------------------------------------------------------------


def test_the_folder_holds_all_that_a_push_needs(folders, tmp_path):
    config = json.loads((folders / "bert" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "head_pruning"
    assert {name: reference.partition(".")[0] for name, reference in config["auto_map"].items()} == dict.fromkeys(
        config["auto_map"], "compact_heads"
    )
    assert {"AutoModel", "AutoModelForMaskedLM", "AutoModelForSequenceClassification"} <= set(config["auto_map"])
    code = (folders / "bert" / CODE).read_text()
    compile(code, CODE, "exec")
    assert sorted(path.name for path in (folders / "bert").iterdir()) == [CODE, "config.json", "model.safetensors"]


def test_config_in_memory_is_that_of_the_original(folders, bert):
    before, after = dense("bert").config.to_diff_dict(), bert.config.to_diff_dict()
    ignored = ("architectures", "dtype", "_name_or_path", "problem_type")
    assert {k: v for k, v in after.items() if k not in ignored} == {
        k: v for k, v in before.items() if k not in ignored
    }
    assert not getattr(bert, "is_quantized", False) and not hasattr(bert, "quantization_method")
    assert heads_left(type(bert)(bert.config)) is None  # a new model of that config is dense


def test_save_compact_tells_the_heads_of_the_original(folders, tmp_path):
    model, tokenizer = cut("bert"), words(tmp_path)
    save_compact(model, tmp_path / "out", processing_class=tokenizer, method="dsp", scores={"accuracy": 0.5})
    expected = {CODE, "config.json", "head_mask.png", "masks.safetensors", "model.safetensors", "pruning.json"}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert expected | {"README.md", "tokenizer.json"} <= names and not any(name.startswith(".") for name in names)
    mask = uneven(unit_map(dense("bert")))
    assert HeadMask.load(tmp_path / "out" / "masks.safetensors") == mask
    report = json.loads((tmp_path / "out" / "pruning.json").read_text())
    before = sum(parameter.numel() for parameter in dense("bert").parameters())
    after = sum(parameter.numel() for parameter in model.parameters())
    assert report["kept_heads_by_site"] == mask.kept_heads()
    assert (report["sparsity"]["parameters"], report["sparsity"]["compact_parameters"]) == (before, after)
    assert after < before
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{before:,}" in card and f"{after:,}" in card and "0.5000" in card
    (line,) = [line for line in card.splitlines() if ".from_pretrained(" in line]
    assert line.startswith("model = AutoModelForSequenceClassification.") and "trust_remote_code=True" in line
    assert difference(AutoModelForSequenceClassification.from_pretrained(tmp_path / "out"), model) == 0


def test_save_compact_wants_a_cut_model(tmp_path):
    with pytest.raises(HeadPruningError, match="No heads were cut out"):
        save_compact(dense("bert"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_with_all_heads_is_left_alone(tmp_path):
    model = dense("bert")
    mark_compact(model)
    assert type(model) is BertForSequenceClassification
    model.save_pretrained(tmp_path)
    assert not (tmp_path / CODE).exists()
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


# -- ways to load --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trust", [None, True])
def test_loads_with_every_auto_class(folders, trust):
    for name in ("bert", "t5"):
        for auto in auto_map(dense(name)):
            options = {"trust_remote_code": trust, "ignore_mismatched_sizes": True}  # of new task heads
            model = getattr(transformers, auto).from_pretrained(folders / name, **options)
            assert isinstance(model, getattr(transformers, type(model).__name__))
            assert (
                isinstance(model, CompactModel) != bool(trust) and heads_left(model).kept < heads_left(model).keep.size
            )


@pytest.mark.parametrize("trust", [None, True])
def test_names_with_and_without_the_base_models_prefix(folders, tmp_path, trust):
    whole = AutoModelForSequenceClassification.from_pretrained(folders / "bert", trust_remote_code=trust)
    base = AutoModel.from_pretrained(folders / "bert", trust_remote_code=trust)
    assert heads_left(base).by_site() == {
        name.removeprefix("bert."): keep for name, keep in heads_left(whole).by_site().items()
    }
    base.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=trust)
    assert heads_left(again) == heads_left(whole)
    batch = inputs("bert")
    with torch.no_grad():
        wanted = whole.bert(**batch, output_hidden_states=True).hidden_states
        for model in (base, again.bert):
            found = model(**batch, output_hidden_states=True).hidden_states
            assert len(found) == 3 and all(torch.equal(one, other) for one, other in zip(found, wanted))


def test_part_of_a_sequence_model(folders):
    encoder = transformers.T5EncoderModel.from_pretrained(folders / "t5")
    assert set(heads_left(encoder).kept_heads()) == {f"encoder.block.{i}.layer.0.SelfAttention" for i in range(2)}


@pytest.mark.parametrize(
    "options", [{"dtype": "auto"}, {"device_map": "cpu"}, {"device_map": "auto"}, {"low_cpu_mem_usage": True}]
)
@pytest.mark.parametrize("trust", [None, True])
def test_loading_options(folders, bert, options, trust):
    loaded = AutoModelForSequenceClassification.from_pretrained(folders / "bert", trust_remote_code=trust, **options)
    assert difference(loaded, bert) == 0


def test_dtypes(folders, bert, tmp_path):
    assert bert.half().dtype == torch.float16 and bert.to(torch.bfloat16).dtype == torch.bfloat16
    loaded = AutoModelForSequenceClassification.from_pretrained(folders / "bert", dtype=torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for parameter in loaded.parameters())
    assert reload(loaded, tmp_path).dtype == torch.bfloat16


def test_saved_again_it_is_the_same(folders, bert, tmp_path):
    again = reload(bert, tmp_path)
    assert difference(again, bert) == 0
    for name in ("config.json", CODE):
        assert (tmp_path / name).read_text() == (folders / "bert" / name).read_text()


def test_copies_and_pickles(bert, tmp_path):
    for twin in (copy.deepcopy(bert), pickle.loads(pickle.dumps(bert))):
        assert type(twin) is type(bert) and difference(reload(twin, tmp_path), bert) == 0


class OwnBert(BertForSequenceClassification):
    """A class that transformers does not have."""


def test_a_class_that_is_not_of_transformers(folders, bert, tmp_path):
    loaded = OwnBert.from_pretrained(folders / "bert")
    assert isinstance(loaded, OwnBert) and difference(loaded, bert) == 0
    loaded.save_pretrained(tmp_path)
    assert not (tmp_path / CODE).exists()  # elsewhere its code would be missing
    assert difference(OwnBert.from_pretrained(tmp_path), bert) == 0


# -- refused -------------------------------------------------------------------------------------------------------


def damaged(folders, tmp_path, change):
    config = json.loads((folders / "bert" / "config.json").read_text())
    recipe = config["quantization_config"]["recipe"]
    change(recipe, recipe["sites"]["bert.encoder.layer.0.attention"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("model.safetensors", CODE):
        (tmp_path / name).symlink_to(folders / "bert" / name)


@pytest.mark.parametrize("trust", [None, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda recipe, site: recipe.clear(),
        lambda recipe, site: recipe.update(version=99),
        lambda recipe, site: recipe.update(sites=[1, 2]),
        lambda recipe, site: recipe["sites"].update({"bert.nowhere": site}),
        lambda recipe, site: site.pop("kept"),
        lambda recipe, site: site.update(kept=[0, 99]),
        lambda recipe, site: site.update(kept=[1, 1]),
        lambda recipe, site: site.update(kept="all"),
        lambda recipe, site: site.update(heads=5),
        lambda recipe, site: site["tensors"][0].__setitem__(0, "bert.encoder.nothing.weight"),
        lambda recipe, site: site["tensors"][0].__setitem__(1, 7),
        lambda recipe, site: site.update(heads=800_000_000),
        lambda recipe, site: (site.update(heads=10**5), recipe["unit_map"]["attention"][0].update(heads=10**5)),
        lambda recipe, site: recipe["unit_map"]["attention"][1].update(head_dim=10**8),
        lambda recipe, site: site.update(counts=[["bert.encoder.forward", 1]]),
        lambda recipe, site: site.update(counts=[["bert.encoder.layer.0.attention.self.num_attention_heads", "x"]]),
        lambda recipe, site: site["hooks"].append(["select", "bert", {"argument": 5}]),
    ],
)
def test_a_damaged_recipe_is_one_clear_sentence(folders, tmp_path, change, trust):
    damaged(folders, tmp_path, change)
    with pytest.raises(ValueError, match="^The recipe of removed heads in config.json is damaged or not made for"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=trust)


def test_experts_and_layers_of_a_recipe_are_found_again(tmp_path):
    """A mixture of experts, in a class with other names than the one that was saved."""
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 4,
    }
    config = transformers.MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=2, vocab_size=30)
    model = transformers.MixtralForCausalLM(config).eval()
    prune_heads(model, {0: [0], 1: [0, 1]})
    save_compact(model, tmp_path)
    tokens = torch.arange(6).view(1, 6)
    for auto in (AutoModelForCausalLM, AutoModel):
        loaded = auto.from_pretrained(tmp_path)
        base = getattr(loaded, "model", loaded)
        assert torch.equal(base(tokens)[0], model.model(tokens)[0])
        assert len(recipe_of(loaded)["unit_map"]["experts"]) == 2


def test_no_recipe_at_all(folders, tmp_path):
    config = json.loads((folders / "bert" / "config.json").read_text())
    del config["quantization_config"]["recipe"]
    damaged(folders, tmp_path, lambda recipe, site: None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(HeadPruningError, match="^The recipe of removed heads in config.json is damaged"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_quantizing_while_loading_needs_the_remote_code(folders, tmp_path):
    scheme = transformers.FineGrainedFP8Config()
    with pytest.raises(ValueError, match="quantized with HeadPruningConfig but you are passing"):
        AutoModelForSequenceClassification.from_pretrained(folders / "bert", quantization_config=scheme)


def test_heads_are_not_removed_while_a_dense_checkpoint_loads(tmp_path, bert):
    dense("bert").save_pretrained(tmp_path)
    with pytest.raises(HeadPruningError, match="cannot be removed while a checkpoint loads"):
        AutoModelForSequenceClassification.from_pretrained(
            tmp_path, quantization_config=HeadPruningConfig(bert._removed_heads)
        )


def test_recipe_beside_another_quantization(folders, bert, tmp_path):
    """A quantized compact model keeps its recipe outside of the quantization's config."""
    bert.config.quantization_config = {"quant_method": "other", "bits": 8}
    bert.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "other", "bits": 8}
    assert config["removed_heads"]["sites"].keys() == bert._removed_heads["sites"].keys()
    assert bert.config.quantization_config == {"quant_method": "other", "bits": 8}
    assert not hasattr(bert.config, "removed_heads")


# -- work on a loaded model ----------------------------------------------------------------------------------------


def words(folder):
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]))
    return BertTokenizerFast(str(vocabulary))


@pytest.fixture
def small(tmp_path):
    """A loaded compact model of the classifier that can learn."""
    model = tiny_bert()
    remove_heads(model, unit_map(model), mask_without(unit_map(model), {"bert.encoder.layer.0.attention": [1, 3]}))
    return reload(model, tmp_path / "small")


def test_trainer_trains_saves_and_resumes(small, tmp_path):
    before = copy.deepcopy(small)
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    trainer = Trainer(
        small, arguments(tmp_path / "run", **options), train_dataset=sentences(40), data_collator=collate
    )
    trainer.train()
    assert not torch.equal(small.classifier.weight, before.classifier.weight)
    query = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(small.get_parameter(query), before.get_parameter(query))
    trainer.save_model(tmp_path / "saved")
    for folder in (tmp_path / "saved", tmp_path / "run" / "checkpoint-8"):
        loaded = AutoModelForSequenceClassification.from_pretrained(folder)
        assert all(torch.equal(one, other) for one, other in zip(loaded.parameters(), small.parameters()))
    resumed = Trainer(
        before, arguments(tmp_path / "run", **options), train_dataset=sentences(40), data_collator=collate
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert resumed.state.global_step == 8
    for one, other in zip(before.parameters(), small.parameters()):
        # Bit-equal; only transformers 5.0 resumes no loaded model so, dense or compact.
        torch.testing.assert_close(one, other, atol=0.005 if transformers.__version__ < "5.1" else 0, rtol=0)


def test_prune_a_pruned_model_again(small, tmp_path):
    trainer = hf_plugin.HeadPruningTrainer(
        model=small,
        args=arguments(tmp_path / "run"),
        train_dataset=sentences(40),
        data_collator=collate,
        pruners=[hf_plugin.pruner("dsp", num_of_heads=3, joint_pruning=True)],
    )
    trainer.train()
    trainer.save_model(tmp_path / "masked")
    mask = trainer.head_mask
    assert (mask.kept, mask.keep.size) == (3, 6)
    masked = AutoModelForSequenceClassification.from_pretrained(tmp_path / "masked")
    assert heads_left(masked).kept == 6
    trainer.session.detach()
    remove_heads(small, unit_map(small), mask)
    assert heads_left(small).kept == 3
    batch = collate(sentences(4, seed=1))
    save_compact(small, tmp_path / "twice")
    twice = AutoModelForSequenceClassification.from_pretrained(tmp_path / "twice")
    with torch.no_grad():
        small.eval()
        assert torch.equal(twice(**batch).logits, small(**batch).logits)
        torch.testing.assert_close(twice(**batch).logits, masked(**batch).logits, atol=1e-5, rtol=0)
    again = HeadMask.load(tmp_path / "twice" / "masks.safetensors")
    assert again == heads_left(twice) and again.keep.size == 8 and again.kept == 3
    assert not again.by_site()["bert.encoder.layer.0.attention"][1]


def test_a_model_whose_layers_share_heads_is_told_to_need_its_mask(tmp_path, caplog):
    model = tiny_bert()
    one, other = (f"bert.encoder.layer.{layer}.attention.output.dense.weight" for layer in (0, 1))
    model.get_submodule(other.rpartition(".")[0]).weight = model.get_parameter(one)
    model._tied_weights_keys = {other: one}
    units = unit_map(model)
    save_pruned(model, mask_without(units, {site.name: [0] for site in units.attention[:2]}), tmp_path / "alike")
    assert not caplog.records
    save_pruned(model, mask_without(units, {units.attention[0].name: [0]}), tmp_path / "apart")
    assert "share their output projection" in caplog.text and "--to compact" in caplog.text


def test_masked_export_of_a_compact_model(small, tmp_path):
    units = unit_map(small)
    save_pruned(small, mask_without(units, {units.attention[1].name: [0]}), tmp_path / "masked")
    assert heads_left(AutoModelForSequenceClassification.from_pretrained(tmp_path / "masked")).kept == 6
    card = (tmp_path / "masked" / "README.md").read_text()
    assert "needs no other package" not in card and "trust_remote_code=True" in card
    save_pruned(tiny_bert(), full_mask(unit_map(tiny_bert())), tmp_path / "plain")
    assert "needs no other package" in (tmp_path / "plain" / "README.md").read_text()


def test_adapters_on_a_loaded_model(folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders / "llama")
    whole = copy.deepcopy(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    adapted(**few_models.batch_of("llama")).loss.backward()
    adapted.eval().save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / CODE).exists()
    from peft import PeftModel

    again = PeftModel.from_pretrained(whole, tmp_path / "adapter").eval()
    assert difference(again, adapted, "llama") < 1e-6
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert difference(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), again, "llama") < 1e-5


def test_generate_with_a_cache(folders):
    llama = AutoModelForCausalLM.from_pretrained(folders / "llama")
    t5 = AutoModelForSeq2SeqLM.from_pretrained(folders / "t5")
    for model, more in ((llama, {}), (t5, {"num_beams": 3})):
        ids = few_models.batch_of("llama")["input_ids"]
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **more}
        cached = model.generate(ids, use_cache=True, **options)
        assert cached.shape[1] >= 6 and torch.equal(cached, model.generate(ids, use_cache=False, **options))


def test_emptied_layers_that_make_the_position_bias(folders, tmp_path):
    """Both routes, copies, pickles, generation, and pruned again."""
    mask = heads_left(cut("t5"))
    twin = dense("t5")
    mask_heads(twin, mask)
    loaded = [AutoModelForSeq2SeqLM.from_pretrained(folders / "t5", **o) for o in ({}, {"trust_remote_code": True})]
    for model in (*loaded, copy.deepcopy(loaded[0]), pickle.loads(pickle.dumps(loaded[0]))):
        assert difference(model, twin, "t5") < 1e-5
        first = model.decoder.block[0].layer[0].SelfAttention
        names = {name for name, parameter in first.named_parameters() if parameter.numel()}
        assert type(first).__name__ == "NoHeads" and names == {"relative_attention_bias.weight"}
        for more in ({}, {"num_beams": 3}):
            found, expected = (
                each.generate(few_models.batch_of("t5")["input_ids"], max_new_tokens=8, do_sample=False, **more)
                for each in (model, twin)
            )
            assert torch.equal(found, expected)
    other = copy.deepcopy(loaded[0])
    with torch.no_grad():
        other.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.mul_(-1)
    assert difference(loaded[0], twin, "t5") < 1e-5 and difference(other, twin, "t5") > 1e-3
    again = {site.name: [1] for site in mask.unit_map.attention}
    for model in loaded:
        kept = prune_heads(model, again)
        model.save_pretrained(tmp_path)
        mask_heads(twin, again)
        assert kept == mask_without(mask.unit_map, again, mask)
        for each in (model, AutoModelForSeq2SeqLM.from_pretrained(tmp_path)):
            assert difference(each, twin, "t5") < 1e-5


def test_pipelines(tmp_path):
    model, tokenizer = tiny_bert(), words(tmp_path)
    remove_heads(model, unit_map(model), uneven(unit_map(model)))
    save_compact(model, tmp_path / "out", processing_class=tokenizer)
    text = "a b c"
    with torch.no_grad():
        wanted = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1).max()
    for options in ({}, {"trust_remote_code": True}):
        (found,) = pipeline("text-classification", model=str(tmp_path / "out"), device="cpu", **options)(text)
        assert found["score"] == pytest.approx(float(wanted), abs=1e-6)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    (found,) = pipeline("text-classification", model=loaded, tokenizer=tokenizer, device="cpu")(text)
    assert found["score"] == pytest.approx(float(wanted), abs=1e-6)


def test_new_task_heads_train(folders, tmp_path):
    for auto in (AutoModelForTokenClassification, AutoModelForQuestionAnswering):
        model = auto.from_pretrained(folders / "bert")
        out = model(**inputs("bert"))
        (out[0].float().sum()).backward()
        model.save_pretrained(tmp_path / auto.__name__)
        assert isinstance(auto.from_pretrained(tmp_path / auto.__name__), PreTrainedModel)


def test_code_that_travels_is_what_is_tested_here(folders):
    """The travelling file is the files of the package and nothing else."""
    code = (folders / "bert" / CODE).read_text().splitlines()
    files = [*(ROOT / "head_pruning" / "compact" / f"{name}.py" for name in CORE), ROOT / model_classes.__file__]
    lines = [line for path in files for line in path.read_text().splitlines() if line.strip()]
    missing = [line for line in lines if line not in code]
    assert missing and all(re.match(r"from (\.\w+|head_pruning\.compact) import", line) for line in missing)
    assert not set(code) - set(lines) - {""}
