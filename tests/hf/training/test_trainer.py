"""The Trainer and the callback: life cycle, logs, checkpoints, precision, what is refused."""

import contextlib
import copy
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback

from head_pruning import HeadMask, HeadPruningError
from hf_plugin import HeadPruningCallback, HeadPruningTrainer, open_session, pruner
from hf_plugin.training.checkpoints import last_checkpoint
from tests.disks import held, no_file_above
from tests.few import few
from tests.hf.tiny import HEADS, arguments, collate, sentences, tiny_bert

DSP = {"num_of_heads": 3, "annealing": True, "initial_temperature": 1.0, "final_temperature": 1e-4}
DSP |= {"cooldown_steps": 0.5, "pruning_lr": 0.5}
METHODS = {
    "dsp": {**DSP, "joint_pruning": True},
    "ste": {"num_of_heads": 3, "joint_pruning": True},
    "voita": {"l0_penalty": 0.01, "joint_pruning": True},
    "random": {"num_of_heads": 3},
}
PIPELINED = {"dsp": DSP, "ste": {"num_of_heads": 3}, "voita": {"l0_penalty": 0.01}}


def trainer_of(folder, method="dsp", options=None, model=None, **training):
    train = {"train_dataset": sentences(32), "eval_dataset": sentences(16, seed=1), "data_collator": collate}
    train |= {name: training.pop(name) for name in ("callbacks", "compute_metrics") if name in training}
    return HeadPruningTrainer(
        model=model or tiny_bert(),
        args=arguments(folder, **training),
        pruners=[pruner(method, **(METHODS[method] if options is None else options))],
        **train,
    )


def weights(model) -> dict:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def same_session(first, second) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


class StopAt(TrainerCallback):
    """Ends training after an update, as a time limit would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


class Record(TrainerCallback):
    """What a tracker is given."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


@pytest.mark.parametrize("method", few(METHODS, "dsp", "voita"))
def test_joint_training_moves_model_and_mask(tmp_path, method):
    trainer = trainer_of(tmp_path, method)
    before, logits = weights(trainer.model), trainer.session.state_dict()
    trainer.train()
    assert not same(before, weights(trainer.model))
    if method != "random":
        assert not np.array_equal(logits[f"{method}.logits"], trainer.session.state_dict()[f"{method}.logits"])
    if method != "voita":
        assert trainer.head_mask.kept == 3
    assert trainer.head_mask.keep.size == HEADS


@pytest.mark.parametrize("method", few(PIPELINED, "dsp"))
def test_pipelined_training_leaves_the_model_bit_identical(tmp_path, method):
    trainer = trainer_of(tmp_path, method, PIPELINED[method], weight_decay=0.1)
    before, logits = weights(trainer.model), trainer.session.state_dict()[f"{method}.logits"]
    trainer.train()
    assert same(before, weights(trainer.model))
    assert not np.array_equal(logits, trainer.session.state_dict()[f"{method}.logits"])
    trainer.session.detach()
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


def test_metrics_reach_trackers_and_the_log(tmp_path):
    record = Record()
    trainer = trainer_of(tmp_path, callbacks=[record])
    trainer.train()
    logs = [entry for entry in record.logs if "loss" in entry]
    assert len(logs) == 12
    for entry in logs:
        assert {"temperature", "heads_expected", "heads_kept", "penalty", "gate_norm"} <= entry.keys()
    temperatures = [entry["temperature"] for entry in logs]
    assert temperatures[0] == pytest.approx(1.0) and temperatures[6] == pytest.approx(1e-4)
    assert [e["temperature"] for e in trainer.state.log_history if "temperature" in e] == temperatures


def test_evaluation_uses_the_hard_mask(tmp_path):
    seen = []
    trainer = trainer_of(tmp_path, eval_strategy="steps", eval_steps=4)
    gates = [gate for _, gate in trainer.session.gates._targets]

    def look(module, args):
        if not module.training:
            seen.append(torch.cat([gate.evaluation_gate for gate in gates]).clone())

    trainer.model.bert.register_forward_pre_hook(look)
    trainer.train()
    assert len(seen) == 3 * 2  # three evaluations of two batches
    for values in seen:
        assert set(values.tolist()) == {0.0, 1.0} and values.sum() == 3


