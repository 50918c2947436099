"""Distillation and SPD in transformers: families of models, both manual lines on all tasks, resume, composition."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import BertForSequenceClassification, TrainingArguments

from head_pruning import HeadMask, HeadPruningError
from head_pruning.weights import load_weight_masks
from hf_plugin import HeadPruningCallback, HeadPruningTrainer, open_session, pruner
from hf_plugin.command_line.arguments import parse
from hf_plugin.glue.run import run
from hf_plugin.mapping.unit_map import unit_map
from hf_plugin.training.attention import ask_for_probabilities, switch_to_eager
from tests.few import few
from tests.hf.families import FAMILIES, build, make, missing
from tests.hf.few_models import batch_of
from tests.hf.few_models import make as make_few
from tests.hf.glue_files import FOLDERS
from tests.hf.manual_lines import spd, spd_teacher
from tests.hf.script_runs import write_place
from tests.hf.tiny import arguments, collate, sentences, tiny_bert

OLDEST = transformers.__version__.startswith("5.0.")
NAMES = "bert roberta distilbert deberta deberta-v2 electra mpnet modernbert vit gpt2 llama bart t5".split()
# Of these transformers 5.0 gives no attention probabilities to those who ask the attention alone.
SILENT = ("modernbert", "vit", "t5") if OLDEST else ()
# What transformers 5.0 calls it, and later releases.
CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)
QUICK = "--per_gpu_train_batch_size 8 --num_train_epochs 4 --num_prune_epochs 2 --use_cpu --disable_tqdm True".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("spd"), *FOLDERS)


# -- families ---------------------------------------------------------------------------------------------------------


def output(model, inputs):
    torch.manual_seed(3)  # dropout's draws
    return model(**inputs)


@pytest.mark.parametrize("name", NAMES)
def test_every_family_is_grafted_by_its_layers(name):
    family = next(family for family in FAMILIES if family.name == name)
    if missing(family):
        pytest.skip(missing(family))
    if name in SILENT:
        pytest.skip(f"transformers {transformers.__version__} hides the attention probabilities of {name}")
    torch.manual_seed(5)
    model, inputs = build(family).train(), make(family).inputs
    teacher = copy.deepcopy(model)
    mapped = unit_map(model)
    with torch.no_grad():
        for layer in mapped.layers:
            for parameter in teacher.get_submodule(layer).parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    method = pruner("spd", distill_logits=0.0, teacher_path="given")
    session = open_session(model, [method], load_teacher=lambda path, needs: (teacher, mapped), total_steps=4)
    switch_to_eager(teacher)
    ask_for_probabilities(teacher, mapped)
    expected = output(copy.deepcopy(teacher).train(), inputs)[0]
    alone = output(model, inputs)[0]
    method.draw = lambda step: np.zeros(len(mapped.layers), dtype=bool)
    session.before_update(0)
    assert torch.equal(output(model, inputs)[0], expected) and not torch.equal(alone, expected)
    hidden = output(model, {**inputs, "output_hidden_states": True})
    assert all(key in hidden for key in ("hidden_states",)) or "decoder_hidden_states" in hidden
    drawn = np.arange(len(mapped.layers)) % 2 == 1
    method.draw = lambda step: drawn
    session.before_update(0)
    given = output(model, inputs)[0]
    session.loss(given.float().mean()).backward()
    for layer, mine in zip(mapped.layers, drawn):
        gradients = [p.grad is not None for p in model.get_submodule(layer).parameters()]
        assert any(gradients) == bool(mine), layer
    inside = tuple(f"{layer}." for layer in mapped.layers)
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith(inside))
    assert torch.equal(output(model.eval(), inputs)[0], output(copy.deepcopy(model), inputs)[0])
    session.detach()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", few(["bert", "llama", "bart", "t5"], "bert", "t5"))
def test_plain_distillation_pulls_a_model_to_its_teacher(name):
    if name in SILENT:
        pytest.skip(f"transformers {transformers.__version__} hides the attention probabilities of {name}")
    teacher, student = make_few(name), make_few(name)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter, generator=None))
    # In a sequence model padding is no part of the loss.
    options = {"distill_hidden": 0.1, "distill_attention": 0.1, "distill_task": 0.0, "teacher_path": "given"}
    mapped = unit_map(teacher)
    teacher.set_attn_implementation("eager")
    session = open_session(
        student, [pruner("logits", **options)], load_teacher=lambda path, needs: (teacher, mapped), total_steps=30
    )
    optimizer, losses = torch.optim.Adam(student.parameters(), lr=3e-3), []
    for step in range(30):
        session.before_update(step)
        batch = batch_of(name, step % 3)
        loss = session.loss(student.train()(**batch).loss, batch, masks={"encoder": batch["attention_mask"].bool()})
        optimizer.zero_grad()
        loss.backward()
        session.after_backward()
        session.before_step(optimizer)
        optimizer.step()
        session.after_step()
        losses.append(float(loss))
    assert sum(losses[-3:]) < 0.3 * sum(losses[:3])
    assert set(session.metrics()) == {"logits_logits_loss", "logits_hidden_loss", "logits_attention_loss"}


@pytest.mark.slow
def test_a_model_is_compiled_while_it_is_grafted():
    model = tiny_bert().train()
    session = open_session(model, [pruner("spd", replacing_rate=0.5)], total_steps=8)
    compiled = torch.compile(model, backend="eager")
    rows = collate(sentences(4))
    for step in range(4):
        session.enter_phase(step)
        session.before_update(step)
        torch.manual_seed(1)
        expected = model(**rows).logits
        torch.manual_seed(1)
        assert torch.allclose(compiled(**rows).logits, expected, atol=1e-6)
        loss = session.loss(compiled(**rows).loss, rows)
        loss.backward() if loss.requires_grad else None
        session.after_backward()
        session.after_step()


# -- scripts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", few(FOLDERS, "STS-B"))
def test_both_manual_lines_on_every_task(place, task, monkeypatch):
    monkeypatch.chdir(place)
    parse(spd_teacher(task), "run_glue")
    run(parse([*spd_teacher(task), "--max_steps", "4", "--use_cpu", "--disable_tqdm", "True"], "run_glue"))
    whole = parse(spd(task), "run_glue")
    assert [each.name for each in whole.pruners] == ["spd_magnitude", "spd"]
    assert whole.training.num_train_epochs == 60 and whole.training.learning_rate == 6.4e-4
    assert any("--do_lower_case" in note for note in whole.notes)
    results = run(parse([*spd(task), *QUICK], "run_glue"))
    out = place / "spd" / task
    masks = load_weight_masks(out / "masks.safetensors")
    weights = load_file(out / "model.safetensors")
    assert len(masks) == 12
    for name, keep in masks.items():
        assert int(keep.sum()) == int(keep.numel() * 0.1 + 1e-6) and not weights[name][~keep].any(), name
    report = json.loads((out / "pruning.json").read_text())
    assert results["weights_kept"] == sum(int(keep.sum()) for keep in masks.values())
    assert report["weights"]["density"] == pytest.approx(0.1, abs=2e-3)
    model = BertForSequenceClassification.from_pretrained(out)  # a plain model
    assert not any("teacher" in name for name, _ in model.named_parameters())


@pytest.mark.slow
@pytest.mark.skipif(OLDEST, reason="transformers 5.0 saves LayerNorms under names that it cannot resume from")
def test_a_killed_run_ends_bit_equal(place, monkeypatch):
    monkeypatch.chdir(place)
    teacher = [*spd_teacher("RTE"), "--max_steps", "4", "--use_cpu", "--disable_tqdm", "True"]
    run(parse([*teacher, "--output_dir", "resume-teacher"], "run_glue"))
    line = [word for word in spd("RTE") if word != "--overwrite_output_dir"]
    line += [*QUICK, "--model_name_or_path", "resume-teacher", "--save_steps", "1", "--save_total_limit", "99"]
    run(parse([*line, "--output_dir", "whole"], "run_glue"))
    for step in (2, 6, 7, 10):  # before, at and after the second phase begins
        (place / f"part{step}").mkdir()
        shutil.copytree(place / "whole" / f"checkpoint-{step}", place / f"part{step}" / f"checkpoint-{step}")
        run(parse([*line, "--output_dir", f"part{step}"], "run_glue"))
        for name in ("model.safetensors", "masks.safetensors", "checkpoint-12/pruning_state.safetensors"):
            ours, theirs = place / f"part{step}" / name, place / "whole" / name
            assert ours.read_bytes() == theirs.read_bytes(), (step, name)
    logs = json.loads((place / "whole" / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
    assert not (place / "whole" / "checkpoint-12" / "teacher").exists() and logs


@pytest.mark.parametrize("method", few(["dsp", "platon"], "platon"))
def test_distillation_beside_another_method(place, monkeypatch, method):
    monkeypatch.chdir(place)
    if not (place / "teacher" / "RTE" / "model.safetensors").is_file():
        run(parse([*spd_teacher("RTE"), "--max_steps", "4", "--use_cpu", "--disable_tqdm", "True"], "run_glue"))
    words = "--task_name RTE --data_dir data/RTE --do_train --do_eval --max_steps 12 --learning_rate 1e-3 --use_cpu"
    words += " --per_device_train_batch_size 4 --disable_tqdm True --overwrite_output_dir --save_strategy no"
    words += f" --model_name_or_path bert-base-uncased --output_dir beside-{method} --distill logits"
    words += " --distill_temperature 2 --distill_hidden 0.5"
    if method == "platon":  # its teacher is on the hub, and has been fetched before
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        fetched = place / "hub" / "models--someone--teacher"
        shutil.copytree(place / "teacher" / "RTE", fetched / "snapshots" / "0123")
        (fetched / "refs").mkdir()
        (fetched / "refs" / "main").write_text("0123")
        words += " --teacher_path someone/teacher --cache_dir hub"
    else:
        words += " --teacher_path teacher/RTE"
    if method == "dsp":
        words += " --pruner dsp --num_of_heads 7 --joint_pruning --annealing --cooldown_steps 0.5"
    else:
        words += " --pruner_name platon --final_threshold 0.25 --warmup_steps 0.2"
    run(parse(words.split(), "run_glue"))
    out = place / f"beside-{method}"
    if method == "dsp":
        assert HeadMask.load(out / "masks.safetensors").kept == 7
    else:
        masks = load_weight_masks(out / "masks.safetensors")
        number = sum(keep.numel() for keep in masks.values())
        assert sum(int(keep.sum()) for keep in masks.values()) == number - int(0.75 * number) + 1
    report = json.loads((out / "pruning.json").read_text())
    assert "logits" in json.dumps(report)


def test_both_targets_are_exact_with_heads_weights_and_spd_in_one_run(tmp_path):
    torch.manual_seed(0)
    model = tiny_bert()
    heads = pruner("dsp", num_of_heads=5, joint_pruning=True, annealing=True, cooldown_steps=0.5)
    weights = pruner("platon", final_threshold=0.25, warmup_steps=0.2)
    trainer = HeadPruningTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=16),
        pruners=[heads, weights, pruner("spd", replacing_rate=0.5)],
        train_dataset=sentences(64),
        data_collator=collate,
    )
    trainer.train()
    assert trainer.head_mask.kept == 5
    masks = trainer.session.weight_masks()
    # Without the weights and biases of the three heads that are gone: four projections of width 4, three biases.
    left = sum(keep.numel() for keep in masks.values()) - 3 * (4 * 4 * 16 + 3 * 4)
    assert sum(int(keep.sum()) for keep in masks.values()) == left - int(0.75 * left) + 1


def test_the_best_model_is_one_at_the_target(tmp_path):
    model = tiny_bert()
    trainer = HeadPruningTrainer(
        model=model,
        args=arguments(
            tmp_path,
            max_steps=16,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
        ),
        pruners=[pruner("spd_magnitude", sparsity=0.8), pruner("spd")],
        train_dataset=sentences(64),
        eval_dataset=sentences(16, seed=1),
        data_collator=collate,
    )
    trainer.train()
    assert trainer.state.best_global_step >= 8  # the first half of training prunes
    for name, keep in trainer.session.weight_masks().items():
        assert int(keep.sum()) == int(0.2 * keep.numel() + 1e-6) and not model.get_parameter(name)[~keep].any()


@pytest.mark.slow
def test_gradient_checkpointing_and_accumulation_train_the_same(tmp_path):
    found = []
    for place, options in (("plain", {}), ("checkpointing", {CHECKPOINTING: True})):
        model = tiny_bert()
        trainer = HeadPruningTrainer(
            model=model,
            args=arguments(tmp_path / place, max_steps=6, gradient_accumulation_steps=2, ddp_backend=None, **options),
            pruners=[pruner("spd_magnitude", sparsity=0.8), pruner("spd", replacing_rate=0.5)],
            train_dataset=sentences(64),
            data_collator=collate,
        )
        trainer.train()
        found.append(model.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_the_teacher_computes_in_the_precision_of_its_student(tmp_path):
    model, seen = tiny_bert(), set()
    trainer = HeadPruningTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=2, bf16=True),
        pruners=[pruner("spd")],
        train_dataset=sentences(16),
        data_collator=collate,
    )
    teacher = trainer.session.pruners[0].teacher.model
    for which in (model, teacher):
        dense = which.bert.encoder.layer[0].output.dense
        dense.register_forward_hook(lambda module, args, output, which=which: seen.add((which is model, output.dtype)))
    trainer.train()
    assert seen == {(True, torch.bfloat16), (False, torch.bfloat16)}


@pytest.mark.slow
@pytest.mark.parametrize("published", few([False, True], False))
def test_the_optimizer_of_the_second_phase(tmp_path, published):
    """It begins anew; the published code's goes on, and so it does where the run is resumed."""

    def train(**options):
        trainer = HeadPruningTrainer(
            model=tiny_bert(),
            args=arguments(tmp_path, max_steps=12, save_strategy="steps", save_steps=8),
            pruners=[pruner("spd", replacing_rate=1.0, published_schedule=published, num_prune_epochs=1.0)],
            train_dataset=sentences(16),
            data_collator=collate,
        )
        trainer.train(**options)
        return trainer

    whole = train()
    second = whole.session.pruners[0].second
    assert second == 4
    steps = {int(state["step"]) for state in whole.optimizer.state.values()}
    assert steps == {12 if published else 12 - second}
    rates = [entry["learning_rate"] for entry in whole.state.log_history if "learning_rate" in entry]
    assert rates[second] == rates[0] > rates[second - 1]
    again = train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    for one, two in zip(whole.model.parameters(), again.model.parameters()):
        assert torch.equal(one, two)


