"""Pruners of weights in a Trainer: schedule, evaluation, checkpoints, precision, exports, what is refused."""

import json

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from transformers import (
    AutoModelForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
)

from head_pruning import HeadMask, HeadPruningError
from head_pruning.cli import main
from head_pruning.surgery.removal import remove_heads
from head_pruning.weights import load_weight_masks
from hf_plugin import HeadPruningCallback, HeadPruningTrainer, open_session, pruner, save_compact
from hf_plugin.training.checkpoints import STATE_FILE
from tests.few import few
from tests.hf.tiny import arguments, collate, sentences, tiny_bert
from tests.hf.training.test_trainer import METHODS as HEAD_METHODS
from tests.hf.training.test_trainer import StopAt, same, same_session, weights

# Of 12 updates: masks at 3 and 6, then at each from 9 on.
CUBIC = {"final_threshold": 0.2, "warmup_steps": 2, "initial_warmup": 1, "final_warmup": 2, "deltaT": 3}
PLATON = {**CUBIC, "beta2": 0.9}
GRADUAL = {"target_sparsity": 0.8, "pruning_frequency": 2, "policy_begin_step": 0, "policy_end_step": 8}
METHODS = {
    "platon": PLATON,
    "magnitude": CUBIC,
    "movement": {**CUBIC, "mask_policy": "nested"},
    "gradual_magnitude": GRADUAL,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SIZE = 2 * (4 * 16 * 16 + 2 * 16 * 32 + 5 * 16 + 32)  # what is pruned of the tiny BERT


def trainer_of(folder, method="platon", options=None, model=None, heads=None, mask_steps=0, **training):
    train = {"train_dataset": sentences(32), "eval_dataset": sentences(16, seed=1), "data_collator": collate}
    train |= {name: training.pop(name) for name in ("callbacks", "compute_metrics") if name in training}
    pruners = [pruner(method, **(METHODS[method] if options is None else options))]
    return HeadPruningTrainer(
        model=model or tiny_bert(),
        args=arguments(folder, **training),
        pruners=[*([heads] if heads else []), *pruners],
        mask_steps=mask_steps,
        **train,
    )


def zeros(model, names=None) -> int:
    return sum(int((p == 0).sum()) for name, p in model.named_parameters() if names is None or name in names)


class Watch(TrainerCallback):
    """The zeros among the pruned weights, and the masks, after each update."""

    def __init__(self):
        self.zeros, self.masks = {}, {}

    def of(self, trainer):
        self.session = trainer.session
        trainer.add_callback(self)
        return trainer

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.masks[state.global_step] = self.session.weight_masks()
        self.zeros[state.global_step] = zeros(model, self.session.pruners[-1].sizes)


def equal_masks(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_masks_come_and_go_as_the_schedule_says(tmp_path):
    watch = Watch()
    trainer = watch.of(trainer_of(tmp_path, callbacks=[]))
    assert sum(trainer.session.pruners[0].sizes.values()) == SIZE
    trainer.train()
    expected = {3: 1 - (0.2 + 0.8 * (1 - 1 / 6) ** 3), 6: 1 - (0.2 + 0.8 * (1 - 4 / 6) ** 3)}
    expected |= dict.fromkeys(range(9, 13), 0.8)
    for step, found in watch.zeros.items():
        if step in expected:  # strictly below the k-th smallest score
            assert found == int(SIZE * expected[step]) - 1
        else:
            assert found < SIZE // 20
    assert zeros(trainer.model, trainer.session.pruners[0].sizes) == int(SIZE * 0.8) - 1
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["prune_target"] for entry in logs][:2] == [1.0, 1.0] and logs[-1]["prune_target"] == 0.2
    assert logs[-1]["weights_kept"] == (SIZE - watch.zeros[12]) / SIZE and logs[-1]["mask_threshold"] > 0
    assert trainer.head_mask is None


class TestResume:
    """A run that was stopped goes on to the bits of one that was not: in the cubic phase and in the final one."""

    @pytest.mark.parametrize("stop", few([5, 10], 5))
    @pytest.mark.parametrize(
        "method, training",
        [
            pytest.param("platon", {"gradient_accumulation_steps": 2}, id="platon"),
            pytest.param("platon", {"bf16": True}, id="bf16", marks=pytest.mark.slow),
            pytest.param("magnitude", {}, id="magnitude", marks=pytest.mark.slow),
            pytest.param("movement", {}, id="nested", marks=pytest.mark.slow),
            pytest.param("gradual_magnitude", {}, id="retained", marks=pytest.mark.slow),
        ],
    )
    def test_bit_equal(self, tmp_path, method, training, stop):
        whole = trainer_of(tmp_path / "whole", method, **training)
        whole.train()
        training = {**training, "save_strategy": "steps", "save_steps": stop}
        trainer_of(tmp_path / "parts", method, callbacks=[StopAt(stop)], **training).train()
        parts = trainer_of(tmp_path / "parts", method, model=tiny_bert(seed=1), **training)
        parts.train(resume_from_checkpoint=True)
        assert parts.state.global_step == 12
        assert same(weights(whole.model), weights(parts.model))
        assert same_session(whole.session, parts.session)
        assert same(whole.session.tensor_state(), parts.session.tensor_state())

    @pytest.mark.slow
    def test_with_head_gates(self, tmp_path):
        def build(folder, **more):
            heads = pruner("dsp", **HEAD_METHODS["dsp"])
            return trainer_of(folder, heads=heads, save_strategy="steps", save_steps=5, **more)

        whole = build(tmp_path / "whole")
        whole.train()
        build(tmp_path / "parts", callbacks=[StopAt(5)]).train()
        parts = build(tmp_path / "parts", model=tiny_bert(seed=1))
        parts.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-5"))
        assert same(weights(whole.model), weights(parts.model))
        assert same_session(whole.session, parts.session)
        assert whole.head_mask == parts.head_mask and whole.head_mask.kept == 3

    def test_a_missing_or_damaged_state_is_refused(self, tmp_path):
        trainer_of(tmp_path, save_strategy="steps", save_steps=4).train()
        state = tmp_path / "checkpoint-8" / STATE_FILE
        content = state.read_bytes()
        state.write_bytes(content[:-9])
        with pytest.raises(HeadPruningError, match=f"{STATE_FILE} is damaged"):
            trainer_of(tmp_path).train(resume_from_checkpoint=str(state.parent))
        state.write_bytes((tmp_path / "checkpoint-4" / STATE_FILE).read_bytes())
        with pytest.raises(HeadPruningError, match="is of update 4 but its trainer_state.json of update 8"):
            trainer_of(tmp_path).train(resume_from_checkpoint=str(state.parent))
        state.unlink()
        with pytest.raises(HeadPruningError, match=f"checkpoint-8 lacks {STATE_FILE}"):
            trainer_of(tmp_path).train(resume_from_checkpoint=str(state.parent))
        with pytest.raises(HeadPruningError, match="pruned with platon, this run uses magnitude"):
            trainer_of(tmp_path, "magnitude").train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))

    def test_the_state_is_written_before_what_makes_a_checkpoint_whole(self, tmp_path, monkeypatch):
        from transformers import TrainerState

        seen = []
        write = TrainerState.save_to_json
        monkeypatch.setattr(
            TrainerState,
            "save_to_json",
            lambda self, path: (seen.append((tmp_path / "checkpoint-5" / STATE_FILE).is_file()), write(self, path)),
        )
        trainer_of(tmp_path, save_strategy="steps", save_steps=5, max_steps=5).train()
        assert seen == [True]