class TestResume:
    """A run that was stopped goes on to the bits of one that was not."""

    @pytest.mark.parametrize(
        "method, options, training",
        [
            pytest.param("dsp", METHODS["dsp"], {}, id="dsp"),
            pytest.param(
                "dsp", METHODS["dsp"], {"gradient_accumulation_steps": 2}, id="accumulation", marks=pytest.mark.slow
            ),
            pytest.param("dsp", METHODS["dsp"], {"bf16": True}, id="bf16", marks=pytest.mark.slow),
            pytest.param(
                "voita",
                METHODS["voita"],
                {"lr_scheduler_type": "cosine", "warmup_steps": 3},
                id="voita",
                marks=pytest.mark.slow,
            ),
            pytest.param("ste", METHODS["ste"], {"gradient_accumulation_steps": 2}, id="ste", marks=pytest.mark.slow),
            pytest.param("dsp", PIPELINED["dsp"], {}, id="pipelined", marks=pytest.mark.slow),
        ],
    )
    @pytest.mark.parametrize("stop", [4, pytest.param(8, marks=pytest.mark.slow)])
    def test_bit_equal(self, tmp_path, method, options, training, stop):
        training = {"save_strategy": "steps", "save_steps": stop, **training}
        whole = trainer_of(tmp_path / "whole", method, options, **training)
        whole.train()
        trainer_of(tmp_path / "parts", method, options, callbacks=[StopAt(stop)], **training).train()
        parts = trainer_of(tmp_path / "parts", method, options, model=tiny_bert(seed=1), **training)
        parts.train(resume_from_checkpoint=True)
        assert parts.state.global_step == 12
        assert same(weights(whole.model), weights(parts.model))
        assert same_session(whole.session, parts.session)

    def test_incomplete_checkpoints_are_passed_over(self, tmp_path):
        trainer = trainer_of(tmp_path, save_strategy="steps", save_steps=4)
        trainer.train()
        (tmp_path / "checkpoint-12" / "trainer_state.json").unlink()
        (tmp_path / "checkpoint-8" / "trainer_state.json").write_text('{"epoch": ')
        assert last_checkpoint(tmp_path).folder.name == "checkpoint-4"
        with pytest.raises(HeadPruningError, match="checkpoint-8 is not whole"):
            trainer_of(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
        with pytest.raises(HeadPruningError, match="no checkpoint"):
            trainer_of(tmp_path).train(resume_from_checkpoint=str(tmp_path / "nothing"))

    @pytest.mark.parametrize(
        "stop", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)]
    )
    def test_best_is_at_target(self, tmp_path, stop):
        """A checkpoint's best may have been written before the pruner forgot it."""
        training = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps"}
        training |= {"eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "score"}
        options = {**METHODS["dsp"], "cooldown_steps": 0.5}

        def run(model, *callbacks):
            trainer = trainer_of(tmp_path, "dsp", options, model=model, callbacks=list(callbacks), **training)
            scores = {1: 0.9, 2: 0.9, 3: 0.9, 4: 0.3, 5: 0.2, 6: 0.1}
            trainer.compute_metrics = lambda _: {"score": scores[trainer.state.global_step]}
            return trainer

        run(tiny_bert(), StopAt(stop)).train()
        resumed = run(tiny_bert(seed=1))
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
        assert resumed.state.best_global_step == 3 and resumed.session.at_target()

    @pytest.fixture(scope="class")
    def two(self, tmp_path_factory):
        """The folder of a run that saved both of its updates."""
        folder = tmp_path_factory.mktemp("two")
        trainer_of(folder, max_steps=2, save_strategy="steps", save_steps=1).train()
        return folder

    @pytest.mark.parametrize(
        "name, harm, sentence",
        [
            ("optimizer.pt", None, "lacks optimizer.pt"),
            ("scheduler.pt", None, "lacks scheduler.pt"),
            ("rng_state.pth", None, "lacks rng_state.pth"),
            ("model.safetensors", None, "lacks its model"),
            ("optimizer.pt", "cut", "optimizer.pt is damaged"),
            ("rng_state.pth", "cut", "rng_state.pth is damaged"),
            ("model.safetensors", "cut", "model.safetensors is damaged"),
            ("config.json", "cut", "config.json is damaged"),
            ("trainer_state.json", b"[]", "is not whole"),
        ],
    )
    def test_lacking_and_damaged_parts(self, two, tmp_path, name, harm, sentence):
        shutil.copytree(two, tmp_path, dirs_exist_ok=True)
        path = tmp_path / "checkpoint-2" / name
        whole = path.read_bytes()
        if harm is None:
            path.unlink()
        else:
            path.write_bytes(whole[: len(whole) // 2] if harm == "cut" else harm)
        with pytest.raises(HeadPruningError, match=sentence):
            trainer_of(tmp_path).train(resume_from_checkpoint=str(path.parent))
        assert last_checkpoint(tmp_path).folder.name == "checkpoint-1"

    def test_finished_run_is_left_as_it_is(self, tmp_path):
        training = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}  # of 8 in the epoch
        whole = trainer_of(tmp_path, **training)
        whole.train()
        state, again = weights(whole.model), trainer_of(tmp_path, model=tiny_bert(seed=1), **training)
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == 6
        assert same(state, weights(again.model)) and same_session(whole.session, again.session)

    def test_nothing_of_save_only_model_is_resumed(self, tmp_path):
        trainer_of(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, save_only_model=True).train()
        with pytest.raises(HeadPruningError, match="checkpoint-2 lacks optimizer.pt .--save_only_model"):
            trainer_of(tmp_path).train(resume_from_checkpoint=True)

    @pytest.mark.slow
    def test_damaged_pruning_state(self, tmp_path):
        trainer_of(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
        path = tmp_path / "checkpoint-2" / "trainer_state.json"
        whole = path.read_text()
        for change in (
            lambda attributes: attributes.pop("session"),
            lambda attributes: attributes.update(session=3),
            lambda attributes: attributes["session"].update({"dsp.logits": ["many"]}),
            lambda attributes: attributes["session"].update({"dsp.adam.first": [0.0]}),
            lambda attributes: attributes.update(unit_map={"attention": 1}),
        ):
            state = json.loads(whole)
            change(state["stateful_callbacks"]["HeadPruningCallback"]["attributes"])
            path.write_text(json.dumps(state))
            with pytest.raises(HeadPruningError, match="is damaged"):
                trainer_of(tmp_path).train(resume_from_checkpoint=str(path.parent))

    def test_other_architectures_of_as_many_heads_are_refused(self, tmp_path):
        trainer_of(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
        other = tiny_bert(num_hidden_layers=4, num_attention_heads=2)
        with pytest.raises(HeadPruningError, match="another architecture"):
            trainer_of(tmp_path, model=other).train(resume_from_checkpoint=True)

    @pytest.mark.slow
    def test_dense_checkpoints_and_other_pruners_are_refused(self, tmp_path):
        options = {"train_dataset": sentences(32), "data_collator": collate}
        training = arguments(tmp_path / "dense", save_strategy="steps", save_steps=12)
        Trainer(model=tiny_bert(), args=training, **options).train()
        with pytest.raises(HeadPruningError, match="not written by a pruning run"):
            trainer_of(tmp_path / "dense", max_steps=14).train(resume_from_checkpoint=True)
        trainer_of(tmp_path / "ste", "ste", save_strategy="steps", save_steps=12).train()
        with pytest.raises(HeadPruningError, match="pruned with ste, this run uses dsp"):
            trainer_of(tmp_path / "ste", max_steps=14).train(resume_from_checkpoint=True)
        with pytest.raises(HeadPruningError, match="restore_callback_states_from_checkpoint"):
            trainer_of(tmp_path / "ste", "ste", max_steps=14, restore_callback_states_from_checkpoint=True).train(
                resume_from_checkpoint=True
            )


def test_best_checkpoints_are_among_states_at_target(tmp_path):
    scores = iter([0.9, 0.8, 0.3, 0.6, 0.5, 0.4])  # the best ones come before the annealing is over

    trainer = trainer_of(
        tmp_path,
        compute_metrics=lambda prediction: {"score": next(scores)},
        **{"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2},
        **{"load_best_model_at_end": True, "metric_for_best_model": "score", "save_total_limit": 3},
    )
    logits = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            logits[state.global_step] = trainer.session.pruners[0].logits.copy()

    trainer.add_callback(Keep())
    trainer.train()
    assert trainer.state.best_global_step == 8
    assert np.array_equal(trainer.session.pruners[0].logits, logits[8])
    best = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-8")
    assert same(weights(trainer.model), weights(best))


def test_a_score_of_the_update_before_the_target_is_not_the_best(tmp_path):
    """Which no checkpoint has: load_best_model_at_end would load none."""
    at_target = {}
    trainer = trainer_of(
        tmp_path,
        "platon",
        {"final_threshold": 0.2, "warmup_steps": 0.2},
        compute_metrics=lambda prediction: {"score": 1.0 - 0.01 * trainer.state.global_step},
        **{"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 4, "save_steps": 8, "max_steps": 20},
        **{"load_best_model_at_end": True, "metric_for_best_model": "score"},
    )

    class Watch(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            at_target[state.global_step] = trainer.session.at_target()

    trainer.add_callback(Watch())
    trainer.train()
    assert at_target == {4: False, 8: False, 12: False, 16: True, 20: True}
    assert trainer.state.best_global_step == 16
    best = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-16")
    assert same(weights(trainer.model), weights(best))


def test_no_best_checkpoint_when_the_target_is_never_reached(tmp_path, caplog):
    trainer = trainer_of(
        tmp_path,
        options={**METHODS["dsp"], "cooldown_steps": 30},
        compute_metrics=lambda prediction: {"score": 1.0},
        **{"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 4, "save_steps": 4},
        **{"load_best_model_at_end": True, "metric_for_best_model": "score"},
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint is None
    assert "anneals over 30 updates but training has 12" in caplog.text
    assert "training ended before the schedule of dsp did" in caplog.text


def test_saved_model_loads_without_us_and_gives_the_same_outputs(tmp_path):
    trainer = trainer_of(tmp_path / "run")
    trainer.train()
    before = weights(trainer.model)
    trainer.save_model(str(tmp_path / "pruned"))
    assert same(before, weights(trainer.model))
    names = {path.name for path in (tmp_path / "pruned").iterdir()}
    assert {"config.json", "model.safetensors", "pruning.json", "masks.safetensors", "head_mask.png"} <= names
    assert "README.md" in names and not [name for name in names if name.startswith(".")]
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "pruned").eval()
    batch = collate(sentences(8, seed=3))
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).logits
        assert torch.allclose(plain(**batch).logits, expected, atol=1e-6)
        trainer.session.gates.detach()
        assert not torch.allclose(trainer.model(**batch).logits, expected, atol=1e-4)
    mask = HeadMask.load(tmp_path / "pruned" / "masks.safetensors")
    assert mask == trainer.head_mask and mask.kept == 3
    report = json.loads((tmp_path / "pruned" / "pruning.json").read_text())
    assert report["heads_kept"] == 3 and report["method"] == "dsp"
    zeros = sum(int((p == 0).sum()) for p in plain.parameters())
    total = report["sparsity"]["parameters"]
    assert report["sparsity"]["nonzero_parameters"] == total - zeros < total
    for heads, site in zip(report["kept_heads_by_site"].values(), range(2)):
        out = plain.bert.encoder.layer[site].attention.output.dense.weight
        assert {h for h in range(4) if out[:, 4 * h : 4 * h + 4].any()} == set(heads)


def test_callback_in_a_plain_trainer_equals_the_trainer(tmp_path):
    ours = trainer_of(tmp_path / "ours")
    ours.train()
    model = tiny_bert()
    session = open_session(model, [pruner("dsp", **METHODS["dsp"])])
    args = arguments(tmp_path / "own", save_strategy="steps", save_steps=12)
    own = Trainer(model=model, args=args, train_dataset=sentences(32), data_collator=collate)
    callback = HeadPruningCallback(session).add_to(own)
    own.train()
    assert same(weights(ours.model), weights(model)) and same_session(ours.session, session)
    stored = json.loads((tmp_path / "own" / "checkpoint-12" / "trainer_state.json").read_text())
    assert "HeadPruningCallback" in stored["stateful_callbacks"]
    assert len(json.dumps(callback.state())) < 8000  # the size of the gates, not of the model


def test_a_plain_loop_equals_the_trainer(tmp_path):
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    trainer = trainer_of(tmp_path, model=tiny_bert(**dropout), max_grad_norm=0.0)
    batches = []
    handle = trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append({k: v.clone() for k, v in kwargs.items() if torch.is_tensor(v)}),
        with_kwargs=True,
    )
    trainer.train()
    handle.remove()
    model = tiny_bert(**dropout).train()
    session = open_session(model, [pruner("dsp", **METHODS["dsp"])], total_steps=12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for step, batch in enumerate(batches):
        factor = 1 - step / 12
        optimizer.param_groups[0]["lr"] = 1e-3 * factor
        session.before_update(step)
        optimizer.zero_grad()
        session.loss(model(**batch).loss).backward()
        session.after_backward()
        optimizer.step()
        session.after_step(factor)
    assert session.harden() == trainer.head_mask
    np.testing.assert_allclose(session.pruners[0].logits, trainer.session.pruners[0].logits, rtol=1e-4)
    for name, value in weights(trainer.model).items():
        assert torch.allclose(value, weights(model)[name], atol=1e-5), name


class TestHalfPrecision:
    """Loss scaling, with torch's own scaler and accelerate's optimizer on the CPU."""

    def drive(self, tmp_path, options, scale, updates=6, spoil=None, max_grad_norm=1.0):
        from accelerate import Accelerator
        from accelerate.optimizer import AcceleratedOptimizer
        from transformers import TrainerControl, TrainerState

        args, state, control = arguments(tmp_path, max_grad_norm=max_grad_norm), TrainerState(), TrainerControl()
        Accelerator(cpu=True)  # after the arguments, which forget accelerate's state
        model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        callback = HeadPruningCallback(open_session(model, [pruner("dsp", **options)]))
        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = AcceleratedOptimizer(torch.optim.SGD(trainable, lr=0.1), scaler=scaler)
        state.max_steps = updates
        events = {"model": model, "optimizer": optimizer}
        callback.on_train_begin(args, state, control, **events)
        model.train()
        for step in range(updates):
            callback.on_step_begin(args, state, control, **events)
            batch = collate(sentences(4, seed=step))
            with torch.autocast("cpu", dtype=torch.float16, enabled=False):
                loss = model(**batch).loss
            (loss if scaler is None else scaler.scale(loss)).backward()
            if step == spoil:
                trainable[-1].grad.fill_(float("inf"))
            if max_grad_norm > 0 and scaler is not None:
                scaler.unscale_(optimizer.optimizer)
            callback.on_pre_optimizer_step(args, state, control, **events)
            optimizer.step()
            callback.on_optimizer_step(args, state, control, **events)
            optimizer.zero_grad()
            state.global_step += 1
            callback.on_step_end(args, state, control, **events)
        return model, callback.session, scaler

    @pytest.mark.parametrize("options", [METHODS["dsp"], PIPELINED["dsp"]], ids=["joint", "pipelined"])
    @pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
    def test_the_scale_does_not_matter(self, tmp_path, options, max_grad_norm):
        plain, session, _ = self.drive(tmp_path, options, None, max_grad_norm=0.0)
        scaled, other, _ = self.drive(tmp_path, options, 2.0**12, max_grad_norm=max_grad_norm)
        np.testing.assert_allclose(session.pruners[0].logits, other.pruners[0].logits, rtol=1e-5)
        for name, value in weights(plain).items():
            assert torch.allclose(value, weights(scaled)[name], atol=1e-6), name
        if not options.get("joint_pruning"):
            assert same(weights(scaled), weights(tiny_bert()))

    @pytest.mark.parametrize("options", [METHODS["dsp"], PIPELINED["dsp"]], ids=["joint", "pipelined"])
    @pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
    def test_an_overflow_skips_the_gates_too(self, tmp_path, options, max_grad_norm):
        model, session, scaler = self.drive(tmp_path, options, 2.0**12, spoil=1, max_grad_norm=max_grad_norm)
        assert scaler.get_scale() == 2.0**11
        assert session.pruners[0].adam.steps == 2  # of updates 0 to 2: from update 3 on the annealing is over
        assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_gradient_accumulation_gives_the_gates_the_gradient_of_the_whole_batch(tmp_path):
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    rows = [{**row, "input_ids": row["input_ids"][:4], "attention_mask": [1] * 4} for row in sentences(16)]
    sessions = []
    for size, steps in ((8, 1), (4, 2), (2, 4)):
        model = tiny_bert(**dropout)
        trainer = HeadPruningTrainer(
            model=model,
            args=arguments(tmp_path, max_steps=4, per_device_train_batch_size=size, gradient_accumulation_steps=steps),
            pruners=[pruner("voita", l0_penalty=0.1, joint_pruning=True)],
            train_dataset=rows,
            data_collator=collate,
        )
        trainer.train()
        sessions.append(trainer.session.pruners[0].logits)
    np.testing.assert_allclose(sessions[1], sessions[0], rtol=1e-4)
    np.testing.assert_allclose(sessions[2], sessions[0], rtol=1e-4)


@pytest.mark.parametrize("method", ["head_sensitivity", "subset"])
@pytest.mark.parametrize("starts", [{}, {"starts_trained": False}])
def test_a_trainer_says_what_training_begins_with(tmp_path, method, starts):
    """Also of models that a model_init makes; without a word they are taken for trained ones."""
    for given in ({"model": tiny_bert()}, {"model_init": lambda: tiny_bert()}):
        trainer = HeadPruningTrainer(
            args=arguments(tmp_path, max_steps=4),
            pruners=[pruner(method, num_of_heads=3, joint_pruning=True)],
            train_dataset=sentences(8),
            data_collator=collate,
            **given,
            **starts,
        )
        assert trainer.session.starts_trained is not bool(starts)
    trainer.train()
    found = trainer.session.pruners[0].options()
    trained = "0:0.2" if method == "head_sensitivity" else "0:0.4"
    assert (found["count_schedule"], found["min_heads_per_kind"]) == (("0:0.1", 1) if starts else (trained, 0))
    assert trainer.head_mask.kept == 3


class TestRefusals:
    def test_bad_arguments(self, tmp_path):
        with pytest.raises(HeadPruningError, match="either pruners or a session"):
            HeadPruningTrainer(model=tiny_bert(), args=arguments(tmp_path))
        with pytest.raises(HeadPruningError, match="Give the model and its pruners or session, or a model_init"):
            HeadPruningTrainer(args=arguments(tmp_path), pruners=[pruner("ste")])
        with pytest.raises(HeadPruningError, match="9"):
            trainer_of(tmp_path, options={**DSP, "num_of_heads": 9})
        with pytest.raises(HeadPruningError, match="no option keep"):
            pruner("dsp", keep=3)

    def test_a_broken_training_stops_with_a_sentence(self, tmp_path):
        model = tiny_bert()
        with torch.no_grad():
            model.classifier.bias.fill_(float("nan"))
        with pytest.raises(HeadPruningError, match="not finite at step 1"):
            trainer_of(tmp_path, model=model).train()

    def test_gates_on_another_model(self, tmp_path):
        model = tiny_bert()
        session = open_session(model, [pruner("dsp", **METHODS["dsp"])])
        args = arguments(tmp_path)
        own = Trainer(model=copy.deepcopy(model), args=args, train_dataset=sentences(8), data_collator=collate)
        HeadPruningCallback(session).add_to(own)
        with pytest.raises(HeadPruningError, match="another model"):
            own.train()


class TestBrokenTraining:
    """Losses that are not finite are noticed where nothing logs them."""

    @pytest.mark.parametrize(
        "logging", [{"logging_steps": 100}, pytest.param({"logging_strategy": "no"}, marks=pytest.mark.slow)]
    )
    def test_at_the_end_and_before_a_checkpoint(self, tmp_path, logging):
        class Broken(HeadPruningTrainer):
            def compute_loss(self, *args, **options):
                return super().compute_loss(*args, **options) * float("nan")

        training = {"max_steps": 4, **logging}
        options = {
            "train_dataset": sentences(32),
            "data_collator": collate,
            "pruners": [pruner("random", num_of_heads=3)],
        }
        trainer = Broken(model=tiny_bert(), args=arguments(tmp_path, **training), **options)
        with pytest.raises(HeadPruningError, match="not finite at step 4"):
            trainer.train()
        training |= {"save_strategy": "steps", "save_steps": 2}
        trainer = Broken(model=tiny_bert(), args=arguments(tmp_path, **training), **options)
        with pytest.raises(HeadPruningError, match="not finite at step 2"):
            trainer.train()
        assert not list(tmp_path.glob("checkpoint-*/model.safetensors"))

    def test_a_loss_scale_that_only_falls(self, tmp_path):
        trainer = trainer_of(tmp_path, max_steps=2)
        scale = SimpleNamespace(is_enabled=lambda: True, get_scale=lambda: 5e-5)
        callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, HeadPruningCallback))
        with pytest.raises(HeadPruningError, match="not finite at step 0"):
            callback.on_optimizer_step(
                trainer.args, trainer.state, trainer.control, optimizer=SimpleNamespace(scaler=scale)
            )


def test_trainers_of_one_pruner_do_not_share_it(tmp_path):
    keep = pruner("head_sensitivity", num_of_heads=3, joint_pruning=True)
    train = {"train_dataset": sentences(32), "data_collator": collate}
    options = {"max_steps": 4, "save_strategy": "no"}
    trainers = [
        HeadPruningTrainer(
            model=tiny_bert(seed=seed), args=arguments(tmp_path / str(seed), **options), pruners=[keep], **train
        )
        for seed in (1, 2)
    ]
    first, second = trainers
    assert first.session.pruners == [keep] and keep.session is first.session
    assert second.session.pruners[0].config == keep.config and second.session.pruners[0].session is second.session
    masks = []
    for trainer in trainers:
        trainer.train()
        masks.append(trainer.head_mask)
    batch = collate(sentences(8, seed=3))
    for trainer, mask in zip(trainers, masks):
        assert trainer.head_mask == mask and mask.kept == 3
        trainer.save_model(str(tmp_path / "pruned"))
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "pruned").eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(**batch).logits, trainer.model.eval()(**batch).logits)
    with pytest.raises(HeadPruningError, match="attached to another session"):
        open_session(tiny_bert(), [keep])
    first.session.detach()
    assert HeadPruningTrainer(
        model=tiny_bert(), args=arguments(tmp_path, **options), pruners=[keep], **train
    ).session.pruners == [keep]


def test_a_trainer_that_cannot_be_built_leaves_the_model_alone(tmp_path):
    model = tiny_bert()
    with pytest.raises(ValueError, match="eval_dataset"):
        HeadPruningTrainer(
            model=model,
            args=arguments(tmp_path, eval_strategy="steps"),
            train_dataset=sentences(32),
            pruners=[pruner("dsp", **PIPELINED["dsp"])],
        )
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("own", few([True, False], False))
def test_what_push_to_hub_saves_is_the_pruned_model(tmp_path, own):
    """``push_to_hub`` calls save_model(_internal_call=True) without a folder, then uploads that of the run."""
    model = tiny_bert()
    if own:
        trainer = trainer_of(tmp_path, model=model)
    else:
        trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=sentences(32), data_collator=collate)
        session = open_session(model, [pruner("dsp", **METHODS["dsp"])])
        HeadPruningCallback(session).add_to(trainer)
    trainer.train()
    trainer.save_model()
    trainer.save_model(str(tmp_path / "named"))
    assert (tmp_path / "named" / "masks.safetensors").is_file()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert {"masks.safetensors", "pruning.json", "README.md"} <= before.keys()
    trainer.save_model(_internal_call=True)
    if own:
        trainer.create_model_card(model_name="pruned")
        assert (tmp_path / "README.md").read_bytes() == before["README.md"]
    assert (tmp_path / "model.safetensors").read_bytes() == before["model.safetensors"]
    batch = collate([sentences(4)[i] for i in range(4)])
    plain = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(plain(**batch).logits, model.eval()(**batch).logits, atol=1e-6)


class FillsUp(TrainerCallback):
    """Files may not grow any more from an update on."""

    def __init__(self, step):
        self.step, self.disk = step, contextlib.ExitStack()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.disk.enter_context(no_file_above(5000))


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    full = FillsUp(4)
    trainer = trainer_of(tmp_path, save_strategy="steps", save_steps=2, callbacks=[full])
    with (
        full.disk,
        pytest.raises(HeadPruningError, match=r"checkpoint-4 cannot be written \(.*\); make room") as error,
    ):
        trainer.train()
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["checkpoint-2"] and last_checkpoint(tmp_path).step == 2


@pytest.mark.parametrize("method, options", [("random", {"num_of_heads": 3}), ("lock", {})])
def test_a_full_disk_leaves_no_half_of_a_model(tmp_path, method, options):
    model = tiny_bert()
    model.bert.encoder.layer[0].intermediate.dense.weight.data[:4] = 0.0
    trainer = trainer_of(tmp_path, method, options, model=model, max_steps=1)
    trainer.train()
    before = os.listdir(tmp_path)
    with no_file_above(5000), pytest.raises(HeadPruningError, match="cannot be written"):
        trainer.save_model(str(tmp_path / "pruned"))
    assert os.listdir(tmp_path) in ([*before, "pruned"], ["pruned", *before]) and not os.listdir(tmp_path / "pruned")


def test_a_second_run_in_one_folder_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=1)
    with held(tmp_path), pytest.raises(HeadPruningError, match="Another run is writing to"):
        trainer.train()
    trainer.train()
