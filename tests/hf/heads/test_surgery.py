"""Removing heads for good: the compact model does what the masked one does, for every family that is mapped."""

import copy
import functools
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from head_pruning import HeadMask, HeadPruningError, UnitMap
from head_pruning.compact.no_heads import NoHeads
from head_pruning.compact.recipe import apply_recipe
from head_pruning.compact.slices import stays
from head_pruning.masks import full_mask, mask_without
from head_pruning.surgery.plans import get_tensor
from head_pruning.surgery.remaining import heads_left, recipe_of
from head_pruning.surgery.removal import remove_heads, removed_parameters
from hf_plugin.heads.importance import least_important
from hf_plugin.heads.masking import head_mask, mask_heads, restore_heads
from hf_plugin.heads.pruning import prune_heads, pruned_heads, remove_query_heads
from hf_plugin.mapping.head_plans import plan_site
from hf_plugin.mapping.unit_map import unit_map
from tests.few import few
from tests.hf.families import FAMILIES, GROUPED, RELEASE, Family, build, make, missing, one_of_each
from tests.hf.mapping.test_families import tensors
from tests.hf.tiny import tiny_bert

# Families with sites that keep a dummy head when they lose all of theirs.
DUMMIES = {"ibert": 2}
NEWEST = tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= RELEASE


@functools.cache
def without_dropout(family: Family) -> SimpleNamespace:
    """The family's model, in which training draws no random numbers, its batch and its map."""
    host = make(family)
    model = copy.deepcopy(host.model)
    for module in [*model.modules(), *(module.config for module in model.modules() if hasattr(module, "config"))]:
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or (isinstance(module, nn.Dropout) and name == "p")):
                setattr(module, name, 0.0)
    units = unit_map(model)
    return SimpleNamespace(model=model, inputs=host.inputs, units=units, name=family.name)


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def host(request) -> SimpleNamespace:
    return host_of(request.param)


@pytest.fixture(scope="module", params=one_of_each(), ids=str)
def layout(request) -> SimpleNamespace:
    return host_of(request.param)


def host_of(family: Family) -> SimpleNamespace:
    reason = missing(family)
    if reason:
        pytest.skip(reason)
    found = without_dropout(family)
    found.family = family
    return found


def some(host: SimpleNamespace, seed: int, share: float = 0.5) -> np.ndarray:
    """Which heads stay: uneven, and none in the first site."""
    draw = np.random.default_rng(seed)
    keep = draw.random(host.units.num_heads) < share
    for _, where in host.units.slices():
        if not keep[where].any():
            keep[draw.integers(where.start, where.stop)] = True
    keep[: host.units.attention[0].heads] = False
    return keep


def run(host: SimpleNamespace, model: nn.Module) -> list[torch.Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        return tensors(model(**host.inputs))


def masked(host: SimpleNamespace, keep: np.ndarray) -> list[torch.Tensor]:
    with head_mask(host.model, HeadMask(host.units, keep), unit_map=host.units):
        return run(host, host.model)


def compact(host: SimpleNamespace, keep: np.ndarray) -> nn.Module:
    model = copy.deepcopy(host.model)
    remove_heads(model, host.units, HeadMask(host.units, keep))
    return model


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected) > 0
    for mine, other in zip(found, expected):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# -- every family --------------------------------------------------------------------------------------------------


def test_compact_equals_masked(host):
    keep = some(host, 1)
    model = compact(host, keep)
    dense = run(host, host.model)
    expected = masked(host, keep)
    assert_equal(run(host, model), expected)
    assert max(float((a - b).abs().max()) for a, b in zip(dense, expected)) > 1e-3


def test_without_any_head(layout):
    keep = np.zeros(layout.units.num_heads, dtype=bool)
    model = compact(layout, keep)
    assert_equal(run(layout, model), masked(layout, keep))
    entries = recipe_of(model)["sites"]
    dummies = sum("dummy" in entry for entry in entries.values())
    if NEWEST:
        assert dummies == DUMMIES.get(layout.name, 0)
    for site in layout.units.attention:
        for name, dim, _ in entries[site.name]["tensors"]:
            if "dummy" not in entries[site.name] and name == f"{site.out_proj}.weight":
                assert get_tensor(model, name).shape[dim] == 0


