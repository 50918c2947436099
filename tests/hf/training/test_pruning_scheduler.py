"""Configurations of Prune Once for All's package: recorded numbers, the manual's snippet, plain loops, Trainers."""

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import kl_div
from transformers import (
    AutoModelForQuestionAnswering,
    BertConfig,
    BertForPreTraining,
    BertForSequenceClassification,
    Trainer,
)

from head_pruning import HeadPruningError
from head_pruning.weights import save_weight_masks
from hf_plugin import HeadPruningTrainer, pruner, pruning_scheduler_factory
from hf_plugin.training.pruning_config import PUBLISHED, read_config
from tests.hf.tiny import arguments, collate, sentences, tiny_bert

MANUAL = "../../examples/transformers/question-answering/config/lock_config.json"
FUNCTIONS = {"uniform": "uniform", "block": "block_structured", "unstructured": "unstructured"}
ITERATIVE = {
    "scheduler": "iterative",
    "pruning_fn": "unstructured_magnitude",
    "pruning_fn_default_kwargs": {"target_sparsity": 0.75},
    "not_to_prune": ["classifier"],
    "pruning_frequency": 2,
    "policy_end_step": 6,
}
GROUPED = {
    "pruning_fn": "grouped_unstructured_magnitude",
    "pruning_fn_default_kwargs": {"group_target_sparsity": 0.5, "group": "a"},
}


@pytest.fixture(scope="module")
def pruneofa(reference):
    if not (reference / "pruneofa" / "er_erk.json").is_file():
        pytest.skip(f"there are no recorded numbers of Prune Once for All in {reference}")
    return reference / "pruneofa"


def recorded_bert(auto, arrays, **options):
    values = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 32}
    values |= {"vocab_size": 50, "max_position_embeddings": 24, "hidden_dropout_prob": 0.0}
    config = BertConfig(**values, attention_probs_dropout_prob=0.0, attn_implementation="eager", **options)
    model = auto(config).double()
    missing, odd = model.load_state_dict({k: torch.from_numpy(v).double() for k, v in arrays.items()}, strict=False)
    assert not odd and all("decoder" in name for name in missing)  # tied
    return model


def same_weights(model, arrays, atol=1e-6):
    state = model.state_dict()
    for name, value in arrays.items():
        np.testing.assert_allclose(state[name].numpy(), value, rtol=0, atol=atol, err_msg=name)


def test_masks_outputs_and_gradients_of_one_shot(pruneofa, load_arrays):
    arrays, cases = (
        load_arrays("pruneofa/one_shot_masks.npz"),
        json.loads((pruneofa / "one_shot_masks.json").read_text()),
    )
    for i, case in enumerate(cases):
        method, _, wiring = case.pop("method").partition("_")
        case.pop("sparsity")
        model = nn.Sequential(nn.Linear(24, 16, bias=False))
        model[0].weight.data = torch.from_numpy(arrays["weight"].copy())
        kind = {"scheduler": "iterative" if wiring else "one_shot"}
        kind["pruning_fn"] = FUNCTIONS[method] + ("_neural_wiring" if wiring else "_magnitude")
        target = {"target_sparsity": 0.75} if wiring else {}
        scheduler = pruning_scheduler_factory(model, kind, pruning_fn_default_kwargs={**case, **target})
        out = model(torch.from_numpy(arrays["x"]))
        out.backward(torch.from_numpy(arrays["grad_out"]))
        weight = model[0].weight
        assert np.array_equal((weight != 0).numpy(), arrays[f"{i}.mask"] > 0), case
        np.testing.assert_allclose(out.detach().numpy(), arrays[f"{i}.out"], atol=1e-6)
        np.testing.assert_allclose(weight.grad.numpy(), arrays[f"{i}.grad_original"], atol=1e-6)
        scheduler.remove_pruning()


