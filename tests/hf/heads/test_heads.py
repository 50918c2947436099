"""mask_heads and head_mask as users of transformers 4 knew them, on an encoder, a decoder and two sequence models."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification

from head_pruning import AttentionSite, HeadMask, HeadPruningError, UnfiredSiteError, UnitMap
from head_pruning.masks import mask_without
from hf_plugin.heads.masking import head_mask, mask_heads, masked_heads, restore_heads
from hf_plugin.mapping.unit_map import unit_map
from tests.hf.few_models import MODELS, batch_of, logits, make, with_scaled_columns

ALL = sorted(MODELS)
BERT_SITES = [f"bert.encoder.layer.{layer}.attention" for layer in range(2)]


def some_removed(units: UnitMap) -> dict[str, list[int]]:
    """Head 1 of every site, all heads of the last one."""
    removed = {site.name: [1] for site in units.attention}
    removed[units.attention[-1].name] = list(range(units.attention[-1].heads))
    return removed


def with_zeroed_columns(model: nn.Module, mask: HeadMask) -> nn.Module:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for site, where in mask.unit_map.slices():
            weight = twin.get_submodule(site.out_proj).weight
            weight *= torch.from_numpy(mask.keep[where]).repeat_interleave(site.head_dim)
    return twin


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


# -- mask_heads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("training", [False, True])
def test_pruned_heads_equal_zeroed_columns_and_come_back(name, training):
    model = make(name).train(training)
    dense, state = logits(model, name), {key: value.clone() for key, value in model.state_dict().items()}
    removed = some_removed(unit_map(model))
    mask = mask_heads(model, removed)
    assert mask == mask_without(unit_map(model), removed) == masked_heads(model)
    found = logits(model, name)
    assert torch.equal(found, logits(with_zeroed_columns(make(name).train(training), mask), name))
    assert not torch.allclose(found, dense, atol=1e-3)
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[key], state[key]) for key in state)
    restore_heads(model)
    assert torch.equal(logits(model, name), dense) and masked_heads(model) is None
    assert hooks(model) == 0 and vars(model).keys() == vars(make(name)).keys()
    restore_heads(model)


def test_layers_are_counted_as_in_transformers_4():
    by_index, by_name = make("bert"), make("bert")
    assert mask_heads(by_index, {0: [0, 2], np.int64(1): {3}}) == mask_heads(
        by_name, {BERT_SITES[0]: [0, 2], BERT_SITES[1]: [3]}
    )
    assert torch.equal(logits(by_index, "bert"), logits(by_name, "bert"))
    assert masked_heads(by_index).kept_heads() == {BERT_SITES[0]: [1, 3], BERT_SITES[1]: [0, 1, 2]}


def test_a_saved_mask_prunes_another_copy(tmp_path):
    model, other = make("bart"), make("bart")
    mask_heads(model, some_removed(unit_map(model))).save(tmp_path / "mask.safetensors")
    mask_heads(other, HeadMask.load(tmp_path / "mask.safetensors"))
    assert torch.equal(logits(model, "bart"), logits(other, "bart"))


removals = st.dictionaries(st.integers(0, 1), st.sets(st.integers(0, 3)), max_size=2)


@pytest.mark.slow
@given(st.lists(removals, min_size=1, max_size=4))
def test_calls_add_up(calls):
    model = make("bert")
    dense = logits(model, "bert")
    masks = [mask_heads(model, call) for call in calls]
    gone = {layer: set().union(*(call.get(layer, ()) for call in calls)) for layer in range(2)}
    for layer, site in enumerate(BERT_SITES):
        assert set(range(4)) - set(masks[-1].kept_heads()[site]) == gone[layer]
    assert all((after.keep <= before.keep).all() for before, after in zip(masks, masks[1:]))
    together = make("bert")
    mask_heads(together, gone)
    assert torch.equal(logits(model, "bert"), logits(together, "bert"))
    restore_heads(model)
    assert torch.equal(logits(model, "bert"), dense)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_stays_pruned_and_is_its_own(clone):
    model = make("bert")
    dense = logits(model, "bert")
    mask_heads(model, {0: [1]})
    pruned = logits(model, "bert")
    twin = clone(model)
    assert torch.equal(logits(twin, "bert"), pruned) and masked_heads(twin) == masked_heads(model)
    mask_heads(twin, {1: [0, 1, 2]})
    further = logits(twin, "bert")
    assert masked_heads(twin).kept == 4 and not torch.equal(further, pruned)
    assert masked_heads(model).kept == 7 and torch.equal(logits(model, "bert"), pruned)
    restore_heads(model)
    assert torch.equal(logits(model, "bert"), dense) and torch.equal(logits(twin, "bert"), further)
    restore_heads(twin)
    assert torch.equal(logits(twin, "bert"), dense) and hooks(twin) == 0


def test_what_is_saved_is_the_dense_model(tmp_path):
    model = make("bert")
    dense = logits(model, "bert")
    model.save_pretrained(tmp_path / "before")
    mask_heads(model, {0: [0, 1, 2, 3]})
    model.save_pretrained(tmp_path / "after")
    files = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "after").iterdir())
    for name in files:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "after").eval()
    assert torch.equal(logits(loaded, "bert"), dense)


def test_a_pruned_model_trains_and_changes_its_precision():
    model = make("bert").train()
    mask_heads(model, {0: [1], 1: [0, 2]})
    model(**batch_of("bert")).loss.backward()
    out = model.bert.encoder.layer[0].attention.output.dense.weight.grad
    assert not out[:, 4:8].any() and out[:, :4].any() and out[:, 8:].any()
    exact = logits(model.eval(), "bert")
    torch.testing.assert_close(logits(model.bfloat16(), "bert").float(), exact, atol=0.2, rtol=0.1)


@pytest.mark.parametrize("name", ["bart", "t5", "llama"])
def test_generation_uses_the_pruned_heads(name):
    model = make(name)
    inputs = {key: value for key, value in batch_of(name).items() if key != "labels"}
    settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2, "pad_token_id": 0, "eos_token_id": None}
    dense = model.generate(**inputs, **settings)
    mask = mask_heads(model, some_removed(unit_map(model)))
    pruned = model.generate(**inputs, **settings)
    assert torch.equal(pruned, with_zeroed_columns(make(name), mask).generate(**inputs, **settings))
    assert not torch.equal(pruned, dense)


@pytest.mark.parametrize("group", [0, 1])
def test_under_grouped_query_attention_a_head_is_a_group(group):
    """Group g holds the query heads 2g and 2g + 1: removing it is the same as zeroing their value."""
    model, twin = make("llama"), make("llama")
    mask_heads(model, {1: [group]})
    with torch.no_grad():
        twin.model.layers[1].self_attn.v_proj.weight[4 * group : 4 * group + 4] = 0.0
    torch.testing.assert_close(logits(model, "llama"), logits(twin, "llama"), rtol=0, atol=1e-5)


def never_run(model: nn.Module) -> UnitMap:
    """The map of a BERT with one more site, which its forward does not call."""
    model.unused = nn.Linear(16, 16)
    site = AttentionSite("unused_attention", "encoder_self", "unused", 4, 4, "unused")
    return UnitMap((*unit_map(model).attention, site))


def test_pruning_a_module_that_does_not_run_is_an_error():
    model = make("bert")
    units = never_run(model)
    mask_heads(model, {0: [1]}, unit_map=units)
    logits(model, "bert")
    mask_heads(model, {2: [1]})
    logits(model.train(), "bert")  # layers may be dropped
    for _ in range(2):
        with pytest.raises(UnfiredSiteError, match="gates of unused_attention did not run"):
            logits(model.eval(), "bert")
    restore_heads(model)
    logits(model, "bert")


BAD = [
    ("bert", {0: [4]}, "encoder.layer.0.attention has the heads 0 to 3; 4 is not one"),
    ("bert", {0: [-1]}, "-1 is not one of them"),
    ("bert", {2: [0]}, "attention layers 0 to 1; 2 is not one"),
    ("bert", {-1: [0]}, "-1 is not one of them"),
    ("bert", {"layer": [0]}, "no site layer; the model has bert.encoder.layer.0.attention"),
    ("bert", {0.5: [0]}, "0.5 is neither a layer's index nor the name of a site"),
    ("bert", {0: 1}, "must be a list of integers"),
    ("bert", {0: [1.0]}, "must be a list of integers"),
    ("bert", [0, 1], "must be a dict such as"),
    ("llama", {0: [2]}, r"heads 0 to 1 \(key/value groups, which query heads share\); 2 is not one"),
    ("bart", {0: [0]}, "ambiguous in a model with encoder_self, decoder_cross, decoder_self attention; name the site"),
    ("t5", {0: [0]}, "such as encoder.block.0.layer.0.SelfAttention"),
]


@pytest.mark.parametrize("name, heads, message", BAD)
def test_bad_heads_are_refused_and_change_nothing(name, heads, message):
    model = make(name)
    with pytest.raises(HeadPruningError, match=message):
        mask_heads(model, heads)
    assert masked_heads(model) is None and hooks(model) == 0


def test_masks_and_maps_of_other_models_are_refused():
    model, other = make("bert"), make("bart")
    foreign = mask_without(unit_map(other), {})
    with pytest.raises(HeadPruningError, match="The head mask belongs to another architecture"):
        mask_heads(model, foreign)
    with pytest.raises(HeadPruningError, match="The head mask belongs to another architecture"):
        with head_mask(model, foreign):
            pass
    mask_heads(model, {0: [0]})
    with pytest.raises(HeadPruningError, match="The unit map belongs to another architecture"):
        mask_heads(model, {0: [0]}, unit_map=unit_map(other))
    assert masked_heads(model).kept == 7


# -- head_mask -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("training", [False, True])
def test_fractional_masks_scale_columns_and_gradients_flow(name, training):
    """Against the same multiplication on the weights, in both modes and over two batches in one block."""
    model = make(name).train(training)
    units = unit_map(model)
    values = torch.linspace(0.0, 1.0, units.num_heads)
    plain = model(**batch_of(name)).loss
    ours, theirs = values.clone().requires_grad_(True), values.clone().requires_grad_(True)
    losses = []
    with head_mask(model, ours):
        for step in range(2):
            losses.append(model(**batch_of(name, step)).loss)
            losses[-1].backward()
    for step, loss in enumerate(losses):
        expected = with_scaled_columns(model, units, theirs, batch_of(name, step))
        torch.testing.assert_close(loss, expected)
        expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4 * float(theirs.grad.abs().max()))
    assert theirs.grad.abs().min() > 0
    assert torch.equal(model(**batch_of(name)).loss, plain) and hooks(model) == 0


def test_every_form_of_a_mask():
    model = make("bert")
    row = [1.0, 0.5, 0.0, 1.0]
    with head_mask(model, torch.tensor([row, row])):
        expected = logits(model, "bert")
    assert not torch.equal(expected, logits(model, "bert"))
    of_v4 = torch.tensor([row, row])[:, None, :, None, None]
    for form in (row, np.array(row), [row, row], row + row, torch.tensor([row, row], dtype=torch.float64), of_v4):
        with head_mask(model, form):
            assert torch.equal(logits(model, "bert"), expected)
    with head_mask(model, None):
        assert torch.equal(logits(model, "bert"), logits(make("bert"), "bert"))
    units = unit_map(model)
    hard = mask_without(units, {BERT_SITES[0]: [2]})
    with head_mask(model, hard):
        expected = logits(model, "bert")
    for form in (hard.keep, hard.keep.reshape(2, 4).astype(int), torch.from_numpy(hard.keep)):
        with head_mask(model, form, unit_map=units):
            assert torch.equal(logits(model, "bert"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_gradient_has_the_form_of_the_mask(dtype):
    """One row for every layer collects the sum over layers."""
    model = make("bert")
    row = torch.ones(4, dtype=dtype, requires_grad=True)
    table = torch.ones(2, 4, requires_grad=True)
    for mask in (row, table):
        with head_mask(model, mask):
            model(**batch_of("bert")).loss.backward()
    assert row.grad.dtype == dtype and row.grad.abs().min() > 0
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(row.grad.float(), table.grad.sum(0), rtol=tolerance, atol=tolerance)


def test_a_mask_may_be_computed_from_parameters():
    model = make("bert")
    scores = torch.zeros(2, 4, requires_grad=True)
    with head_mask(model, torch.sigmoid(scores)):
        model(**batch_of("bert")).loss.backward()
    assert scores.grad.abs().min() > 0


fractions = st.lists(st.floats(0, 1, width=32), min_size=8, max_size=8)


@pytest.mark.slow
@given(fractions, fractions, removals)
def test_masks_multiply_and_leave_nothing_behind(first, second, removed):
    model = make("bert")
    units = unit_map(model)
    dense = logits(model, "bert")
    mask_heads(model, removed)
    with head_mask(model, first):
        with head_mask(model, second):
            found = logits(model, "bert")
    keep = mask_without(units, {BERT_SITES[layer]: sorted(heads) for layer, heads in removed.items()}).keep
    product = torch.tensor(first) * torch.tensor(second) * torch.from_numpy(keep)
    restore_heads(model)
    with head_mask(model, product):
        torch.testing.assert_close(found, logits(model, "bert"), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(model, "bert"), dense) and hooks(model) == 0


def test_an_error_inside_the_block_takes_the_mask_off():
    model = make("bert")
    with pytest.raises(KeyError):
        with head_mask(model, torch.zeros(8)):
            raise KeyError
    with pytest.raises(NotImplementedError):  # what a mask without values gives
        with head_mask(model, torch.ones(2, 4, device="meta")):
            pass
    assert hooks(model) == 0


def test_masking_a_module_that_does_not_run_is_an_error():
    model = make("bert")
    units = never_run(model)
    with head_mask(model, [1.0] * 8 + [1.0] * 4, unit_map=units):
        logits(model, "bert")
    with head_mask(model, [1.0] * 8 + [1.0, 0.5, 1.0, 1.0], unit_map=units):
        with pytest.raises(UnfiredSiteError, match="gates of unused_attention did not run"):
            logits(model, "bert")
    assert hooks(model) == 0


@pytest.mark.parametrize(
    "name, mask, message",
    [
        ("bert", torch.ones(3, 4), r"shape \[3, 4\]; the model takes \[2, 4\] \(sites, heads\), \[4\] or \[8\]"),
        ("bert", torch.ones(2, 1), r"shape \[2, 1\]"),
        ("bert", 1.0, r"shape \[\]"),
        ("bert", [[1.0, 0.0], [1.0]], "no array of numbers"),
        ("bert", "ones", "no array of numbers"),
        ("bart", torch.ones(3, 4), r"takes \[8\], since its sites differ in heads"),
    ],
)
def test_masks_of_another_form_are_refused(name, mask, message):
    model = make(name)
    with pytest.raises(HeadPruningError, match=message):
        with head_mask(model, mask):
            pass
    assert hooks(model) == 0


def test_a_model_wrapped_by_peft_is_pruned_with_its_adapters():
    def wrapped() -> nn.Module:
        torch.manual_seed(0)
        config = LoraConfig(target_modules=["dense"], r=4, init_lora_weights=False)
        return get_peft_model(make("bert"), config).eval()

    model, twin = wrapped(), wrapped()
    mask = mask_heads(model, {0: [1], 1: [0, 2]})
    with torch.no_grad():
        for site, where in mask.unit_map.slices():
            keep = torch.from_numpy(mask.keep[where]).repeat_interleave(site.head_dim)
            layer = twin.get_submodule(site.out_proj)
            layer.base_layer.weight *= keep
            layer.lora_A["default"].weight *= keep
    torch.testing.assert_close(logits(model, "bert"), logits(twin, "bert"))
    assert not torch.allclose(logits(model, "bert"), logits(wrapped(), "bert"), atol=1e-3)


def test_gradients_of_a_mask_survive_activation_checkpointing():
    model = make("llama").train()
    model.config.use_cache = False
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        mask = torch.ones(2, 2, requires_grad=True)
        with head_mask(model, mask):
            model(**batch_of("llama")).loss.backward()
        found.append(mask.grad)
    assert found[0].all() and torch.equal(*found)