@pytest.mark.parametrize("own_trainer", few([True, False], False))
def test_evaluation_sees_masked_weights_and_training_does_not(tmp_path, own_trainer):
    options = {"eval_strategy": "steps", "eval_steps": 2}
    model = tiny_bert(**NO_DROPOUT)  # evaluation draws random numbers too
    if own_trainer:
        trainer = trainer_of(tmp_path, model=model, **options)
        session = trainer.session
    else:
        session = open_session(model, [pruner("platon", **PLATON)])
        train = {"train_dataset": sentences(32), "eval_dataset": sentences(16, seed=1), "data_collator": collate}
        trainer = Trainer(model=model, args=arguments(tmp_path, **options), **train)
        HeadPruningCallback(session).add_to(trainer)
    names, seen = session.pruners[0].sizes, {False: [], True: []}
    model.register_forward_pre_hook(lambda module, args: seen[module.training].append(zeros(module, names)))
    trainer.train()
    plain = trainer_of(tmp_path / "plain", model=tiny_bert(**NO_DROPOUT))
    plain.train()
    assert same(weights(model), weights(plain.model))  # what evaluation did was taken back
    evaluated = seen[False][::2]  # two batches each, after updates 2, 4, ..., 12
    assert evaluated[0] < SIZE // 20 and 0.3 * SIZE < evaluated[1] < evaluated[2] <= int(SIZE * 0.8)
    assert evaluated[1] == seen[False][3] and evaluated[-1] == int(SIZE * 0.8) - 1
    assert max(seen[True][4], seen[True][8]) < SIZE // 20  # the updates after evaluations between two masks
    scored = trainer.evaluate()["eval_loss"]
    assert scored == trainer.state.log_history[-1]["eval_loss"]