def test_recorded_training_with_a_locked_pattern(pruneofa, load_arrays):
    arrays = load_arrays("pruneofa/pattern_lock.npz")
    model = recorded_bert(BertForSequenceClassification, load_arrays("pruneofa/pattern_lock_init.npz"))
    scheduler = pruning_scheduler_factory(model, "lock_config.json")
    decayed = [p for n, p in model.named_parameters() if "bias" not in n and "LayerNorm" not in n]
    others = [p for n, p in model.named_parameters() if "bias" in n or "LayerNorm" in n]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], 5e-3
    )
    tracked = model.bert.encoder.layer[1].output.dense.weight
    for t in range(20):
        batch = {
            k: torch.from_numpy(arrays[k][t]) for k in ("input_ids", "attention_mask", "token_type_ids", "labels")
        }
        loss = model(**batch).loss
        assert loss.item() == pytest.approx(arrays["loss"][t], abs=1e-6)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        np.testing.assert_allclose(tracked.detach().numpy(), arrays["tracked"][t], rtol=0, atol=1e-6)
        for name, zeros in zip(arrays["tensor_names"], arrays["zeros"][t]):
            assert int((model.get_parameter(f"{name}.weight") == 0).sum()) == zeros, name
    scheduler.remove_pruning()
    same_weights(model, load_arrays("pruneofa/pattern_lock_final.npz"))


def test_recorded_training_of_neural_wirings_with_distillation(pruneofa, load_arrays):
    """60 updates: every mask, the retained weights, losses, gradient norms and the outcome."""
    name = "iterative_kd_wiring"
    arrays, told = load_arrays(f"pruneofa/{name}.npz"), json.loads((pruneofa / f"{name}.json").read_text())
    model = recorded_bert(BertForPreTraining, load_arrays(f"pruneofa/{name}_init.npz"))
    teacher = copy.deepcopy(model).eval()
    scheduler = pruning_scheduler_factory(
        model,
        {"scheduler": "iterative", "pruning_fn": told["fn"], "not_to_prune": told["not_to_prune"],
         "pruning_fn_default_kwargs": {"target_sparsity": told["target"], "initial_sparsity": told["initial"],
                                       "threshold_decay": told["decay"]},
         "pruning_frequency": told["freq"], "begin_pruning_step": told["begin"], "end_pruning_step": told["end"],
         "policy_begin_step": told["pb"], "policy_end_step": told["pe"], "init_strategy": told["init"]},
    )  # fmt: skip
    decayed = [p for n, p in model.named_parameters() if "bias" not in n and "LayerNorm" not in n]
    others = [p for n, p in model.named_parameters() if "bias" in n or "LayerNorm" in n]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": told["wd"]}, {"params": others, "weight_decay": 0.0}], told["lr"]
    )
    storage, parameter = scheduler.session.pruners[0].storage, f"{told['tracked']}.weight"
    inputs = ("input_ids", "attention_mask", "token_type_ids", "labels", "next_sentence_label")
    temperature = told["kd"]["temperature"]
    for t in range(told["T"]):
        batch = {key: torch.from_numpy(arrays[key][t]) for key in inputs}
        given, real = model(**batch), batch["attention_mask"].bool()
        with torch.no_grad():
            wanted = teacher(**{key: batch[key] for key in inputs[:3]})
        pairs = [(given.prediction_logits[real], wanted.prediction_logits[real]),
                 (given.seq_relationship_logits, wanted.seq_relationship_logits)]  # fmt: skip
        learnt = sum(
            temperature**2
            * kl_div((s / temperature).log_softmax(-1), (w / temperature).softmax(-1), reduction="batchmean")
            for s, w in pairs
        )
        loss = told["kd"]["student_alpha"] * given.loss + told["kd"]["kd_alpha"] * learnt
        assert loss.item() == pytest.approx(arrays["total"][t], abs=1e-5)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), told["clip"])
        assert norm.item() == pytest.approx(arrays["norm"][t], rel=1e-4)
        for group in optimizer.param_groups:
            group["lr"] = float(arrays["lr"][t])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        for tensor, zeros in zip(arrays["tensor_names"], arrays["zeros"][t]):
            assert int((model.get_parameter(f"{tensor}.weight") == 0).sum()) == zeros, (t, tensor)
        if f"mask.{t}" in arrays:
            weight = model.get_parameter(parameter).detach().numpy()
            assert np.array_equal(weight != 0, arrays[f"mask.{t}"] > 0), t
            kept = storage.state["original"].get(parameter) if scheduler.session.pruners[0].has_mask else None
            original = weight if kept is None else kept.numpy()
            np.testing.assert_allclose(original, arrays[f"original.{t}"], rtol=0, atol=1e-6)
    scheduler.remove_pruning()
    same_weights(model, load_arrays(f"pruneofa/{name}_final.npz"))