def gradients(host: SimpleNamespace, model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.train()
    torch.manual_seed(0)
    outputs = [tensor for tensor in tensors(model(**host.inputs)) if tensor.requires_grad]
    loss = sum((tensor * torch.linspace(-1, 1, tensor.shape[-1])).mean() for tensor in outputs)
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    model.eval()
    return loss.detach(), found


def test_a_training_step_is_that_of_the_masked_model(layout):
    assert_same_step(layout, some(layout, 2))


@pytest.mark.parametrize("name", ["t5", "mt5", "longt5", "switch_transformers", "fsmt", "bart"])
def test_a_training_step_without_the_first_layers(name):
    host = without_dropout(of(name))
    keep = some(host, 4)
    for kind in host.units.kinds():
        keep[next(where for site, where in host.units.slices() if site.kind == kind)] = False
    assert_same_step(host, keep)


def assert_same_step(host: SimpleNamespace, keep: np.ndarray) -> None:
    """Loss and gradients of the compact model are those of the masked one."""
    twin = copy.deepcopy(host.model)  # BatchNorm learns in training
    with head_mask(twin, HeadMask(host.units, keep), unit_map=host.units):
        loss, expected = gradients(host, twin)
    model = compact(host, keep)
    mine, found = gradients(host, model)
    torch.testing.assert_close(mine, loss, rtol=1e-5, atol=1e-5)
    for entry in recipe_of(model)["sites"].values():
        for name, dim, blocks in entry["tensors"]:
            if name in expected:
                index = torch.tensor(stays(entry, None, blocks), dtype=torch.long)
                expected[name] = expected[name].index_select(dim, index)
    there = {name for name, parameter in model.named_parameters() if parameter.numel()}
    assert found.keys() <= expected.keys()
    for name in there & expected.keys():
        if name in found:
            largest = float(expected[name].abs().max())
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5 + 1e-4 * largest, msg=name)
        else:
            assert not expected[name].any(), name


def test_again_from_a_recipe_and_as_a_copy(layout):
    """Removing twice is removing once; the recipe alone gives a fresh model the shape; copies are compact too."""
    host = layout
    second = some(host, 3)
    first = second.copy()
    first[np.flatnonzero(~second)[::2]] = True
    model = copy.deepcopy(host.model)
    for before, keep in ((np.ones_like(first), first), (first, second)):
        left = before if heads_left(model) is None else heads_left(model).keep
        assert (left == before).all()
        units = unit_map(model)
        now = {site.name: keep[where][before[where]] for site, where in host.units.slices()}
        mask = HeadMask(units, np.concatenate([now[site.name] for site in units.attention]))
        size, fewer = parameters(model), removed_parameters(model, units, mask)
        remove_heads(model, units, mask)
        assert parameters(model) == size - fewer < size
    assert (heads_left(model).keep == second).all() and heads_left(model).unit_map == host.units
    expected = run(host, model)
    assert_equal(expected, masked(host, second))
    once = compact(host, second)
    recipe = json.loads(json.dumps(recipe_of(once)))
    assert {name: entry["kept"] for name, entry in recipe["sites"].items()} == {
        name: entry["kept"] for name, entry in recipe_of(model)["sites"].items()
    }
    fresh = apply_recipe(build(host.family).eval(), recipe)
    fresh.load_state_dict(once.state_dict())
    with torch.device("meta"):
        shapes = apply_recipe(build(host.family), recipe).state_dict()
    assert {name: tensor.shape for name, tensor in once.state_dict().items()} == {
        name: tensor.shape for name, tensor in shapes.items()
    }
    twins = [fresh, once, copy.deepcopy(model)]
    if not any(hasattr(module, "parametrizations") for module in model.modules()):  # torch cannot pickle those
        twins.append(pickle.loads(pickle.dumps(model)))
    for twin in twins:
        assert_equal(run(host, twin), expected)


def test_nothing_is_refused(layout):
    assert [plan_site(layout.model, site).refuse for site in layout.units.attention] == [""] * len(
        layout.units.attention
    )


