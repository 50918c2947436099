"""HeadPruningTrainer with a model_init: a session for every model, and hyperparameter search."""

import copy
import json

import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification, Trainer

from head_pruning import HeadMask, HeadPruningError
from hf_plugin import HeadPruningCallback, HeadPruningTrainer, open_session, pruner
from tests.hf.tiny import arguments, collate, sentences, tiny_bert

DSP = {"num_of_heads": 3, "joint_pruning": True, "pruning_lr": 0.5}
PLATON = {"final_threshold": 0.4, "warmup_steps": 2, "initial_warmup": 0, "final_warmup": 2, "deltaT": 1}


MODEL = tiny_bert()


def steady():
    """A new model, for which no random number is drawn, so that runs start alike."""
    return copy.deepcopy(MODEL)


def trainer_of(folder, pruners, model_init=steady, **options):
    training = {"max_steps": 6, **options}
    return HeadPruningTrainer(
        model_init=model_init,
        args=arguments(folder, **training),
        train_dataset=sentences(32),
        eval_dataset=sentences(16, seed=1),
        data_collator=collate,
        pruners=pruners,
    )


def state(trainer) -> dict:
    found = {name: value.copy() for name, value in trainer.session.state_dict().items()}
    return found | {name: value.detach().clone().numpy() for name, value in trainer.model.named_parameters()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize(
    "pruners",
    [pytest.param([("dsp", DSP)], marks=pytest.mark.slow), [("dsp", DSP), ("platon", PLATON)]],
    ids=["heads", "heads and weights"],
)
def test_every_training_starts_with_a_model_and_a_session_of_its_own(tmp_path, pruners):
    built = [pruner(name, **options) for name, options in pruners]
    trainer = trainer_of(tmp_path / "twice", built, save_strategy="steps", save_steps=3)
    first = trainer.session
    trainer.train()
    once, session = state(trainer), trainer.session
    assert session is not first and session.model is trainer.model
    trainer.train()
    assert same(state(trainer), once) and trainer.session is not session
    assert not any(module._forward_pre_hooks for module in session.model.modules())  # the one before is detached
    given = HeadPruningTrainer(
        model=steady(),
        args=arguments(tmp_path / "given", max_steps=6),
        train_dataset=sentences(32),
        data_collator=collate,
        pruners=[pruner(name, **options) for name, options in pruners],
    )
    given.train()
    assert same(state(given), once)
    resumed = trainer_of(tmp_path / "twice", built)
    resumed.train(resume_from_checkpoint=str(tmp_path / "twice" / "checkpoint-3"))
    assert same(state(resumed), once)
    trainer.save_model(str(tmp_path / "out"))
    assert HeadMask.load(tmp_path / "out" / "masks.safetensors").kept == 3
    with torch.no_grad():
        ids = torch.arange(5, 11)[None]
        expected = trainer.model.eval()(ids).logits
        loaded = BertForSequenceClassification.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=0, atol=1e-5)


def test_pruners_may_depend_on_the_trial(tmp_path):
    trials = []

    def made(trial):
        trials.append(trial)
        if trial == "weights":
            return [pruner("platon", **PLATON)]
        return [pruner("dsp", **{**DSP, "num_of_heads": trial or 5})]

    trainer = trainer_of(tmp_path, made)
    assert trainer.head_mask.kept == 5
    for trial, kept in ((2, 2), ("weights", None), (4, 4)):
        trainer.call_model_init(trial)
        assert trials[-1] == trial and (trainer.head_mask and trainer.head_mask.kept) == kept


def test_hyperparameter_search(tmp_path):
    pytest.importorskip("optuna", reason="needs optuna")

    def made(trial):
        return [pruner("dsp", **{**DSP, "num_of_heads": 3 if trial is None else trial.suggest_int("heads", 2, 6)})]

    trainer = trainer_of(tmp_path, made, save_strategy="steps", save_steps=3)
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)},
        n_trials=3,
        direction="minimize",
        backend="optuna",
    )
    assert set(best.hyperparameters) == {"learning_rate", "heads"} and np.isfinite(best.objective)
    stored = json.loads((tmp_path / f"run-{best.run_id}" / "checkpoint-6" / "trainer_state.json").read_text())
    assert len(stored["stateful_callbacks"]["HeadPruningCallback"]["attributes"]["session"]["dsp.logits"]) == 8


def test_what_does_not_go_with_a_model_init(tmp_path):
    session = open_session(tiny_bert(), [pruner("dsp", **DSP)])
    with pytest.raises(HeadPruningError, match="or a model_init and pruners"):
        HeadPruningTrainer(model_init=steady, args=arguments(tmp_path), session=session)
    with pytest.raises(HeadPruningError, match="or a model_init and pruners"):
        HeadPruningTrainer(args=arguments(tmp_path), pruners=[pruner("dsp", **DSP)])
    with pytest.raises(HeadPruningError, match="99 heads"):
        trainer_of(tmp_path, [pruner("dsp", **{**DSP, "num_of_heads": 99})])
    model = tiny_bert()
    callback = HeadPruningCallback(open_session(model, [pruner("dsp", **DSP)]))
    trainer = Trainer(
        model_init=steady,
        args=arguments(tmp_path),
        train_dataset=sentences(16),
        data_collator=collate,
        callbacks=[callback],
    )
    with pytest.raises(HeadPruningError, match="HeadPruningTrainer opens one on each"):
        trainer.train()