# -- the manual's snippet -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as the published models have it: pickled weights of pretraining, 90 % zeros in layers and pooler."""
    folder = tmp_path_factory.mktemp("bert-base-uncased-sparse-90-unstructured-pruneofa")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    model = BertForPreTraining(BertConfig(**sizes, vocab_size=40, max_position_embeddings=32))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.startswith("cls"):
            weight = module.weight.data
            weight[weight.abs() <= weight.abs().flatten().kthvalue(int(0.9 * weight.numel())).values] = 0.0
            module.bias.data.normal_(std=0.02)
    model.config.save_pretrained(folder)
    state = {**model.state_dict(), "bert.embeddings.position_ids": torch.arange(32)[None]}
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def zeros(model) -> dict[str, torch.Tensor]:
    """Where the matrices that were pruned in pretraining are zero."""
    return {
        name: parameter.detach() == 0
        for name, parameter in model.named_parameters()
        if ("encoder.layer" in name or "pooler" in name) and name.endswith("weight") and parameter.dim() > 1
    }


def answers(count: int) -> list[dict]:
    rows = [{k: row[k] for k in ("input_ids", "attention_mask")} for row in sentences(count)]
    return [{**row, "start_positions": i % 3, "end_positions": 2} for i, row in enumerate(rows)]


def padded(rows: list[dict]) -> dict[str, torch.Tensor]:
    batch = collate([{**row, "labels": 0} for row in rows])
    del batch["labels"]
    return {**batch, **{k: torch.tensor([row[k] for row in rows]) for k in ("start_positions", "end_positions")}}


def test_the_manuals_snippet_in_a_trainer_of_transformers(published, tmp_path):
    model = AutoModelForQuestionAnswering.from_pretrained(published)
    before, first = zeros(model), {k: v.clone() for k, v in model.state_dict().items()}
    assert all(0.89 < found.float().mean() < 0.91 for found in before.values()) and len(before) == 12
    scheduler = pruning_scheduler_factory(model, MANUAL)
    trainer = Trainer(
        model, arguments(tmp_path, weight_decay=0.1), train_dataset=answers(16), data_collator=padded
    )  # knows nothing of pruning
    trainer.train()
    scheduler.remove_pruning()
    for name, found in zeros(model).items():
        assert torch.equal(found, before[name]) and not torch.equal(model.get_parameter(name), first[name]), name
    assert (model.qa_outputs.weight != 0).all() and model.qa_outputs.bias.any()
    trainer.train()  # the zeros are free again
    assert not any(torch.equal(found, before[name]) for name, found in zeros(model).items())


def test_a_published_model_is_locked_without_options(published, tmp_path):
    model = BertForSequenceClassification.from_pretrained(published)
    before = zeros(model)
    assert "bert.pooler.dense.weight" in before
    HeadPruningTrainer(
        model=model, args=arguments(tmp_path), train_dataset=sentences(16), data_collator=collate,
        pruners=[pruner("lock")],
    ).train()  # fmt: skip
    assert all(torch.equal(found, before[name]) for name, found in zeros(model).items())
    assert (model.classifier.weight != 0).all() and model.classifier.bias.all()  # new, and trained


# -- loops and Trainers ---------------------------------------------------------------------------------------------


def loop(model, scheduler, steps, optimizer):
    for step in steps:
        torch.manual_seed(step)
        model(**collate(sentences(4, seed=step))).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("pruning_fn", ["unstructured_magnitude", "uniform_neural_wiring"])
def test_a_plain_loop_goes_on_to_the_same_bits(tmp_path, pruning_fn):
    more = {"block_size": 4} if "uniform" in pruning_fn else {}
    config = {**ITERATIVE, "pruning_fn": pruning_fn}
    config["pruning_fn_default_kwargs"] = {**config["pruning_fn_default_kwargs"], **more}
    models, kept = [], tmp_path / "state.pt"
    for parts in ([range(8)], [range(5), range(5, 8)]):
        for steps in parts:
            model = tiny_bert()
            scheduler = pruning_scheduler_factory(model, config)
            optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
            if steps.start:
                state = torch.load(kept, weights_only=True)
                model.load_state_dict(state["model"])
                optimizer.load_state_dict(state["optimizer"])
                scheduler.load_state_dict(state["scheduler"])
            loop(model, scheduler, steps, optimizer)
            if steps.stop == 5:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save({**state, "scheduler": scheduler.state_dict()}, kept)
                assert all(found.any() for found in zeros(model).values())
            scheduler.remove_pruning()
        models.append(model)
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models)))
    assert all(abs(float(found.float().mean()) - 0.75) < 0.01 for found in zeros(models[0]).values())


