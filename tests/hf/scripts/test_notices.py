"""Every way to a file of a gated or masked model says once what the file lacks, and what to call instead."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_model
from transformers import BertForSequenceClassification, Trainer
from transformers.utils import hub

from hf_plugin import (
    HeadPruningCallback,
    head_mask,
    mask_heads,
    open_session,
    prune_heads,
    pruner,
    restore_heads,
    save_pruned,
)
from tests.hf.tiny import arguments, collate, sentences, tiny_bert

WORD = "the state dict of this"
DSP = {"num_of_heads": 3, "joint_pruning": True}


def push(model, folder, monkeypatch):
    """push_to_hub as far as it goes without a hub."""
    repository = SimpleNamespace(repo_id="someone/something")
    monkeypatch.setattr(HfApi, "create_repo", lambda *args, **options: repository)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **options: ModelCard("---\ntags: []\n---\n"))
    monkeypatch.setattr(type(model), "_upload_modified_files", lambda self, folder, *args, **options: None)
    model.push_to_hub("someone/something")


WAYS = {
    "save_pretrained": lambda model, folder, _: model.save_pretrained(folder),
    "push_to_hub": push,
    "torch.save": lambda model, folder, _: torch.save(model.state_dict(), folder / "model.pt"),
    "safetensors": lambda model, folder, _: save_model(model, str(folder / "model.safetensors")),
    "inner model": lambda model, folder, _: model.bert.save_pretrained(folder),
    "accelerate": lambda model, folder, _: accelerated(model).save_state(str(folder)),
    "accelerate's model": lambda model, folder, _: accelerated(model).save_model(model, str(folder)),
}


def accelerated(model) -> Accelerator:
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model)
    return accelerator


@pytest.fixture
def words(caplog):
    caplog.set_level(logging.WARNING)
    return lambda: [record.message for record in caplog.records if WORD in record.message]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("masked", [False, True])
def test_every_way_to_a_file_warns_once(tmp_path, monkeypatch, words, way, masked):
    model = tiny_bert()
    if masked:
        mask_heads(model, {0: [1]})
        cure = "hf_plugin.save_pruned(model, hf_plugin.masked_heads(model), folder)"
    else:
        session = open_session(model, [pruner("dsp", **DSP)])
        cure = "hf_plugin.save_pruned(model, session.harden(), folder)"
    assert not words()
    WAYS[way](model, tmp_path, monkeypatch)
    said = words()
    assert len(said) == 1 and "has all heads" in said[0] and cure in said[0]
    WAYS["save_pretrained"](model, tmp_path, monkeypatch)
    assert len(words()) == 1
    restore_heads(model) if masked else session.detach()
    assert not any(module._state_dict_pre_hooks for module in model.modules())
    mask_heads(model, {0: [1]})  # another mask, another word
    model.state_dict()
    assert len(words()) == 2


def test_peft_warns_too(tmp_path, words):
    model = get_peft_model(tiny_bert(), LoraConfig(target_modules=["query"], r=2))
    open_session(model, [pruner("dsp", **DSP)])
    model.save_pretrained(tmp_path)
    assert len(words()) == 1 and "PeftModel" in words()[0]


def test_nothing_is_said_where_nothing_is_missing(tmp_path, words):
    model = tiny_bert()
    mask_heads(model, {})
    model.state_dict()
    restore_heads(model)
    prune_heads(model, {0: [1]})
    model.save_pretrained(tmp_path / "cut")
    model = tiny_bert()
    mask = mask_heads(model, {0: [1]})
    save_pruned(model, mask, tmp_path / "pruned")
    dict(model.state_dict(keep_vars=True))
    model(torch.arange(4)[None])
    assert not words()
    model.save_pretrained(tmp_path / "dense")
    assert len(words()) == 1
    restored = tiny_bert()
    with head_mask(restored, [1.0, 0.0, 1.0, 1.0]):
        restored.save_pretrained(tmp_path / "dense")
    assert len(words()) == 2 and "leave the head_mask block" in words()[1]
    restored.save_pretrained(tmp_path / "dense")
    assert len(words()) == 2


@pytest.mark.parametrize("whole", [copy.deepcopy, "file"])
def test_copies_keep_their_gates_and_the_word(tmp_path, words, whole):
    model, ids = tiny_bert(), torch.arange(4)[None]
    mask_heads(model, {0: [1]})
    session_of = tiny_bert()
    open_session(session_of, [pruner("dsp", **DSP)])
    for original in (model, session_of):
        if whole == "file":
            torch.save(original, tmp_path / "whole.pt")
            again = torch.load(tmp_path / "whole.pt", weights_only=False)
        else:
            again = copy.deepcopy(original)
        with torch.no_grad():
            torch.testing.assert_close(again(ids).logits, original(ids).logits, rtol=0, atol=0)
        before = len(words())
        again.state_dict()
        assert len(words()) == before + 1
        original.state_dict()
        assert len(words()) == before + 2


def test_weights_are_missing_until_they_are_masked_for_good(tmp_path, words):
    model = tiny_bert()
    session = open_session(model, [pruner("magnitude", final_threshold=0.5, warmup_steps=0, final_warmup=0)])
    model.save_pretrained(tmp_path)
    assert len(words()) == 1 and "call session.harden() first" in words()[0]
    session.detach()
    session = open_session(model, [pruner("magnitude", final_threshold=0.5, warmup_steps=0, final_warmup=0)])
    session.total_steps = 4
    session.harden()
    model.save_pretrained(tmp_path)
    assert len(words()) == 1
    loaded = BertForSequenceClassification.from_pretrained(tmp_path)
    weight = loaded.bert.encoder.layer[0].intermediate.dense.weight
    assert 0 < int((weight == 0).sum()) < weight.numel()


@pytest.mark.parametrize("added", [False, True])
def test_a_trainer_of_ones_own(tmp_path, words, added):
    model = tiny_bert()
    callback = HeadPruningCallback(open_session(model, [pruner("dsp", **DSP)]))
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2),
        train_dataset=sentences(16),
        data_collator=collate,
        callbacks=None if added else [callback],
    )
    if added:
        callback.add_to(trainer)
    trainer.train()
    assert (tmp_path / "checkpoint-4").is_dir() and not words()  # the state is in trainer_state.json
    trainer.save_model(tmp_path / "out")
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "out")
    columns = loaded.bert.encoder.layer[0].attention.output.dense.weight.unflatten(1, (4, 4))
    kept = callback.session.head_mask().keep[:4]
    if added:
        assert not words() and not columns[:, ~kept].any()
    else:
        assert len(words()) == 1 and "add_to(trainer)" in words()[0] and columns.all()