def test_best_checkpoints_are_at_the_target_and_bring_their_masks_back(tmp_path):
    scores = iter([0.9, 0.8, 0.7, 0.6, 0.5])
    options = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 3, "save_steps": 3}
    watch = Watch()
    trainer = trainer_of(
        tmp_path,
        options={**PLATON, "deltaT": 2},  # a mask of its own at 10 and 12
        compute_metrics=lambda prediction: {"score": next(scores)},
        load_best_model_at_end=True,
        metric_for_best_model="score",
        **options,
    )
    watch.of(trainer).train()
    assert trainer.state.best_global_step == 9
    assert not equal_masks(watch.masks[9], watch.masks[12])
    assert equal_masks(trainer.session.weight_masks(), watch.masks[9])
    best = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-9")
    assert same(weights(trainer.model), weights(best))
    assert zeros(trainer.model, trainer.session.pruners[0].sizes) == watch.zeros[9]


def test_no_best_checkpoint_before_the_target(tmp_path, caplog):
    trainer = trainer_of(
        tmp_path,
        options={**PLATON, "final_warmup": 0},
        compute_metrics=lambda prediction: {"score": 1.0},
        **{"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 4, "save_steps": 4},
        **{"load_best_model_at_end": True, "metric_for_best_model": "score"},
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint is None
    assert "never trained with exactly the weights that are kept; lower warmup_steps" in caplog.text
    assert zeros(trainer.model, trainer.session.pruners[0].sizes) == int(SIZE * 0.8) - 1


@pytest.mark.slow
def test_callback_in_a_plain_trainer_equals_the_trainer_and_resumes(tmp_path):
    ours = trainer_of(tmp_path / "ours")
    ours.train()

    def plain(model, **options):
        args = arguments(tmp_path / "own", save_strategy="steps", save_steps=5, **options)
        own = Trainer(model=model, args=args, train_dataset=sentences(32), data_collator=collate)
        session = open_session(model, [pruner("platon", **PLATON)])
        HeadPruningCallback(session).add_to(own)
        return own, session

    own, session = plain(tiny_bert())
    own.add_callback(StopAt(5))
    own.train()
    again, session = plain(tiny_bert(seed=1))
    again.train(resume_from_checkpoint=True)
    assert same(weights(ours.model), weights(again.model)) and same_session(ours.session, session)
    stored = json.loads((tmp_path / "own" / "checkpoint-5" / "trainer_state.json").read_text())
    assert len(json.dumps(stored["stateful_callbacks"]["HeadPruningCallback"])) < 16000  # not the size of the model


@pytest.mark.slow
def test_heads_and_weights_in_one_session(tmp_path, capsys):
    """Both targets exactly, weights of removed heads not counted; and what every file and command says of them."""
    heads = pruner("dsp", **HEAD_METHODS["dsp"])
    trainer = trainer_of(tmp_path / "run", heads=heads, mask_steps=6)
    trainer.train()
    model, masks = trainer.model, trainer.session.weight_masks()
    assert trainer.head_mask.kept == 3
    heads_left = SIZE - 5 * (4 * 4 * 16 + 3 * 4)  # without the weights and biases of five heads
    kept = heads_left - int(heads_left * 0.8) + 1
    assert sum(int(keep.sum()) for keep in masks.values()) == kept
    trainer.save_model(str(tmp_path / "pruned"))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "pruned").eval()
    batch = collate(sentences(8, seed=3))
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        assert torch.allclose(plain(**batch).logits, expected, atol=1e-6)
    for name, value in plain.state_dict().items():
        if name in masks:
            assert not value[~masks[name]].any(), name
    for path in (tmp_path / "pruned" / "masks.safetensors", tmp_path / "run" / "mask12.safetensors"):
        assert equal_masks(load_weight_masks(path), masks) and HeadMask.load(path) == trainer.head_mask
    report = json.loads((tmp_path / "pruned" / "pruning.json").read_text())
    numbers = {"weights_kept": kept, "weights_total": heads_left, "density": kept / heads_left}
    numbers |= {"weights_of_dense": SIZE, "density_of_dense": kept / SIZE}
    told = report["weights"]
    assert report["heads_kept"] == 3 and {name: told[name] for name in numbers} == numbers
    assert kept == sum(int(torch.count_nonzero(plain.get_parameter(name))) for name in masks)
    assert sum(told["removed_with_heads"].values()) == SIZE - heads_left
    assert set(told["left_dense"]) == {"bert.pooler.dense.weight", "classifier.weight"}
    words = f"{kept:,} of {heads_left:,} weights of what is left ({kept / heads_left:.2%})"
    card = (tmp_path / "pruned" / "README.md").read_text()
    assert words in card and "2 matrices, bert.pooler.dense.weight, classifier.weight." in card
    last = (tmp_path / "pruned" / "weight_density.txt").read_text().splitlines()[-1].split()
    assert last == [
        "all",
        str(kept),
        str(heads_left),
        f"{100 * kept / heads_left:.2f}",
        str(SIZE),
        f"{100 * kept / SIZE:.2f}",
    ]
    for name, format in (("masked", "masked"), ("small", "compact")):
        main(["export", str(tmp_path / "pruned"), str(tmp_path / name), "--to", format])
        assert words in capsys.readouterr().out
    for name in ("pruned", "masked", "small"):
        main(["inspect", str(tmp_path / name), "--length", "8", "--json"])
        found = json.loads(capsys.readouterr().out)["weights"]
        assert {key: found[key] for key in numbers} == numbers, name
        main(["inspect", str(tmp_path / name), "--length", "8"])
        assert f"With the removed heads there were {SIZE:,}" in capsys.readouterr().out
        assert words in (tmp_path / name / "README.md").read_text()
    cut = load_weight_masks(tmp_path / "small" / "masks.safetensors")
    assert (
        sum(int(mask.sum()) for mask in cut.values()) == kept
        and HeadMask.load(tmp_path / "small" / "masks.safetensors") == trainer.head_mask
    )
    assert report["weights"]["nonzero_parameters"] == report["sparsity"]["nonzero_parameters"]
    assert report["sparsity"]["parameters"] - report["sparsity"]["nonzero_parameters"] == zeros(plain)

    # The heads really gone, the zeros still there.
    trainer.session.detach()
    before = zeros(model)
    remove_heads(model, trainer.session.unit_map, trainer.head_mask)
    save_compact(model, tmp_path / "compact", method="dsp+platon")
    smaller = AutoModelForSequenceClassification.from_pretrained(tmp_path / "compact").eval()
    with torch.no_grad():
        assert torch.allclose(smaller(**batch).logits, expected, atol=1e-6)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in plain.parameters())
    assert 0 < zeros(smaller) < before


