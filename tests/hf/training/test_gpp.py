"""GPP and DFD with a Trainer: resumed in any phase, and the best model is one at the target."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hf_plugin import HeadPruningTrainer, pruner
from tests.hf.tiny import arguments, collate, sentences, tiny_bert

UPDATES, EPOCH = 12, 16


def trainer(folder, teacher, **more) -> HeadPruningTrainer:
    """Pruning begins with update 3 and ends with update 7; later scores are lower."""
    gpp = pruner("gpp", prepruning_finetune_epochs=3 / EPOCH, prune_epochs=4 / EPOCH, retrain_lr_factor=0.5, **more)
    each = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    found = HeadPruningTrainer(
        model=tiny_bert(),
        args=arguments(folder, max_steps=UPDATES, load_best_model_at_end=True, metric_for_best_model="score", **each),
        pruners=[gpp, pruner("dfd", teacher_path=str(teacher), window_size=2)],
        train_dataset=sentences(64),
        eval_dataset=sentences(4, seed=1),
        data_collator=collate,
        compute_metrics=lambda _: {"score": -found.state.global_step},
    )
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The trainer of a run, its folder and that of its teacher."""
    place = tmp_path_factory.mktemp("gpp")
    tiny_bert(seed=5).save_pretrained(place / "teacher")
    found = trainer(place / "run", place / "teacher")
    found.train()
    return found, place / "run", place / "teacher"


def test_the_best_model_is_one_at_the_target(whole):
    found, folder, _ = whole
    assert found.state.best_global_step == 8  # the first whose indicators are all 0 or 1
    assert found.head_mask.counts() == {"heads": (4, 8), "units": (32, 64)}
    best = load_file(folder / "checkpoint-8" / "model.safetensors")
    assert all(torch.equal(value, found.model.state_dict()[name]) for name, value in best.items())
    rates = [entry["learning_rate"] for entry in found.state.log_history if "learning_rate" in entry]
    assert rates[2] < rates[3] and rates[6] < rates[7] * 2  # each phase has a schedule of its own


def ends_alike(expected, found, folder, place) -> None:
    """Whether two runs ended with the same bits, their optimizers' and their sessions' among them."""
    name = f"checkpoint-{UPDATES}"
    ends = [load_file(where / name / "model.safetensors") for where in (folder, place)]
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
    moments = [torch.load(where / name / "optimizer.pt", weights_only=True)["state"] for where in (folder, place)]
    for key, entry in moments[0].items():
        assert all(torch.equal(value, moments[1][key][which]) for which, value in entry.items())
    states = expected.session.state_dict(), found.session.state_dict()
    assert all(np.array_equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("stopped", [2, 5, 9])
def test_a_run_that_was_stopped_in_any_phase_ends_bit_equal(whole, tmp_path, stopped):
    expected, folder, teacher = whole
    shutil.copytree(folder / f"checkpoint-{stopped}", tmp_path / f"checkpoint-{stopped}")
    found = trainer(tmp_path, teacher)
    found.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stopped}"))
    ends_alike(expected, found, folder, tmp_path)


@pytest.fixture(scope="module")
def published(whole, tmp_path_factory):
    """The trainer and the folder of a run that never clears its gradients."""
    place = tmp_path_factory.mktemp("published")
    found = trainer(place, whole[2], published_gradients=True)
    found.train()
    return found, place


@pytest.mark.parametrize("stopped", [2, 5, 9])
def test_published_gradients_go_on_from_a_checkpoint(whole, published, tmp_path, stopped):
    expected, folder = published
    carried = expected.session.tensor_state()
    assert {name.partition(".")[0] for name in carried} == {"gpp"} and len(carried) > 20
    shutil.copytree(folder / f"checkpoint-{stopped}", tmp_path / f"checkpoint-{stopped}")
    found = trainer(tmp_path, whole[2], published_gradients=True)
    found.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stopped}"))
    ends_alike(expected, found, folder, tmp_path)
    assert all(torch.equal(value, found.session.tensor_state()[name]) for name, value in carried.items())


def test_published_gradients_add_up(whole, published):
    """The first update is that of a run which clears them, the second is not."""
    for step, alike in ((1, True), (2, False)):
        ends = [load_file(where / f"checkpoint-{step}" / "model.safetensors") for where in (whole[1], published[1])]
        assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items()) == alike
