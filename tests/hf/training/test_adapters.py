"""Adapters of PEFT: pruned models of them load, merge and are cut with what was pruned."""

import json
import shutil

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

import hf_plugin
from head_pruning import HeadMask, HeadPruningError, full_mask
from hf_plugin import (
    HeadPruningTrainer,
    load_pruned_peft,
    mask_heads,
    masked_heads,
    merge_and_cut,
    merge_pruned,
    open_session,
    prune_heads,
    pruned_heads,
    pruner,
    pruning_scheduler_factory,
    save_pruned,
    unit_map,
)
from tests.few import few
from tests.hf.tiny import arguments, collate, sentences, tiny_bert

DSP = {"num_of_heads": 3, "joint_pruning": True}
IDS = torch.arange(5, 11)[None]
TARGETS = {"attention": ["query", "value"], "outputs": ["query", "dense"]}


def adapted(base, targets="attention", **options):
    config = LoraConfig(target_modules=TARGETS[targets], r=2, init_lora_weights=False, **options)
    return get_peft_model(base, config).eval()


def outputs(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def close(one, other, atol=1e-5) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=atol)


@pytest.fixture(scope="module", params=TARGETS)
def trained(request, tmp_path_factory):
    """The folder of the base, that of the adapter as a pruning Trainer saves it, and what the pruned model gives."""
    root = tmp_path_factory.mktemp(request.param)
    tiny_bert(initializer_range=0.3).save_pretrained(root / "base")
    base = BertForSequenceClassification.from_pretrained(root / "base")
    model = adapted(base, request.param, task_type=TaskType.SEQ_CLS)
    trainer = HeadPruningTrainer(
        model=model,
        args=arguments(root / "run", max_steps=4, learning_rate=1e-2),
        train_dataset=sentences(16),
        data_collator=collate,
        pruners=[pruner("dsp", **DSP)],
    )
    trainer.train()
    trainer.save_model(str(root / "adapter"))
    model.eval()
    expected = outputs(model)
    mask = trainer.session.harden()
    trainer.session.detach()
    assert not torch.allclose(outputs(model), expected, atol=1e-3)
    return root, expected, mask


@pytest.mark.parametrize("given", [False, True])
def test_one_call_loads_adapter_and_mask(trained, given):
    root, expected, mask = trained
    base = BertForSequenceClassification.from_pretrained(root / "base") if given else None
    model = load_pruned_peft(root / "adapter", base)
    close(outputs(model), expected)
    assert masked_heads(model) == mask and masked_heads(model).kept == 3
    assert not any(parameter.requires_grad for parameter in model.parameters())
    plain = PeftModel.from_pretrained(BertForSequenceClassification.from_pretrained(root / "base"), root / "adapter")
    assert not torch.allclose(outputs(plain.eval()), expected, atol=1e-3)
    again = load_pruned_peft(root / "adapter", base if given is False else None, is_trainable=True)
    assert any(parameter.requires_grad for parameter in again.parameters())


def test_the_card_says_what_is_true(trained):
    root, _, _ = trained
    card = (root / "adapter" / "README.md").read_text()
    assert 'hf_plugin.load_pruned_peft("FOLDER")' in card and "weights of the removed heads are zero" not in card
    assert f"library_name: peft\nbase_model: {root / 'base'}\n" in card
    report = json.loads((root / "adapter" / "pruning.json").read_text())
    assert report["heads_kept"] == 3 and "zeros_of_all_parameters" not in report["sparsity"]  # no weight was zeroed


def test_merge_and_cut_saves_a_compact_folder(trained, tmp_path):
    root, expected, mask = trained
    merged = merge_and_cut(load_pruned_peft(root / "adapter"), tmp_path / "compact", method="dsp", options=DSP)
    close(outputs(merged.eval()), expected)
    assert pruned_heads(merged).kept == 3 and not hasattr(merged, "peft_config")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "compact").eval()
    close(outputs(loaded), expected)
    assert loaded.num_parameters() < BertForSequenceClassification.from_pretrained(root / "base").num_parameters()
    assert "cut out of the weights" in (tmp_path / "compact" / "README.md").read_text()
    base = BertForSequenceClassification.from_pretrained(root / "base")
    plain = PeftModel.from_pretrained(base, root / "adapter").eval()
    close(outputs(merge_and_cut(plain, mask=mask).eval()), expected)