def test_in_somebodys_own_trainer(tmp_path):
    from transformers import Trainer

    model = tiny_bert()
    session = open_session(model, [pruner("spd_magnitude", sparsity=0.8), pruner("spd")])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, max_steps=12),
        train_dataset=sentences(64),
        data_collator=collate,
    )
    HeadPruningCallback(session).add_to(trainer)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "out")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, before[name]) == (".layer." not in name), name
    rates = [entry["replacing_rate"] for entry in trainer.state.log_history if "replacing_rate" in entry]
    assert rates[0] == 0.8 and rates == sorted(rates) and rates[-1] == 1.0
    assert all(np.isfinite(entry["spd_hidden_loss"]) for entry in trainer.state.log_history if "loss" in entry)


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words, sentence", [
    ("--sparsity 0.9 --pruner_name platon", "--sparsity belongs to spd_magnitude, but the pruner of weights is plat"),
    ("--pruner_name platon --final_threshold 0.1 --target_sparsity 0.3",
     "but the pruner of weights is platon; drop it or choose --pruner_name gradual_magnitude"),
    ("--base_replacing_rate 0.5", "--base_replacing_rate belongs to spd, but no distiller is chosen; drop it or add"),
    ("--distill spd --scheduler_type cubic", "choose one of none, linear, mixed, constantLinearWithGap"),
    ("--teacher_path x", "--teacher_path belongs to dfd, logits, spd, but no distiller is chosen; drop it or ad"),
])  # fmt: skip
def test_mistakes_on_the_command_line(place, monkeypatch, words, sentence):
    monkeypatch.chdir(place)
    line = "--model_name_or_path bert-base-uncased --task_name RTE --data_dir data/RTE --do_train --output_dir no"
    with pytest.raises(HeadPruningError) as refused:
        parse([*line.split(), *words.split()], "run_glue")
    assert sentence in str(refused.value)