@pytest.mark.slow
def test_saved_weights_alone_load_without_us(tmp_path):
    trainer = trainer_of(tmp_path / "run")
    trainer.train()
    trainer.save_model(str(tmp_path / "pruned"))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "pruned")
    assert same(weights(plain), weights(trainer.model))
    assert equal_masks(load_weight_masks(tmp_path / "pruned" / "masks.safetensors"), trainer.session.weight_masks())
    report = json.loads((tmp_path / "pruned" / "pruning.json").read_text())["weights"]
    assert report["method"] == "platon" and report["parameters"] - report["nonzero_parameters"] == zeros(plain)
    assert not (tmp_path / "pruned" / STATE_FILE).exists()


def test_lock_keeps_the_zeros_while_the_rest_is_trained(tmp_path):
    first = trainer_of(tmp_path)
    first.train()
    before = weights(first.model)
    first.session.detach()
    second = trainer_of(tmp_path, "lock", {}, model=first.model)
    second.train()
    masks = second.session.weight_masks()
    for name, value in second.model.state_dict().items():
        if name in masks:
            assert torch.equal(value == 0, before[name] == 0) and torch.equal(masks[name], value != 0), name
    assert not same(before, weights(second.model))
    with pytest.raises(HeadPruningError, match="no zeros to lock"):
        trainer_of(tmp_path, "lock", {"weights_include": r"layer.*dense\.weight"}).train()