def test_an_adapter_of_a_compact_model_is_merged_and_cut(tmp_path):
    base = tiny_bert(initializer_range=0.3).eval()
    prune_heads(base, {0: [1], 1: [0, 1]})
    base.save_pretrained(tmp_path / "small")
    model = adapted(BertForSequenceClassification.from_pretrained(tmp_path / "small"), task_type=TaskType.SEQ_CLS)
    sites = unit_map(model)
    mask = HeadMask(sites, np.arange(sites.num_heads) != 1)
    mask_heads(model, mask)
    expected = outputs(model)
    merged = merge_and_cut(model, tmp_path / "smaller").eval()
    close(outputs(merged), expected)
    left = pruned_heads(merged)
    assert left.kept == mask.kept and left.keep.size > sites.num_heads  # in the original's numbers
    close(outputs(BertForSequenceClassification.from_pretrained(tmp_path / "smaller").eval()), expected)


def test_merged_without_cutting_the_heads_stay_masked(trained, tmp_path):
    root, expected, mask = trained
    merged = merge_pruned(load_pruned_peft(root / "adapter"))
    close(outputs(merged), expected)
    assert masked_heads(merged).keep.tolist() == mask.keep.tolist()
    save_pruned(merged, masked_heads(merged), tmp_path)
    close(outputs(BertForSequenceClassification.from_pretrained(tmp_path).eval()), expected)


@pytest.mark.parametrize("cut", [False, True])
def test_what_is_merged_may_take_the_place_of_its_adapter(trained, tmp_path, cut):
    root, expected, _ = trained
    folder = tmp_path / "adapter"
    shutil.copytree(root / "adapter", folder)
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    model = load_pruned_peft(folder)
    if cut:
        merge_and_cut(model, folder)
    else:
        merged = merge_pruned(model)
        save_pruned(merged, masked_heads(merged), folder)
    loaded = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    close(outputs(loaded), expected)
    assert not list(folder.glob("adapter_*")) and (folder / "notes.txt").exists()


def test_shards_and_an_adapter_s_base_in_the_same_folder(tmp_path):
    model = tiny_bert(initializer_range=0.3).eval()
    mask = full_mask(unit_map(model))
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    save_pruned(model, mask, tmp_path)
    weights = {path.name for path in tmp_path.glob("model*")}
    assert weights == {"model.safetensors"}
    close(outputs(BertForSequenceClassification.from_pretrained(tmp_path).eval()), outputs(model))
    adapter = adapted(BertForSequenceClassification.from_pretrained(tmp_path), task_type=TaskType.SEQ_CLS)
    save_pruned(adapter, full_mask(unit_map(adapter)), tmp_path)
    assert {path.name for path in tmp_path.glob("model*")} == weights


def test_a_merge_keeps_the_zeros_of_the_base_model():
    model = tiny_bert()
    with torch.no_grad():
        for parameter in model.bert.encoder.parameters():
            if parameter.dim() == 2:
                parameter[torch.rand_like(parameter) < 0.5] = 0
    zeros = {name: value == 0 for name, value in model.bert.encoder.named_parameters() if value.dim() == 2}
    plain, kept = (merge(adapted(tiny_copy(model))) for merge in (lambda m: m.merge_and_unload(), merge_pruned))
    less = merge_pruned(adapted(tiny_copy(model)), keep_zeros=False)
    for name, zero in zeros.items():
        found, expected = kept.bert.encoder.get_parameter(name), plain.bert.encoder.get_parameter(name)
        assert torch.equal(found, expected.masked_fill(zero, 0)) and torch.equal(found == 0, zero)
        assert torch.equal(less.bert.encoder.get_parameter(name), expected)
    query = "layer.0.attention.self.query.weight"
    assert plain.bert.encoder.get_parameter(query).all() and not kept.bert.encoder.get_parameter(query).all()


def tiny_copy(model):
    copy = tiny_bert()
    copy.load_state_dict(model.state_dict())
    return copy


def test_other_adapters_and_bases_without_a_name(tmp_path):
    base = tiny_bert(initializer_range=0.3)
    ia3 = IA3Config(target_modules=["key", "output.dense"], feedforward_modules=["output.dense"])
    model = get_peft_model(base, ia3).eval()
    mask = mask_heads(model, {0: [1], 1: [0, 2]})
    expected = outputs(model)
    save_pruned(model, mask, tmp_path / "adapter")
    assert 'load_pruned_peft("FOLDER", base_model)' in (tmp_path / "adapter" / "README.md").read_text()
    with pytest.raises(HeadPruningError, match=r"does not name its base model; .* load_pruned_peft\(folder, model\)"):
        load_pruned_peft(tmp_path / "adapter")
    again = load_pruned_peft(tmp_path / "adapter", tiny_bert(initializer_range=0.3))
    close(outputs(again), expected)
    close(outputs(merge_and_cut(again)), expected)