# -- other settings of families ------------------------------------------------------------------------------------

WORDS = torch.arange(5, 17).reshape(2, 6)
ENTITIES = dict(
    input_ids=WORDS,
    entity_ids=torch.tensor([[1, 2], [3, 4]]),
    entity_position_ids=torch.tensor([[[0, 1, -1], [2, -1, -1]]] * 2),
)
GLOBAL = torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0, 0, 0]])
LONG = torch.arange(5, 69).reshape(2, 32) % 55 + 5
MEMORY = torch.linspace(-1, 1, 320).reshape(2, 5, 32)
SETTINGS = [
    ("luke", {}, ENTITIES),
    ("longformer", {}, dict(input_ids=LONG[:, :8], global_attention_mask=GLOBAL)),
    ("led", {}, dict(input_ids=LONG[:, :8], global_attention_mask=GLOBAL, decoder_input_ids=WORDS)),
    ("big_bird", dict(attention_type="block_sparse", block_size=2, num_random_blocks=1), dict(input_ids=LONG)),
    ("beit", dict(use_relative_position_bias=True), None),
    ("beit", dict(use_shared_relative_position_bias=True), None),
    ("data2vec-vision", dict(use_relative_position_bias=True), None),
    ("data2vec-vision", dict(use_shared_relative_position_bias=True), None),
    ("deberta-v2", dict(share_att_key=False), None),
    ("falcon", dict(alibi=True), None),
    ("falcon", dict(new_decoder_architecture=False, multi_query=False, num_kv_heads=4, alibi=True), None),
    ("gpt_bigcode", dict(multi_query=True), None),
    ("gpt2", dict(add_cross_attention=True), dict(input_ids=WORDS, encoder_hidden_states=MEMORY)),
    ("bert", dict(is_decoder=True, add_cross_attention=True), dict(input_ids=WORDS, encoder_hidden_states=MEMORY)),
    ("cohere", dict(use_qk_norm=True), None),
    ("t5", {}, dict(input_ids=WORDS, decoder_input_ids=WORDS, output_attentions=True)),
    ("xlm", {}, dict(input_ids=WORDS, output_attentions=True)),
    ("openai-gpt", {}, dict(input_ids=WORDS, output_attentions=True)),
]


def of(name: str) -> Family:
    family = next(family for family in FAMILIES if family.name == name)
    reason = missing(family)
    if reason:
        pytest.skip(reason)
    return family


