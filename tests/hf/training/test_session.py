"""Opening a session: what it refuses, what a refusal leaves, and models that are not of transformers alone."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from head_pruning import AttentionSite, HeadPruningError, UnitMap
from hf_plugin import (
    HeadPruningTrainer,
    head_mask,
    mask_heads,
    open_session,
    prune_heads,
    pruner,
    remove_query_heads,
    restore_heads,
    save_pruned,
    unit_map,
)
from tests.hf.heads.test_heads import hooks
from tests.hf.tiny import arguments, collate, sentences, tiny_bert

BATCH = collate(sentences(4))
PIPELINED = {"num_of_heads": 3, "joint_pruning": False}
JOINT = {"num_of_heads": 3, "joint_pruning": True}


def loss(model: nn.Module) -> float:
    with torch.no_grad():
        return model(**BATCH)["loss"].item()


class Own(nn.Module):
    """A classifier of one's own around BERT: no config, and a plain dict as output."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = tiny_bert().bert
        self.head = nn.Linear(16, 2)

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.head(self.enc(input_ids, attention_mask=attention_mask).pooler_output)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class OwnAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        q, k, v = (part(x).unflatten(-1, (4, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Odd(nn.Module):
    """Nothing of transformers at all; its site is described by hand."""

    SITES = UnitMap((AttentionSite("mix", "encoder_self", "mix", 4, 4, "mix.o", ("mix.q", "mix.k", "mix.v")),))

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(40, 16), OwnAttention(), nn.Linear(16, 2)

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.head(self.mix(self.words(input_ids)).mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


# -- models of one's own -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("options", [JOINT, PIPELINED], ids=["joint", "pipelined"])
@pytest.mark.parametrize("make, units", [(Own, None), (Odd, Odd.SITES)], ids=["around BERT", "by hand"])
def test_a_model_without_a_config_trains(tmp_path, make, units, options):
    torch.manual_seed(0)
    trainer = HeadPruningTrainer(
        model=make(),
        args=arguments(tmp_path, max_steps=3, save_strategy="steps", save_steps=2),
        pruners=[pruner("ste", **options)],
        unit_map=units,
        train_dataset=sentences(8),
        eval_dataset=sentences(4, seed=1),
        data_collator=collate,
    )
    logits = trainer.session.pruners[0].logits.copy()
    trainer.train()
    assert trainer.head_mask.kept == 3 and not np.array_equal(logits, trainer.session.pruners[0].logits)
    assert trainer.evaluate()["eval_loss"] > 0
    with pytest.raises(HeadPruningError, match="has no save_pretrained; save its state dict and the mask"):
        save_pruned(trainer.model, trainer.head_mask, tmp_path / "pruned")


def test_layers_that_a_part_drops_give_sites_time_to_run():
    model = Own()
    model.enc.config.layerdrop = 0.1
    assert open_session(model, [pruner("ste", **JOINT)]).fired_within > 1
    assert open_session(Own(), [pruner("ste", **JOINT)]).fired_within == 1


def test_heads_are_removed_from_the_model_that_can_be_saved(tmp_path):
    model, listed = Own(), nn.Sequential(tiny_bert().bert)
    for remove in (prune_heads, remove_query_heads):
        with pytest.raises(HeadPruningError, match="through the Own around it; pass model.enc itself"):
            remove(model, {0: [1]})
    with pytest.raises(HeadPruningError, match=r'pass model.get_submodule\("0"\) itself'):
        prune_heads(listed, {0: [1]})
    assert prune_heads(model, {0: []}).kept == 8
    session = open_session(model, [pruner("ste", **JOINT)])
    mask = session.head_mask()  # of Own, whose names are longer
    session.detach()
    assert prune_heads(model.enc, mask).kept == 3
    model.enc.save_pretrained(tmp_path)
    again = type(model.enc).from_pretrained(tmp_path)
    ids = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(again.eval()(**ids).pooler_output, model.eval().enc(**ids).pooler_output)


def test_pipelined_pruning_in_a_loop_of_ones_own_leaves_the_model_as_it_is():
    model = tiny_bert()
    session = open_session(model, [pruner("dsp", **PIPELINED)], total_steps=4)
    before, logits = copy.deepcopy(model.state_dict()), session.pruners[0].logits.copy()
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=0.1)
    for step in range(2):
        session.before_update(step)
        optimizer.zero_grad()
        session.loss(model(**BATCH)["loss"], BATCH).backward()
        session.after_backward()
        session.before_step(optimizer)
        optimizer.step()
        session.after_step()
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert (session.pruners[0].logits != logits).all()


# -- refusals ------------------------------------------------------------------------------------------------------


def test_a_failed_opening_leaves_the_model_as_it_was():
    model = tiny_bert().requires_grad_(False)
    with pytest.raises(HeadPruningError, match="All parameters of the model are frozen"):
        open_session(model, [pruner("dsp", **PIPELINED)])
    model.requires_grad_(True)
    platon = pruner("platon", final_threshold=0.5, warmup_steps=0.1)
    with pytest.raises(HeadPruningError, match="Pipelined pruning of heads leaves the model's weights"):
        open_session(model, [platon, pruner("dsp", **PIPELINED)])
    with pytest.raises(HeadPruningError, match="9 heads to keep are more than the 8"):
        open_session(model, [platon, pruner("dsp", num_of_heads=9)])
    assert hooks(model) == 0 and all(parameter.requires_grad for parameter in model.parameters())
    open_session(model, [pruner("ste", **JOINT)])


def test_gates_are_not_stacked():
    model = tiny_bert()
    session = open_session(model, [pruner("ste", **JOINT)])
    logits = session.pruners[0].logits.copy()
    with pytest.raises(HeadPruningError, match="attached already; detach"):
        session.attach()
    np.testing.assert_array_equal(session.pruners[0].logits, logits)
    for refused in (
        lambda: open_session(model, [pruner("ste", **JOINT)]),
        lambda: open_session(model.bert, [pruner("random", num_of_heads=2)]),
        lambda: open_session(copy.deepcopy(model), [pruner("ste", **JOINT)]),
        lambda: mask_heads(model, {0: [1]}),
    ):
        before = hooks(model)
        with pytest.raises(HeadPruningError, match="are gated; .*detach"):
            refused()
        assert hooks(model) == before == 2
    with head_mask(model, torch.full((8,), 0.5)):
        inside = loss(model)
        with head_mask(model, torch.zeros(8)):
            assert loss(model) != inside
        assert loss(model) == inside
    session.detach()
    session.attach().detach()
    mask_heads(model, {0: [1]})
    mask_heads(model, {0: [2]})
    with pytest.raises(HeadPruningError, match=r"masked by mask_heads; call restore_heads\(model\)"):
        open_session(model, [pruner("ste", **JOINT)])
    restore_heads(model)
    open_session(model, [pruner("ste", **JOINT)]).detach()
    assert hooks(model) == 0


@pytest.mark.parametrize("adapter_first", [True, False])
def test_adapters_come_before_the_gates(adapter_first):
    model, lora = tiny_bert(), LoraConfig(target_modules=["dense"], r=2, init_lora_weights=False)
    if adapter_first:
        model = get_peft_model(model, lora)
        open_session(model, [pruner("ste", **JOINT)]).before_update(0)
        return
    session = open_session(model, [pruner("ste", **JOINT)])
    masked = tiny_bert()
    mask_heads(masked, {0: [1]})
    get_peft_model(model, lora), get_peft_model(masked, lora).eval()
    with pytest.raises(HeadPruningError, match=r"wrapped or replaced .* change the model first \(get_peft_model"):
        session.before_update(0)
    with pytest.raises(HeadPruningError, match="wrapped or replaced after the gates were put on it"):
        loss(masked)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: pruner("dsp", num_of_heads=2.5), "num_of_heads is 2.5; it must be a whole number."),
        (lambda: pruner("dsp", num_of_heads="3"), "num_of_heads is '3'; it must be a whole number."),
        (lambda: pruner("dsp", num_of_heads=float("nan")), "num_of_heads is nan; it must be a whole number."),
        (lambda: pruner("dsp", num_of_heads=True), "num_of_heads is True; it must be a whole number."),
        (lambda: pruner("voita", l0_penalty="1"), "l0_penalty is '1'; it must be a number."),
        (lambda: pruner("dsp", num_of_heads=3, annealing=1), "annealing is 1; it must be True or False."),
        (lambda: pruner("given", head_mask_file=3), "head_mask_file is 3; it must be a text."),
        (lambda: pruner("platon", warmup_steps=None), "warmup_steps is None; it must be a number."),
        (lambda: pruner(None), "There is no pruner none; choose one of custom_mask, dfd, dsp"),
        (lambda: unit_map("bert-base-uncased"), "'bert-base-uncased' is no model; load it first"),
        (lambda: mask_heads("bert", {0: [1]}), "'bert' is no model; load it first"),
        (lambda: prune_heads("bert", {0: [1]}), "'bert' is no model; load it first"),
        (lambda: HeadPruningTrainer(model="bert", pruners=[pruner("ste", **JOINT)]), "'bert' is no model; load it"),
        (lambda: open_session(tiny_bert(), ["dsp"]), "'dsp' is no pruner; build one"),
        (lambda: open_session(tiny_bert(), "dsp"), "The pruners are 'dsp', not a list of pruners"),
        (lambda: open_session(tiny_bert(), pruner("ste", **JOINT)), "not a list of pruners; give a list, also of one"),
        (lambda: open_session(tiny_bert(), 3), "The pruners are 3, not a list"),
        (lambda: open_session(tiny_bert(), []), "at least one pruner"),
    ],
)
def test_values_of_other_types_are_refused(make, message):
    with pytest.raises(HeadPruningError) as error:
        make()
    assert message in str(error.value)


def test_numbers_of_numpy_are_numbers():
    model = tiny_bert()
    numbers = {"num_of_heads": np.int64(3), "pruning_lr": np.float32(0.5), "joint_pruning": np.bool_(True)}
    method = pruner("ste", **numbers)
    assert open_session(model, iter([method])).head_mask().kept == 3
    assert type(method.options()["num_of_heads"]) is int  # reports are JSON