def test_a_model_that_was_never_trained_teaches_nothing(place, monkeypatch):
    monkeypatch.chdir(place)
    words = [*spd("RTE"), "--model_name_or_path", "bert-base-uncased", "--output_dir", "untrained"]
    with pytest.raises(HeadPruningError, match="spd would learn from bert-base-uncased itself, whose classifier.bias"):
        run(parse(words, "run_glue"))
    with pytest.raises(HeadPruningError, match="The teacher .*where cannot be loaded"):
        run(parse([*words, "--teacher_path", str(place / "no" / "where")], "run_glue"))


def test_teachers_that_do_not_fit_are_refused(tmp_path):
    tiny_bert(vocab_size=50).save_pretrained(tmp_path / "words")
    tiny_bert(hidden_size=24).save_pretrained(tmp_path / "wide")
    tiny_bert(num_attention_heads=2).save_pretrained(tmp_path / "heads")
    turned = tiny_bert()
    turned.config.id2label = {0: "LABEL_1", 1: "LABEL_0"}
    turned.save_pretrained(tmp_path / "turned")
    for name, options, words in (
        ("words", {}, "vocabulary of 50 tokens and the model to train one of 40"),
        ("turned", {}, "has the classes in the order LABEL_1, LABEL_0"),
        ("wide", {"distill_hidden": 1.0}, "hidden states are 16 wide and its teacher's 24"),
        ("heads", {"distill_attention": 1.0}, "4 heads in an attention where its teacher has 2"),
    ):
        with pytest.raises(HeadPruningError, match=words):
            model = tiny_bert()
            session = open_session(model, [pruner("logits", teacher_path=str(tmp_path / name), **options)])
            session.before_update(0)
            session.loss(model.train()(**collate(sentences(4))).loss)
    # While heads are chosen the teacher waits; what does not fit is told of in the first update.
    tiny_bert(num_labels=3).save_pretrained(tmp_path / "classes")
    trainer = HeadPruningTrainer(
        model=tiny_bert(),
        args=arguments(tmp_path / "run", max_steps=20),
        pruners=[
            pruner("subset", num_of_heads=4, joint_pruning=True),
            pruner("logits", teacher_path=str(tmp_path / "classes")),
        ],
        train_dataset=sentences(16),
        data_collator=collate,
    )
    with pytest.raises(
        HeadPruningError, match=r"logits are of the shape \[\[\d+, 2\]\], its teacher's of \[\[\d+, 3\]\]"
    ):
        trainer.train()
    assert trainer.state.global_step == 0
    # Another width will do where logits alone are compared.
    model = tiny_bert()
    session = open_session(model, [pruner("logits", teacher_path=str(tmp_path / "wide"))])
    session.before_update(0)
    session.loss(model.train()(**collate(sentences(4))).loss).backward()
    with pytest.raises(HeadPruningError, match="differ in .*one cannot stand in for the other"):
        open_session(tiny_bert(), [pruner("spd", teacher_path=str(tmp_path / "wide"))])