def shaken(model: nn.Module) -> nn.Module:
    """With random biases, norms and small weights, so that none hides a difference."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.float().eval()


@pytest.mark.parametrize("name, changes, inputs", SETTINGS, ids=lambda value: "-".join(value) if value else None)
def test_settings_with_more_to_cut(name, changes, inputs):
    family = of(name)
    config = AutoConfig.for_model(name, **{**copy.deepcopy(dict(family.overrides)), **changes})
    model = shaken(AutoModel.from_config(config, attn_implementation="eager"))
    units = unit_map(model)
    host = SimpleNamespace(model=model, units=units, inputs=inputs or make(family).inputs)
    for keep in (some(host, 5), np.zeros(units.num_heads, dtype=bool)):
        np.random.seed(0)
        with torch.no_grad(), head_mask(model, HeadMask(units, keep)):
            expected = model(**host.inputs)
        np.random.seed(0)
        with torch.no_grad():
            found = compact(host, keep)(**host.inputs)
        for key in set(expected) - {"attentions", "cross_attentions", "encoder_attentions", "decoder_attentions"}:
            if "past" not in key:
                assert_equal(tensors(found[key]), tensors(expected[key]))


VISION = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40)
CODES = dict(embed_dim=8, num_embeddings=8, latent_channels=8, base_channels=32, channel_multiplier=[1], resolution=16)
NORMS = [  # of all heads' queries and keys, except for Chameleon, whose norms have weights of each head
    ("olmo2", dict(num_key_value_heads=1)),
    ("olmo2", dict(num_key_value_heads=4)),
    ("olmo3", {}),
    ("olmoe", dict(num_experts=2, num_experts_per_tok=1)),
    ("esmc", dict(num_key_value_heads=4)),
    ("internvl_vision", dict(VISION, use_qk_norm=True, image_size=[8, 8], patch_size=[4, 4])),
    ("chameleon", dict(vocabulary_map={"<image>": 3}, vq_config=CODES)),
]


@pytest.mark.parametrize("name, changes", NORMS)
def test_norms_of_queries_and_keys(name, changes):
    if name not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    words = {} if "image_size" in changes else GROUPED
    config = AutoConfig.for_model(name, **{**words, **copy.deepcopy(changes)})
    model = shaken(AutoModel.from_config(config))
    units = unit_map(model)
    inputs = {"pixel_values": torch.randn(2, 3, 8, 8)} if "image_size" in changes else {"input_ids": WORDS}
    host = SimpleNamespace(model=model, units=units, inputs=inputs)
    for keep in (some(host, 5), np.zeros(units.num_heads, dtype=bool)):
        small = compact(host, keep)
        assert_equal(run(host, small), masked(host, keep))
        assert parameters(small) == parameters(model) - removed_parameters(model, units, HeadMask(units, keep))


def test_projections_in_front_of_a_norm_of_all_heads_stay_whole():
    """Two groups of two query heads of width 8, of 32 features: a group takes its values and output columns along."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("olmo2", **GROUPED))
    size = parameters(model)
    prune_heads(model, {0: [1]})
    kept = model.model.layers[0].self_attn
    assert [kept.q_proj.out_features, kept.k_proj.out_features, kept.v_proj.out_features] == [32, 16, 8]
    assert parameters(model) == size - (8 * 32 + 32 * 16)
    prune_heads(model, {0: [0]})
    assert not list(model.model.layers[0].self_attn.parameters())[1:]  # but the output projection, of width 0
    assert parameters(model) == size - (2 * 32 * 32 + 2 * 16 * 32 + 32 + 16)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("deberta", dict(talking_head=True), "not known which of its heads use the parameter .*head_logits_proj"),
        ("stablelm", dict(qk_layernorm=True), "not known which of its heads use the parameter .*q_layernorm"),
        ("nystromformer", dict(num_landmarks=3), "its inverse starts from the largest value of all heads"),
    ],
)
def test_settings_that_are_refused(name, changes, message):
    model = AutoModel.from_config(AutoConfig.for_model(name, **{**of(name).overrides, **changes}))
    size = parameters(model)
    with pytest.raises(HeadPruningError, match=f"cannot be cut out exactly: .*{message}.*; export the model masked"):
        prune_heads(model, {0: [0]})
    assert recipe_of(model) is None and parameters(model) == size


# -- generation ----------------------------------------------------------------------------------------------------

SEARCHES = {"greedy": {}, "beam": {"num_beams": 3}, "static": {"cache_implementation": "static"}}
NO_STATIC_CACHE = ("prophetnet",)  # in transformers itself