@pytest.mark.parametrize("given", ["add_to", "session"])
def test_a_trainer_drives_a_schedule(tmp_path, given):
    model = tiny_bert()
    scheduler = pruning_scheduler_factory(model, ITERATIVE)
    options = {"args": arguments(tmp_path), "train_dataset": sentences(16), "data_collator": collate}
    if given == "add_to":
        trainer = Trainer(model, **options)
        scheduler.add_to(trainer)
    else:
        trainer = HeadPruningTrainer(model=model, session=scheduler.session, **options)
    trainer.train()
    assert trainer.state.global_step == 12 and scheduler.session.at_target()
    assert all(abs(float(found.float().mean()) - 0.75) < 0.01 for found in zeros(model).values())
    scheduler.remove_pruning()


def test_a_step_that_is_forgotten_is_told_and_a_step_that_overflows_is_skipped():
    model, other = tiny_bert(), tiny_bert(1)
    scheduler = pruning_scheduler_factory(model, ITERATIVE)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loop(other, scheduler, [], torch.optim.SGD(other.parameters(), 0.1))
    scheduler.step()  # the loss scaler left the optimizer out
    assert scheduler.session.step == 1 and not any(found.any() for found in zeros(model).values())
    optimizer.step()
    with pytest.raises(
        HeadPruningError, match=r"scheduler.step\(\) was not called since; call it after each .*add_to"
    ):
        optimizer.step()
    scheduler.remove_pruning()
    optimizer.step()


# -- what a configuration may say -----------------------------------------------------------------------------------


def masked(config, model=None) -> dict[str, float]:
    """The removed ratio of each tensor after enough updates without gradients."""
    model = tiny_bert() if model is None else model
    scheduler = pruning_scheduler_factory(model, config)
    for _ in range(8):
        scheduler.session.before_step()
        scheduler.session.after_step()
        scheduler.session.before_update(scheduler.session.step + 1)
    assert scheduler.session.at_target()
    scheduler.remove_pruning()
    matrices = {name: p for name, p in model.named_parameters() if p.dim() > 1 and "embeddings" not in name}
    ratios = {name: float((p == 0).float().mean()) for name, p in matrices.items()}
    return {name: ratio for name, ratio in ratios.items() if ratio}


def test_each_part_of_a_configuration_counts(tmp_path):
    chosen = masked(ITERATIVE)
    assert len(chosen) == 13 and "bert.pooler.dense.weight" in chosen and set(chosen.values()) == {0.75}
    more = {
        **ITERATIVE,
        "not_to_prune": ["layer.0", "classifier"],
        "weight_sparsity_map": {"pooler": {"target_sparsity": 0.5}},
    }
    ratios = masked({**more, "explicit_prune": {r"layer.0.*query": {"name": "weight", "target_sparsity": 0.25}}})
    assert ratios.pop("bert.pooler.dense.weight") == 0.5
    assert ratios.pop("bert.encoder.layer.0.attention.self.query.weight") == 0.25
    assert len(ratios) == 6 and set(ratios.values()) == {0.75} and all("layer.1" in name for name in ratios)
    whole = {
        "scheduler": "iterative",
        "pruning_fn": "global_unstructured_magnitude",
        "policy_end_step": 6,
        "pruning_frequency": 1,
    }
    ratios = masked({**whole, "pruning_fn_default_kwargs": {"group_target_sparsity": 0.5}})
    assert len(set(ratios.values())) > 4
    once = {"scheduler": "one_shot", "pruning_fn": "unstructured_magnitude"}
    kwargs = {
        "pruning_fn_default_kwargs": {"initial_sparsity": 0.5},
        "weight_sparsity_map": {"pooler": {"initial_sparsity": 0.25}},
    }
    ratios = masked({**once, **kwargs, "not_to_prune": ["classifier"]})
    assert ratios.pop("bert.pooler.dense.weight") == 0.25 and set(ratios.values()) == {0.5}
    model = tiny_bert()
    masks = {"bert.pooler.dense.weight": torch.arange(256).view(16, 16) % 4 == 0}
    save_weight_masks(tmp_path / "masks.safetensors", masks)
    custom = {"scheduler": "one_shot", "pruning_fn": "custom_mask"}
    custom["pruning_fn_default_kwargs"] = {"weight_mask_file": str(tmp_path / "masks.safetensors")}
    assert masked(custom, model) == {"bert.pooler.dense.weight": 0.75}