def test_what_cannot_be_loaded_or_merged_is_refused(trained, tmp_path):
    root, _, mask = trained
    with pytest.raises(HeadPruningError, match="holds no adapter"):
        load_pruned_peft(root / "base")
    adapted(tiny_bert()).save_pretrained(tmp_path)
    with pytest.raises(HeadPruningError, match="no masks.safetensors, .* PeftModel.from_pretrained"):
        load_pruned_peft(tmp_path, tiny_bert())
    with pytest.raises(HeadPruningError, match="another architecture"):
        load_pruned_peft(root / "adapter", tiny_bert(num_hidden_layers=3))
    with pytest.raises(HeadPruningError, match="no adapters that can be merged"):
        merge_pruned(tiny_bert())
    prefix = PrefixTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=2)
    with pytest.raises(HeadPruningError, match="no adapters that can be merged"):
        merge_and_cut(get_peft_model(tiny_bert(), prefix))
    model = adapted(tiny_bert())
    with pytest.raises(HeadPruningError, match="keeps all heads, so nothing can be cut out; pass mask="):
        merge_and_cut(model)
    session = open_session(model, [pruner("dsp", **DSP)])
    with pytest.raises(HeadPruningError, match=r"gated; keep its mask .*harden.*, detach\(\) the session"):
        merge_and_cut(model, mask=session.head_mask())
    session.detach()
    assert hasattr(model, "peft_config")
    with pytest.raises(HeadPruningError, match="call merge_and_unload first .* or hf_plugin.merge_and_cut"):
        hf_plugin.prune_heads(model, {0: [1]})


# -- weights ---------------------------------------------------------------------------------------------------------


def sparse(share: float = 0.5):
    model = tiny_bert(initializer_range=0.3)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.bert.encoder.parameters():
            if parameter.dim() == 2:
                parameter[torch.rand_like(parameter) < share] = 0
    return model


def train(model, folder, *pruners, **options):
    trainer = HeadPruningTrainer(
        model=model,
        args=arguments(folder / "run", **{"max_steps": 4, "learning_rate": 1e-2, **options}),
        train_dataset=sentences(16),
        data_collator=collate,
        pruners=list(pruners),
    )
    trainer.train()
    return trainer


def test_lock_keeps_the_zeros_under_adapters(tmp_path):
    sparse().save_pretrained(tmp_path / "base")
    base = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(target_modules=["query"], r=2, task_type=TaskType.SEQ_CLS))
    zeros = {name: value == 0 for name, value in model.named_parameters() if value.dim() == 2 and ".layer." in name}
    zeros = {name: zero for name, zero in zeros.items() if "lora_" not in name}
    trainer = train(model, tmp_path, pruner("lock"))
    masks = trainer.session.weight_masks()
    assert {name for name in masks if not name.endswith("bias")} == set(zeros)
    assert all(torch.equal(~masks[name], zero) for name, zero in zeros.items())
    trained = [value for name, value in model.named_parameters() if "lora_B" in name]
    assert trained and all(value.any() for value in trained)  # B starts at zero, which is no pruning
    trainer.save_model(str(tmp_path / "adapter"))
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "library_name: peft" in card and "`hf_plugin.merge_pruned`" in card
    trainer.session.detach()
    model.eval()
    loaded = load_pruned_peft(tmp_path / "adapter")
    close(outputs(loaded), outputs(model))
    merged = merge_pruned(loaded)
    for name, zero in zeros.items():
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert torch.equal(merged.get_parameter(name) == 0, zero)


def test_a_configuration_locks_what_is_under_adapters():
    model = get_peft_model(sparse(), LoraConfig(target_modules=["query"], r=2, task_type=TaskType.SEQ_CLS))
    scheduler = pruning_scheduler_factory(model, "lock_config.json")
    masks = scheduler.session.weight_masks()
    assert len(masks) == 12 and not any("lora_" in name for name in masks)
    assert sum("query.base_layer.weight" in name for name in masks) == 2
    scheduler.remove_pruning()


@pytest.mark.parametrize("name", few(["platon", "magnitude", "movement"], "movement"))
def test_weights_under_adapters_are_not_pruned_unnoticed(tmp_path, caplog, name):
    options = {"final_threshold": 0.5, "warmup_steps": 2, "initial_warmup": 0, "final_warmup": 1}
    model = adapted(tiny_bert())
    before = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(HeadPruningError, match="frozen under adapters; merge the adapters into it and unfreeze"):
        open_session(model, [pruner(name, **options)])
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    caplog.set_level("WARNING")
    trainer = train(model, tmp_path, pruner(name, weights_include="lora_", **options))
    tensors = sum("lora_" in each for each, _ in model.named_parameters())
    assert f"{tensors} of {tensors} pruned tensors are of adapters" in caplog.text
    assert all(".lora_" in each for each in trainer.session.weight_masks())
    open_session(adapted(tiny_bert()).merge_and_unload().requires_grad_(True), [pruner(name, **options)]).detach()