@pytest.mark.parametrize("emptied", [False, True], ids=["uneven", "first layers emptied"])
@pytest.mark.parametrize(
    "name",
    few(
        ["llama", "gpt2", "bloom", "mpt", "codegen", "olmo2", "bart", "marian", "t5", "fsmt", "prophetnet"],
        *("llama", "gpt2", "bloom", "bart", "t5", "prophetnet"),
    ),
)
def test_generation_with_a_cache(name, emptied):
    family = of(name)
    auto = AutoModelForCausalLM if family.feed == "text" else AutoModelForSeq2SeqLM
    model = shaken(auto.from_config(AutoConfig.for_model(name, **copy.deepcopy(dict(family.overrides)))))
    units = unit_map(model)
    keep = some(SimpleNamespace(units=units), 6)
    for kind in units.kinds() if emptied else ():
        keep[next(where for site, where in units.slices() if site.kind == kind)] = False
    mask = HeadMask(units, keep)
    small = copy.deepcopy(model)
    prune_heads(small, mask)
    padding = torch.tensor([[1] * 6, [0] * 2 + [1] * 4])
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    settings |= dict(return_dict_in_generate=True, output_scores=True, input_ids=WORDS, attention_mask=padding)
    settings |= {} if family.feed == "text" else dict(decoder_start_token_id=1)
    for search in [search for kind, search in SEARCHES.items() if kind != "static" or name not in NO_STATIC_CACHE]:
        with head_mask(model, mask):
            expected = model.generate(**settings, **search)
        found = small.generate(**settings, **search)
        assert torch.equal(found.sequences, expected.sequences)
        for mine, other in zip(found.scores, expected.scores, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


# -- recipes of other versions --------------------------------------------------------------------------------------

# What an attention module of T5 returns beside its output: position bias, and attentions always or when asked for.
ALWAYS = {"returns": [["position_bias", 3], None], "attentions": [None, 0]}
ASKED = {"returns": [["position_bias", 3]], "attentions": [["output_attentions", 7], 1]}


@pytest.mark.parametrize("written", [ALWAYS, ASKED], ids=["always", "asked"])
@pytest.mark.parametrize("name", ["t5", "longt5"])
def test_a_recipe_of_another_version_of_transformers(name, written):
    host = without_dropout(of(name))
    keep = np.zeros(host.units.num_heads, dtype=bool)
    recipe = json.loads(json.dumps(recipe_of(compact(host, keep))))
    for entry in recipe["sites"].values():
        entry["empty"][1] |= {**written, "inputs": [["hidden_states", 5]]}
    model = apply_recipe(copy.deepcopy(host.model), recipe)
    assert_equal(run(host, model), masked(host, keep))


def test_a_recipe_of_version_1_keeps_its_silent_head():
    host = without_dropout(of("t5"))
    keep = some(host, 3)
    recipe = json.loads(json.dumps(recipe_of(compact(host, keep))))
    recipe["version"] = 1
    first = recipe["sites"][host.units.attention[0].name]
    first |= {"kept": [], "dummy": 2, "empty": [host.units.attention[0].out_proj, None]}
    model = apply_recipe(copy.deepcopy(host.model), recipe)
    assert_equal(run(host, model), masked(host, keep))
    assert model.get_submodule(host.units.attention[0].projections[0]).out_features == 8
    again = {site.name: [0] for site in host.units.attention[1:]}
    prune_heads(model, again)
    assert recipe_of(model)["version"] == 2 and recipe_of(model)["sites"][host.units.attention[0].name]["dummy"] == 2
    mask = mask_without(host.units, again, HeadMask(host.units, keep))
    assert_equal(run(host, model), masked(host, mask.keep))


# -- prune_heads ---------------------------------------------------------------------------------------------------

BATCH = dict(input_ids=torch.arange(5, 21).reshape(2, 8))
SITES = [f"bert.encoder.layer.{layer}.attention" for layer in range(2)]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**BATCH).logits


def test_heads_are_numbered_as_in_the_original():
    model, twin = tiny_bert(), tiny_bert()
    assert pruned_heads(model) is None
    assert prune_heads(model, {0: [0, 2]}).kept_heads() == {SITES[0]: [1, 3], SITES[1]: [0, 1, 2, 3]}
    mask = prune_heads(model, {0: [2, 3], SITES[1]: [3]})  # 2 is gone already
    assert mask.kept_heads() == {SITES[0]: [1], SITES[1]: [0, 1, 2]} and pruned_heads(model) == mask
    assert prune_heads(model, {0: [0, 2, 3]}) == mask
    mask_heads(twin, mask)
    torch.testing.assert_close(logits(model), logits(twin), rtol=0, atol=1e-5)
    assert prune_heads(model, HeadMask(mask.unit_map, np.zeros(8))).kept == 0
    assert prune_heads(model, {1: [0]}).kept == 0
    restore_heads(twin)
    mask_heads(twin, {0: range(4), 1: range(4)})
    torch.testing.assert_close(logits(model), logits(twin), rtol=0, atol=1e-5)
    with pytest.raises(HeadPruningError, match="heads 0 to 3; 4 is not one"):
        prune_heads(model, {0: [4]})


def test_the_least_important_heads_of_a_pruned_model_have_their_original_numbers():
    model = tiny_bert()
    prune_heads(model, {0: [0, 2]})
    chosen = least_important(model, np.array([5.0, 1.0, 2.0, 3.0, 4.0, 0.0]), 2)
    assert chosen == {SITES[0]: [3], SITES[1]: [3]}
    assert prune_heads(model, chosen).kept_heads() == {SITES[0]: [1], SITES[1]: [0, 1, 2]}