@pytest.mark.slow
def test_bf16_autocast_masks_the_float32_weights(tmp_path):
    trainer = trainer_of(tmp_path, bf16=True)
    trainer.train()
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    assert zeros(trainer.model, trainer.session.pruners[0].sizes) == int(SIZE * 0.8) - 1
    plain = trainer_of(tmp_path)
    plain.train()
    assert not same(weights(plain.model), weights(trainer.model))  # it was another precision


class TestHalfPrecision:
    """Loss scaling, with torch's own scaler and accelerate's optimizer on the CPU.

    Fused optimizers, transformers' default, unscale gradients and skip overflows by themselves.
    """

    WAYS = [(1.0, True), (0.0, True), (0.0, False)]

    def drive(self, tmp_path, method, scale, updates=12, spoil=None, max_grad_norm=1.0, fused=True):
        from accelerate import Accelerator
        from accelerate.optimizer import AcceleratedOptimizer
        from transformers import TrainerControl, TrainerState

        args, state, control = arguments(tmp_path, max_grad_norm=max_grad_norm), TrainerState(), TrainerControl()
        model = tiny_bert(**NO_DROPOUT)
        session = open_session(model, [pruner(method, **METHODS[method])])
        callback = HeadPruningCallback(session).add_to(Trainer(model=model, args=args))
        Accelerator(cpu=True)
        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        optimizer = AcceleratedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, fused=fused), scaler=scaler)
        state.max_steps = updates
        events = {"model": model, "optimizer": optimizer}
        callback.on_train_begin(args, state, control, **events)
        model.train()
        found, step_now = [], session.before_step

        def before_step(optimizer, **more):
            self.norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])))
            step_now(optimizer, **more)

        self.norms, session.before_step = [], before_step
        for step in range(updates):
            callback.on_step_begin(args, state, control, **events)
            loss = model(**collate(sentences(4, seed=step))).loss
            (loss if scaler is None else scaler.scale(loss)).backward()
            if step == spoil:
                for parameter in model.parameters():
                    parameter.grad.fill_(float("inf"))
            if max_grad_norm > 0:
                if scaler is not None:
                    scaler.unscale_(optimizer.optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
            callback.on_pre_optimizer_step(args, state, control, **events)
            optimizer.step()
            callback.on_optimizer_step(args, state, control, **events)
            optimizer.zero_grad()
            state.global_step += 1
            callback.on_step_end(args, state, control, **events)
            found.append(weights(model))
        return found, session, scaler

    @pytest.mark.parametrize("method", ["platon", "gradual_magnitude"])
    @pytest.mark.parametrize("max_grad_norm, fused", WAYS)
    def test_the_scale_does_not_matter(self, tmp_path, method, max_grad_norm, fused):
        plain, session, _ = self.drive(tmp_path, method, None, max_grad_norm=max_grad_norm, fused=fused)
        norms = self.norms
        scaled, other, _ = self.drive(tmp_path, method, 2.0**12, max_grad_norm=max_grad_norm, fused=fused)
        np.testing.assert_allclose(norms, self.norms, rtol=1e-4)  # already before the step
        assert equal_masks(session.weight_masks(), other.weight_masks())
        for name, value in plain[-1].items():
            assert torch.allclose(value, scaled[-1][name], atol=1e-6), name
        for name, value in session.tensor_state().items():
            if value.is_floating_point():
                assert torch.allclose(value, other.tensor_state()[name], rtol=1e-3, atol=1e-8), name

    @pytest.mark.parametrize("method", ["platon", "gradual_magnitude"])
    @pytest.mark.parametrize("max_grad_norm, fused", WAYS)
    def test_an_overflow_leaves_weights_masks_and_averages_as_they_were(self, tmp_path, method, max_grad_norm, fused):
        spoiled = {"spoil": 10, "max_grad_norm": max_grad_norm, "fused": fused}
        found, session, scaler = self.drive(tmp_path, method, 2.0**12, **spoiled)
        assert scaler.get_scale() == 2.0**11
        assert same(found[9], found[10]) and not same(found[10], found[11])
        assert zeros(session.model, session.pruners[0].sizes) in (
            int(SIZE * 0.8) - 1,
            sum(int(target.parameter.numel() * 0.8) for target in session.pruners[0].targets),
        )
        assert all(
            torch.isfinite(value).all() for value in session.tensor_state().values() if value.is_floating_point()
        )


class TestRefusals:
    def test_a_callback_that_cannot_see_evaluations(self, tmp_path):
        model = tiny_bert()
        session = open_session(model, [pruner("platon", **PLATON)])
        args = arguments(tmp_path)
        own = Trainer(
            model=model,
            args=args,
            train_dataset=sentences(8),
            data_collator=collate,
            callbacks=[HeadPruningCallback(session)],
        )
        with pytest.raises(HeadPruningError, match="add_to"):
            own.train()

    def test_deepspeed(self, tmp_path):
        model = tiny_bert()
        trainer = Trainer(model=model, args=arguments(tmp_path))
        assert trainer.is_deepspeed_enabled is False
        trainer.is_deepspeed_enabled = True  # the real one needs a GPU
        with pytest.raises(HeadPruningError, match="not pruned under DeepSpeed"):
            HeadPruningCallback(open_session(model, [pruner("platon", **PLATON)])).add_to(trainer)
        HeadPruningCallback(open_session(tiny_bert(), [pruner("dsp", **HEAD_METHODS["dsp"])])).add_to(trainer)

    @pytest.mark.parametrize(
        "version, states, method, words",
        [
            (1, "FULL_STATE_DICT", "dsp", "under FSDP2 alone"),
            (2, "SHARDED_STATE_DICT", "dsp", "with whole state dicts"),
            (2, "FULL_STATE_DICT", "qat", "whole matrices"),
        ],
    )
    def test_what_cannot_be_sharded(self, tmp_path, monkeypatch, version, states, method, words):
        plugin = FullyShardedDataParallelPlugin(fsdp_version=version, state_dict_type=states)
        model = tiny_bert()
        trainer = Trainer(model=model, args=arguments(tmp_path))
        trainer.is_fsdp_enabled = True  # the real one needs several processes
        monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", plugin)
        session = open_session(model, [pruner(method, **HEAD_METHODS.get(method, {}))])
        with pytest.raises(HeadPruningError, match=words):
            HeadPruningCallback(session).add_to(trainer)

    def test_a_cpu_that_accelerate_would_not_shard_on(self, tmp_path):
        model = tiny_bert()
        trainer = Trainer(model=model, args=arguments(tmp_path))
        trainer.args.fsdp = True  # which a Trainer takes where there are several processes
        with pytest.raises(HeadPruningError, match="--fsdp does not shard the model here"):
            HeadPruningCallback(open_session(model, [pruner("dsp", **HEAD_METHODS["dsp"])])).add_to(trainer)

    def test_pipelined_heads_beside_weights(self):
        model = tiny_bert()
        with pytest.raises(HeadPruningError, match="Pipelined pruning of heads"):
            open_session(model, [pruner("dsp", num_of_heads=3), pruner("platon", **PLATON)])
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_unknown_pruners_and_options(self):
        with pytest.raises(HeadPruningError, match="no pruner platoon; choose one of .*dsp.*platon"):
            pruner("platoon")
        with pytest.raises(HeadPruningError, match="platon has no option num_of_heads; it has .*beta2"):
            pruner("platon", num_of_heads=3)


def test_models_without_attention_by_named_weights():
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic", num_labels=2)
    torch.manual_seed(0)
    model = ResNetForImageClassification(config).train()
    options = {
        "final_threshold": 0.25,
        "warmup_steps": 1,
        "final_warmup": 1,
        "weights_include": r"convolution\.weight",
    }
    session = open_session(model, [pruner("magnitude", **options)], total_steps=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for step in range(4):
        session.before_update(step)
        optimizer.zero_grad()
        session.loss(model(images, labels=torch.tensor([0, 1])).loss).backward()
        session.after_backward()
        session.before_step()
        optimizer.step()
        session.after_step()
    session.harden()
    names = session.pruners[0].sizes
    assert all("convolution" in name for name in names)
    total = sum(names.values())
    assert zeros(model, names) == int(total * 0.75) - 1 and np.isclose(
        session.metrics()["weights_kept"], 0.25, atol=0.01
    )
