"""Damaged and hostile files in folders of transformers end in one sentence."""

import json
import shutil

import pytest
import torch

from head_pruning import HeadPruningError
from hf_plugin import load_pruned_v4
from hf_plugin.host import load_model, recipe
from hf_plugin.scripts.models import load_model as load_for_training
from hf_plugin.scripts.run import loading
from hf_plugin.scripts.settings import check_same_settings
from hf_plugin.training.callback import HeadPruningCallback
from hf_plugin.training.checkpoints import check_resumable, read_checkpoint
from hf_plugin.training.session import open_session
from tests.core.test_files import Code
from tests.fuzz.hf_targets import OLD, _pruners
from tests.hf.tiny import tiny_bert

DEEP = "[" * 1000 + "]" * 1000
NOT_RUN = "holds code, of which nothing was run"


@pytest.fixture
def checkpoint(tmp_path):
    return shutil.copytree(OLD / "checkpoint-6", tmp_path / "checkpoint-6")


@pytest.mark.parametrize("name", ["scheduler.pt", "rng_state.pth", "optimizer.pt"])
def test_code_in_a_checkpoint(checkpoint, monkeypatch, tmp_path, name):
    check_resumable(checkpoint)
    monkeypatch.chdir(tmp_path)
    torch.save({"last_epoch": Code()}, checkpoint / name)
    with pytest.raises(HeadPruningError, match=rf"{name} is damaged or of another kind \(.*{NOT_RUN}"):
        check_resumable(checkpoint)
    torch.save({"step": 5, "last_epoch": 1}, checkpoint / name)  # a method of the schedule
    if name == "scheduler.pt":
        with pytest.raises(HeadPruningError, match="'step' is no part of a schedule's state"):
            check_resumable(checkpoint)
    assert not (tmp_path / "ran").exists()


def test_code_in_the_weights_of_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_bert().config.save_pretrained(tmp_path)
    torch.save({"a": Code()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(HeadPruningError, match=NOT_RUN):
        load_model(tmp_path)
    with pytest.raises(HeadPruningError, match=NOT_RUN), loading(str(tmp_path)):
        load_for_training(type(tiny_bert()), str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda state: state.update(global_step="6"), "global_step is '6', not a whole number"),
        (lambda state: state.update(global_step=True), "not a whole number"),
        (lambda state: state.update(stateful_callbacks=[5]), "stateful_callbacks is a list"),
        (lambda state: state["stateful_callbacks"].update(RunSettings=5), "RunSettings is 5"),
        (lambda state: state["stateful_callbacks"].update(RunSettings={"attributes": {}}), "has no settings"),
        (lambda state: state.update(unheard_of=1), "transformers knows no unheard_of"),
        (lambda state: _kept(state).update(session=5), "it.session is 5"),
        (lambda state: _kept(state).update(unit_map=[1]), "it.unit_map is a list"),
        (lambda state: _kept(state)["session"].update({"dsp.logits": [float("nan")] * 8}), "dsp.logits cannot be"),
        (lambda state: _kept(state)["session"].update({"step": [7]}), "of update 7, after that of the checkpoint"),
    ],
)
def test_a_damaged_trainer_state(checkpoint, change, words):
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    change(state)
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    callback = HeadPruningCallback(open_session(tiny_bert(), _pruners()))
    with pytest.raises(HeadPruningError, match=words):
        found = read_checkpoint(checkpoint)
        check_same_settings(found, {})
        callback.restore(found)


def test_an_option_that_earlier_versions_stored_unset(checkpoint):
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    settings = {"attributes": {"settings": {"pruner": "gpp", "target_sparsity": 0.0}}, "args": {}}
    state["stateful_callbacks"]["RunSettings"] = settings
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    check_same_settings(read_checkpoint(checkpoint), {"pruner": "gpp"})
    with pytest.raises(
        HeadPruningError, match="run with --target_sparsity 0.0, this one is with --target_sparsity 0.5"
    ):
        check_same_settings(read_checkpoint(checkpoint), {"pruner": "gpp", "target_sparsity": 0.5})


def test_an_option_that_earlier_versions_did_not_have(checkpoint):
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    settings = {"attributes": {"settings": {"distill": "logits"}}, "args": {}}
    state["stateful_callbacks"]["RunSettings"] = settings
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    check_same_settings(read_checkpoint(checkpoint), {"distill": "logits", "distill_hidden_loss": "mse"})
    with pytest.raises(HeadPruningError, match="run without --distill_hidden_loss, this one is with"):
        check_same_settings(read_checkpoint(checkpoint), {"distill": "logits", "distill_hidden_loss": "cosine"})


def _kept(state):
    return state["stateful_callbacks"]["HeadPruningCallback"]["attributes"]


@pytest.mark.parametrize(
    "told, words",
    [
        ({"architectures": [5]}, r"architectures\[0\] is 5"),
        ({"quantization_config": {"quant_method": "head_pruning", "recipe": {"sites": 5}}}, "is damaged"),
        (DEEP, "nested too deeply"),
    ],
)
def test_a_damaged_configuration(tmp_path, told, words):
    tiny_bert().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(told if isinstance(told, str) else json.dumps({**json.loads(file.read_text()), **told}))
    with pytest.raises(HeadPruningError, match=words):
        recipe(tmp_path)
        load_model(tmp_path)


@pytest.mark.parametrize("pruned", [{"0": ["y"]}, {"x": [1]}, {"9": [1]}, [5], {"0": [10**9]}])
def test_damaged_pruned_heads(tmp_path, pruned):
    tiny_bert().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pruned_heads": pruned}))
    with pytest.raises(HeadPruningError):
        load_pruned_v4(tmp_path)
