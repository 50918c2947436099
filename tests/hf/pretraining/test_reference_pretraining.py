"""Pretraining as Prune Once for All does it, against numbers recorded from the published code, in float64."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForPreTraining, BertForQuestionAnswering, BertForSequenceClassification

from head_pruning import build_pruner
from head_pruning.outputs import LastLayer
from head_pruning.registry import get_method
from head_pruning.schedules import rewound_rate
from hf_plugin import open_session
from hf_plugin.mapping.unit_map import unit_map

SIZES = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 32}
SIZES |= {"vocab_size": 50, "max_position_embeddings": 24, "hidden_dropout_prob": 0.0}
CLASSES = {"pre": BertForPreTraining, "qa": BertForQuestionAnswering, "cls": BertForSequenceClassification}
LABELS = ("labels", "next_sentence_label", "start_positions", "end_positions")


@pytest.fixture(scope="module")
def read(reference):
    place = reference / "pruneofa"
    if not place.is_dir():
        pytest.skip(f"there are no recorded numbers of Prune Once for All in {reference}")

    def load(name):
        if name.endswith(".json"):
            return json.loads((place / name).read_text(encoding="utf-8"))
        with np.load(place / name, allow_pickle=False) as arrays:
            return dict(arrays)

    return load


def bert(kind: str, state: dict, prefix: str = "") -> torch.nn.Module:
    """A recorded model without dropout, in float64."""
    config = BertConfig(**SIZES, attention_probs_dropout_prob=0.0, num_labels=3 if kind == "cls" else 2)
    config._attn_implementation = "eager"
    model = CLASSES[kind](config)
    own = {name.removeprefix(prefix): torch.from_numpy(v) for name, v in state.items() if name.startswith(prefix)}
    missing, left = model.load_state_dict(own, strict=False)
    assert not left and all("decoder" in name or "position_ids" in name for name in missing), (missing, left)
    model.tie_weights()
    return model.double()


def build(name: str, **options):
    return build_pruner(get_method(name), SimpleNamespace(**options))


def distiller(alpha: float, kd_alpha: float, temperature: float, **options):
    return build(
        "logits",
        teacher_path="recorded",
        distill_task=alpha,
        distill_logits=kd_alpha,
        distill_temperature=temperature,
        **options,
    )


@pytest.mark.parametrize("number", [0, 1])
def test_the_learning_rate_is_rewound(read, number):
    names = {"warmup": "num_warmup_steps", "total": "num_training_steps", "begin": "prune_start_step"}
    names |= {"end": "prune_end_step", "interval": "rewind_interval"}
    recorded = read("lr_rewind.json")[number]
    options = {name: recorded[theirs] for name, theirs in names.items()}
    factors = read("lr_rewind.npz")[f"factor{number}"]
    np.testing.assert_allclose([rewound_rate(t, **options) for t in range(len(factors))], factors, rtol=1e-12)


#: The recorded losses: model, what is compared beside the logits, whether those of the vocabulary are left out.
CASES = [(kind, terms, False) for kind in ("pre", "qa", "cls") for terms in ("plain", "distilbert", "tinybert")]
CASES = [case for case in CASES if case[:2] not in {("qa", "distilbert"), ("cls", "tinybert")}]  # not recorded
CASES += [case[:2] + (True,) for case in CASES if case[0] == "pre"]


def beside_logits(terms: str, alpha: float, kd_alpha: float) -> dict:
    """The options of a published preset of what is compared beside the logits."""
    if terms == "distilbert":
        weight = 1.0 - alpha - kd_alpha
        return {"distill_hidden": weight, "distill_hidden_loss": "cosine", "distill_layers": "last"}
    if terms == "tinybert":
        return {"distill_hidden": 1.0, "distill_attention": 1.0, "distill_attention_padding": True}
    return {}


@pytest.mark.parametrize("kind, terms, late", CASES)
def test_the_loss_and_its_gradients(read, kind, terms, late):
    recorded, weights = read(f"kd_{kind}_{terms}.npz"), read(f"kd_{kind}_weights.npz")
    student, teacher = bert(kind, weights, "student."), bert(kind, weights, "teacher.")
    batch = {name: torch.from_numpy(recorded[name]) for name in ("input_ids", "attention_mask", "token_type_ids")}
    labels = {name: torch.from_numpy(recorded[name]) for name in LABELS if name in recorded}
    numbers = [float(recorded[name]) for name in ("student_alpha", "kd_alpha", "temperature")]
    session = open_session(
        student,
        [distiller(*numbers, distill_sum=kind == "pre", **beside_logits(terms, *numbers[:2]))],
        load_teacher=lambda path, needs: (teacher, unit_map(teacher)),
    )
    student.train()
    session.before_update(0)
    task = student(**batch, **labels).loss
    last = None
    if late:
        last = LastLayer.of(student, lambda model: model.get_output_embeddings())
        with last.left_out():
            outputs = student(**batch)
        assert outputs.prediction_logits.shape[-1] == 16
    else:
        student(**batch)
    tokens = {"encoder": batch["attention_mask"].bool()}
    loss = session.loss(task, batch, masks=tokens, last=last)
    assert task.item() == pytest.approx(float(recorded["ce"]), rel=1e-6)
    assert loss.item() == pytest.approx(float(recorded["total"]), rel=1e-6)
    loss.backward()
    compared = 0
    for name, parameter in student.named_parameters():
        if f"grad.{name}" in recorded:
            np.testing.assert_allclose(parameter.grad, recorded[f"grad.{name}"], rtol=1e-5, atol=2e-7, err_msg=name)
            compared += 1
    assert compared > 60


def test_sixty_steps_of_student_pruning(read):
    recorded, about = read("iterative_kd_a.npz"), read("iterative_kd_a.json")
    init, final = read("iterative_kd_a_init.npz"), read("iterative_kd_a_final.npz")
    student, teacher = bert("pre", init), bert("pre", init)
    masks = build(
        "gradual_magnitude",
        target_sparsity=about["target"],
        pruning_frequency=about["freq"],
        begin_pruning_step=about["begin"],
        end_pruning_step=about["end"],
        policy_begin_step=about["pb"],
        policy_end_step=about["pe"],
        lr_rewind=True,
        prune_biases=False,
        weights_include=r"\.weight$",
        weights_exclude=r"^cls\.",
    )
    kd = distiller(about["kd"]["student_alpha"], about["kd"]["kd_alpha"], about["kd"]["temperature"], distill_sum=True)
    session = open_session(
        student,
        [masks, kd],
        load_teacher=lambda path, needs: (teacher, unit_map(teacher)),
        total_steps=about["T"],
        warmup_steps=about["warmup"],
    )
    rest = [p for n, p in student.named_parameters() if not ("bias" in n or "LayerNorm" in n)]
    bare = [p for n, p in student.named_parameters() if "bias" in n or "LayerNorm" in n]
    groups = [{"params": rest, "weight_decay": about["wd"]}, {"params": bare, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=about["lr"], betas=tuple(about["betas"]), eps=about["eps"])
    span = about["T"] - about["warmup"]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: t / about["warmup"] if t < about["warmup"] else (about["T"] - t) / span
    )
    student.train()
    names = ("input_ids", "attention_mask", "token_type_ids", "labels", "next_sentence_label")
    for step in range(about["T"]):
        batch = {name: torch.from_numpy(recorded[name][step]) for name in names}
        session.before_update(step)
        tokens = {"encoder": batch["attention_mask"].bool()}
        loss = session.loss(student(**batch).loss, batch, masks=tokens)
        assert loss.item() == pytest.approx(float(recorded["total"][step]), rel=1e-6), step
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), about["clip"])
        session.after_backward()
        session.before_step(optimizer)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(float(recorded["lr"][step]), rel=1e-6, abs=1e-12), step
        optimizer.step()
        session.after_step()
        schedule.step()
        optimizer.zero_grad()
        zeros = dict(zip(recorded["tensor_names"], recorded["zeros"][step]))
        for target in masks.targets:
            name = target.name.removesuffix(".weight")
            assert int((target.parameter == 0).sum()) == zeros[name], (step, name)
        assert len(masks.targets) == len(zeros) == 25
    session.harden()
    own = {name: value for name, value in student.state_dict().items() if name in final}
    assert len(own) > 60
    for name, value in own.items():
        np.testing.assert_allclose(value, final[name], atol=1e-6, err_msg=name)