def test_er_and_erk_of_a_configuration_are_the_recorded_ones(pruneofa):
    recorded = json.loads((pruneofa / "er_erk.json").read_text())
    for case, expected in recorded.items():
        strategy, target, rest = *case.removeprefix("conv_").split("_")[:2], case.rpartition("_")[2]
        if case.startswith("conv"):
            model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(64, 10))
        else:
            model = tiny_bert(num_labels=3, hidden_size=16, intermediate_size=32)
        config = {
            **ITERATIVE,
            "init_strategy": strategy,
            "not_to_prune": ["classifier"] if rest == "noclassifier" else [],
        }
        config["pruning_fn_default_kwargs"] = {"target_sparsity": float(target)}
        scheduler = pruning_scheduler_factory(model, config)
        (method,) = scheduler.session.pruners
        found = {
            name.removesuffix(".weight"): 1.0 - method.density_of(name, method.final_density())
            for name in method.sizes
        }
        assert {name: ratio for name, ratio in found.items() if ratio} == pytest.approx(expected, abs=1e-12), case
        assert sum(found[n.removesuffix(".weight")] * s for n, s in method.sizes.items()) == pytest.approx(
            float(target) * sum(method.sizes.values())
        )
        scheduler.remove_pruning()


def test_what_a_configuration_of_fixed_masks_cannot_use():
    config = {"scheduler": "one_shot", "pruning_fn": "pattern_lock", "init_strategy": "er"}
    with pytest.raises(HeadPruningError, match="pattern_lock has no ratios for an init_strategy to allot; drop it"):
        pruning_scheduler_factory(tiny_bert(), config)


def test_ratios_of_neighbours_and_of_blocks_may_differ():
    """In each block of 4 neighbours as many go as the module's own ratio takes of 4, rounded down."""
    uniform = {**ITERATIVE, "pruning_fn": "uniform_magnitude", "not_to_prune": ["classifier"]}
    uniform["pruning_fn_default_kwargs"] = {"target_sparsity": 0.6, "block_size": 4}
    uniform["weight_sparsity_map"] = {
        "pooler": {"target_sparsity": 0.9},
        "layer.0.output": {"target_sparsity": 0.2},
        "layer.1.output": {"target_sparsity": 1.0},
    }
    model = tiny_bert()
    before = {name: parameter.detach().abs().clone() for name, parameter in model.named_parameters()}
    ratios = masked(uniform, model)
    assert "bert.encoder.layer.0.output.dense.weight" not in ratios
    assert ratios.pop("bert.encoder.layer.1.output.dense.weight") == 1.0
    assert ratios.pop("bert.pooler.dense.weight") == 0.75 and set(ratios.values()) == {0.5} and len(ratios) == 10
    for name in ratios:  # the smallest of each
        order = before[name].reshape(-1, 4).argsort(-1).argsort(-1)
        assert torch.equal(model.get_parameter(name).reshape(-1, 4) != 0, order >= 2), name
    del uniform["weight_sparsity_map"]
    allotted = {**uniform, "init_strategy": "er"}
    allotted["pruning_fn_default_kwargs"] = {"target_sparsity": 0.5, "block_size": 4}
    free = {**allotted, "pruning_fn": "unstructured_magnitude", "pruning_fn_default_kwargs": {"target_sparsity": 0.5}}
    exact, found = masked(free), masked(allotted)
    counts = {name: int(4 * ratio) / 4 for name, ratio in exact.items()}
    assert found == {name: ratio for name, ratio in counts.items() if ratio} and len(set(counts.values())) > 1
    blocks = {**uniform, "pruning_fn": "block_structured_magnitude"}
    blocks["pruning_fn_default_kwargs"] = {"target_sparsity": 0.5, "block_dims": [2, 4]}
    ratios = masked({**blocks, "weight_sparsity_map": {"pooler": {"target_sparsity": 0.75}}})
    assert ratios.pop("bert.pooler.dense.weight") == 0.75 and set(ratios.values()) == {0.5}