def test_a_compact_model_is_measured_masked_and_trained():
    model = tiny_bert()
    prune_heads(model, {0: [0, 2], 1: [0, 1, 2, 3]})
    units = unit_map(model)
    assert [(site.name, site.heads) for site in units.attention] == [(SITES[0], 2)]
    dense = logits(model)
    mask_heads(model, {0: [1]})
    assert not torch.equal(logits(model), dense)
    restore_heads(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for _ in range(5):
        losses.append(model.train()(**BATCH, labels=torch.tensor([0, 1])).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


def test_heads_of_a_pruned_model_are_masked_by_their_original_numbers():
    model, twin = tiny_bert(), tiny_bert()
    prune_heads(model, {0: range(4), 1: [0]})
    assert mask_heads(model, {0: [1], 1: [0, 2]}).kept_heads() == {SITES[1]: [0, 2]}
    mask_heads(twin, {0: range(4), 1: [0, 2]})
    torch.testing.assert_close(logits(model), logits(twin), rtol=0, atol=1e-5)
    expanded = grouped("llama")
    remove_query_heads(expanded, {0: [0]}, expand=True)
    assert mask_heads(expanded, {0: [1], 1: [0]}).keep.tolist() == [True, False, False, False, True]


def test_a_mask_of_the_heads_that_are_left_prunes_again():
    model = tiny_bert()
    prune_heads(model, {0: range(4), 1: [0]})
    mask = HeadMask(unit_map(model), np.array([True, False, True]))
    assert prune_heads(model, mask).kept_heads() == {SITES[0]: [], SITES[1]: [1, 3]}
    with pytest.raises(HeadPruningError, match="another architecture"):
        prune_heads(model, mask)


def test_gated_and_adapted_models_are_refused():
    model = tiny_bert()
    mask_heads(model, {0: [1]})
    with pytest.raises(HeadPruningError, match="heads of .* are gated; detach the session, or take the mask off"):
        prune_heads(model, {0: [1]})
    restore_heads(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["query"], r=2))
    with pytest.raises(HeadPruningError, match="query carries an adapter; call merge_and_unload first"):
        prune_heads(adapted, {0: [1]})
    assert pruned_heads(model) is None
    assert prune_heads(adapted.merge_and_unload(), {0: [1]}).kept == 7


def test_nothing_removed_is_nothing_changed():
    model = tiny_bert()
    assert prune_heads(model, {0: []}).kept == 8 and recipe_of(model) is None
    units = unit_map(model)
    assert removed_parameters(model, units, full_mask(units)) == 0


@pytest.mark.parametrize("heads, size", [(144, 109_484_547), (132, 107_122_947), (72, 95_314_947), (12, 83_506_947)])
def test_sizes_of_bert_base(heads, size):
    """109,484,547 parameters with three labels, less 196,800 per head that goes: uneven layers, some emptied."""
    with torch.device("meta"):
        model = transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=3))
    units = unit_map(model)
    keep = np.arange(144) < heads
    mask = HeadMask(UnitMap(units.attention), keep)
    assert parameters(model) - removed_parameters(model, units, mask) == size
    prune_heads(model, mask)
    assert parameters(model) == size
    emptied = [layer for layer in range(12) if heads <= 12 * layer]
    for layer in emptied:
        attention = model.bert.encoder.layer[layer].attention
        assert isinstance(attention.self, NoHeads) and attention.self.query is None
        assert attention.output.dense.weight.shape == (768, 0) and attention.output.dense.bias.shape == (768,)


# -- query heads that share keys -----------------------------------------------------------------------------------


def grouped(name: str) -> nn.Module:
    """4 query heads of 8 in 2 groups, two layers."""
    return shaken(AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **dict(of(name).overrides))))


def without_queries(model: nn.Module, removed: dict[str, list[int]]) -> nn.Module:
    """A copy that does not read these query heads."""
    twin = copy.deepcopy(model)
    for site in unit_map(model).attention:
        for head in removed.get(site.name, ()):
            twin.get_submodule(site.out_proj).weight.data[:, 8 * head : 8 * head + 8] = 0.0
    return twin


