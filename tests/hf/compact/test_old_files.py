"""Files that an earlier version wrote, before its modules lay in rooms: see ``before_rooms/make.py``."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import hf_plugin  # noqa: F401  (compact folders load)
from head_pruning import HeadMask
from head_pruning.cli import main
from head_pruning.report.weights import session_counts, sum_counts
from head_pruning.weights import WeightPruner, load_weight_masks
from tests.hf.before_rooms.make import HALF, STEPS, trainer
from tests.hf.tiny import collate, sentences, tiny_bert

OLD = Path(__file__).parents[1] / "before_rooms"


@pytest.mark.skipif(transformers.__version__.startswith("5.0."), reason="the files are of a later transformers")
def test_a_run_goes_on_from_an_old_checkpoint(tmp_path, monkeypatch):
    """To the end that it had then, when weights of removed heads counted and stayed."""
    monkeypatch.setattr(WeightPruner, "_learn_heads", lambda self: None)
    monkeypatch.setattr(WeightPruner, "_same_heads", lambda self: True)
    folder = tmp_path / "run"
    shutil.copytree(OLD / f"checkpoint-{HALF}", folder / f"checkpoint-{HALF}")
    run = trainer(folder)
    assert run.train(resume_from_checkpoint=True).global_step == STEPS
    now = run.model.state_dict()
    for name, then in load_file(OLD / "end.safetensors").items():
        assert torch.allclose(now[name], then, atol=1e-6), name
        assert torch.equal(now[name] == 0, then == 0), name


@pytest.mark.skipif(transformers.__version__.startswith("5.0."), reason="the files are of a later transformers")
def test_a_run_that_goes_on_ends_at_the_target_of_what_is_left(tmp_path):
    shutil.copytree(OLD / f"checkpoint-{HALF}", tmp_path / f"checkpoint-{HALF}")
    run = trainer(tmp_path)
    run.train(resume_from_checkpoint=True)
    total = sum_counts(session_counts(run.session))
    assert run.head_mask.kept == 4 and total.left < total.dense
    assert total.kept == total.left - (int(total.left * 0.6) - 1)


def test_masks_and_report_are_read(capsys):
    assert HeadMask.load(OLD / "masked" / "masks.safetensors").kept == 4
    masks = load_weight_masks(OLD / "masked" / "masks.safetensors")
    weights = load_file(OLD / "masked" / "model.safetensors")
    assert masks and all(not weights[name][~mask].any() for name, mask in masks.items())
    main(["inspect", str(OLD / "masked"), "--json"])
    assert json.loads(capsys.readouterr().out)["heads_kept"] == 4


@pytest.mark.slow
def test_a_compact_folder_loads_with_the_package_and_with_the_code_in_it():
    batch = collate(sentences(3))
    expected = tiny_bert(1)
    with torch.no_grad(), hf_plugin.head_mask(expected, [[0, 0, 0, 0], [1, 0, 1, 1]]):
        wanted = expected(**batch).logits
    model = AutoModelForSequenceClassification.from_pretrained(OLD / "compact").eval()
    with torch.no_grad():
        assert torch.allclose(model(**batch).logits, wanted, atol=1e-6)
    # A process without the package runs the copy of its code in the folder.
    code = f"""
import sys
sys.modules["head_pruning"] = sys.modules["hf_plugin"] = None
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained({str(OLD / "compact")!r}, trust_remote_code=True)
print(sum(parameter.numel() for parameter in model.parameters()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == sum(parameter.numel() for parameter in model.parameters())