@pytest.mark.parametrize("change, sentence", [
    ({"freqency": 3}, "has the unknown key 'freqency'; it takes scheduler, pruning_fn"),
    ({"pruning_fn": "magnitude"}, "the pruning_fn 'magnitude'; choose one of unstructured_magnitude, uniform"),
    ({"scheduler": "cubic"}, "the scheduler 'cubic' with unstructured_magnitude, which goes with it"),
    ({"pruning_fn": "pattern_lock"}, "the scheduler 'iterative' with pattern_lock, which goes with one_shot"),
    ({"scheduler": "one_shot"}, "has pruning_frequency, but the scheduler one_shot has no steps; drop it"),
    ({"pruning_fn_default_kwargs": {"sparsity": 0.5}}, "pruning_fn_default_kwargs, has the unknown key 'sparsity'"),
    ({"pruning_fn_default_kwargs": {"target_sparsity": 0.5, "block_size": 4}}, "has no keyword block_size; it"),
    ({"pruning_fn_default_kwargs": {"target_sparsity": 1.5}}, "target_sparsity is 1.5, not from 0 to 1"),
    ({"pruning_fn_default_kwargs": {}}, "target_sparsity is 0, so nothing would be pruned"),
    ({"pruning_frequency": 0}, "pruning_frequency is 0, not from 1 to"),
    ({"not_to_prune": ["("]}, r"'\(' in not_to_prune is no regular expression"),
    ({"not_to_prune": [""]}, "chooses no weight of the model"),
    ({"weight_sparsity_map": {"pool": {}, "dense": {}}}, "bert.pooler.dense fits 'pool' and 'dense' of"),
    ({"weight_sparsity_map": {"pool": {"threshold_decay": 0.1}}}, "between them only target_sparsity may differ"),
    ({"pruning_fn": "uniform_magnitude", "pruning_fn_default_kwargs": {"target_sparsity": 0.5, "block_size": 4},
      "weight_sparsity_map": {"pool": {"block_size": 8}}},
     "modules different block_size; between them only target_sparsity may differ"),
    ({**GROUPED, "weight_sparsity_map": {"pool": {"group": "b"}}},
     "modules different group; grouped_unstructured_magnitude has one threshold for all; give one"),
    ({**GROUPED, "weight_sparsity_map": {"pool": {"group_target_sparsity": 0.9}}},
     "modules different group_target_sparsity; grouped_unstructured_magnitude has one threshold for all"),
    ({**GROUPED, "init_strategy": "erk"}, "has one ratio of all modules, none for an init_strategy to allot; drop it"),
    ({"explicit_prune": {"pooler.dense": {"name": "wait"}}}, "for bert.pooler.dense.wait, which the model has not"),
    ({"explicit_prune": {"word_embed": {"name": "weight"}}}, "word_embeddings.weight, which is never pruned"),
    ({"weight_sparsity_map": {"polar": {}}}, "'polar' of weight_sparsity_map fits no pruned module; correct it"),
    ({"explicit_prune": {"polar": {"name": "weight"}}}, "'polar' of explicit_prune fits no pruned module"),
    ({"policy_begin_step": 9}, "policy_begin_step 9 comes after policy_end_step 6, so it never acts"),
    ({"begin_pruning_step": 9, "end_pruning_step": 5}, "begin_pruning_step 9 comes after end_pruning_step 5"),
    ({"init_strategy": "erdos"}, "init_strategy is 'erdos'; choose one of uniform, er, erk"),
    ({"pruning_fn": "uniform_magnitude", "pruning_fn_default_kwargs": {"target_sparsity": 0.2, "block_size": 4}},
     "0.2 of each block of 4 are 0 weights, rounded down; choose another block_size"),
])  # fmt: skip
def test_mistakes_end_in_a_sentence(change, sentence):
    model = tiny_bert()
    with pytest.raises(HeadPruningError, match=sentence):
        pruning_scheduler_factory(model, {**ITERATIVE, **change})
    assert pruning_scheduler_factory(model, ITERATIVE).remove_pruning() is None  # the model is free


def test_files_and_what_needs_none(tmp_path):
    path = tmp_path / "lock_config.json"
    assert read_config(str(path)) == PUBLISHED["lock_config.json"]
    path.write_text(json.dumps(ITERATIVE))
    assert read_config(path, pruning_frequency=7) == {**ITERATIVE, "pruning_frequency": 7}
    path.write_text("{")
    with pytest.raises(HeadPruningError, match="lock_config.json is damaged"):
        read_config(path)
    with pytest.raises(HeadPruningError, match="no file .*other.json"):
        read_config(tmp_path / "other.json")
    for name in PUBLISHED:
        assert read_config(name)["pruning_fn"]