QUERIES = [
    ({0: [1, 2]}, False, [(2, 8), (2, 16)]),  # one of each group
    ({0: [0, 3], 1: [2, 3]}, False, [(2, 8), (1, 16)]),  # a whole group in the second layer
    ({0: [0, 1, 2]}, False, [(1, 8), (2, 16)]),
    ({0: [0]}, True, [(3, 8), (2, 16)]),
    ({0: [0, 1, 2, 3], 1: [3]}, True, [(3, 8)]),
]


@pytest.mark.parametrize("removed, expand, left", QUERIES, ids=lambda value: str(value) if type(value) is dict else "")
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "phi3", "stablelm", "starcoder2", "gemma2"])
def test_query_heads(name, removed, expand, left):
    model = grouped(name)
    names = [site.name for site in unit_map(model).attention]
    twin = without_queries(model, {names[layer]: heads for layer, heads in removed.items()})
    small = copy.deepcopy(model)
    kept = remove_query_heads(small, removed, expand=expand)
    assert kept == {names[layer]: [head for head in range(4) if head not in heads] for layer, heads in removed.items()}
    assert [(site.heads, site.head_dim) for site in unit_map(small).attention] == left
    settings = dict(input_ids=WORDS, max_new_tokens=5, do_sample=False, num_beams=2, pad_token_id=0, eos_token_id=None)
    fresh = AutoModelForCausalLM.from_config(copy.deepcopy(small.config)).eval()
    apply_recipe(fresh, json.loads(json.dumps(recipe_of(small)))).load_state_dict(small.state_dict())
    with torch.no_grad():
        expected = twin(input_ids=WORDS).logits
        for each in (small, fresh):
            torch.testing.assert_close(each(input_ids=WORDS).logits, expected, rtol=0, atol=1e-5)
    assert torch.equal(small.generate(**settings), twin.generate(**settings))


def test_query_heads_after_groups_and_again():
    model = grouped("llama")
    names = [site.name for site in unit_map(model).attention]
    small = copy.deepcopy(model)
    prune_heads(small, {1: [0]})
    remove_query_heads(small, {1: [0, 3], 0: [1, 3]})  # 0 is gone already
    remove_query_heads(small, {0: [1, 2, 3]})
    assert prune_heads(small, {0: []}).kept_heads() == {names[0]: [0], names[1]: [1]}
    expected = without_queries(model, {names[0]: [1, 2, 3], names[1]: [0, 1, 3]})
    with torch.no_grad():
        torch.testing.assert_close(small(input_ids=WORDS).logits, expected(input_ids=WORDS).logits, rtol=0, atol=1e-5)
    assert small.model.layers[1].self_attn.num_key_value_groups == 1
    prune_heads(small, {0: [0], 1: [1]})
    assert all(isinstance(layer.self_attn, NoHeads) for layer in small.model.layers)


def test_query_heads_that_cannot_be_removed():
    model = grouped("llama")
    before = model(input_ids=WORDS).logits
    for heads, message in (
        ({0: [0]}, "groups of .* would keep 1, 2 query heads; remove equally many from each, or pass expand=True"),
        ({0: [4]}, "query heads 0 to 3; 4 is not one of them"),
        ({"no": [0]}, "no site no"),
        ({0: 1}, "must be a list of integers"),
        ({0: ["1"]}, "must be a list of integers"),
        ([0], "must be a dict"),
    ):
        with pytest.raises(HeadPruningError, match=message):
            remove_query_heads(model, heads)
    assert recipe_of(model) is None and torch.equal(model(input_ids=WORDS).logits, before)
    with pytest.raises(HeadPruningError, match="share no keys"):
        remove_query_heads(tiny_bert(), {0: [0]})
    remove_query_heads(model, {0: [0]}, expand=True)
    for remove in (prune_heads, remove_query_heads):
        with pytest.raises(HeadPruningError, match="its keys and values were repeated"):
            remove(model, {0: [1]})
    assert prune_heads(model, {1: [0]}).kept == 3
