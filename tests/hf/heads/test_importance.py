"""head_importance against derivatives taken another way, per batch and per example."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BatchEncoding

from head_pruning import HeadMask, HeadPruningError, UnfiredSiteError, UnitMap
from head_pruning.importance import normalize_importance
from head_pruning.masks import mask_without
from hf_plugin.heads.importance import head_importance, least_important
from hf_plugin.heads.masking import mask_heads
from hf_plugin.mapping.unit_map import unit_map
from tests.hf.few_models import MODELS, batch_of, make, with_scaled_columns
from tests.hf.heads.test_heads import hooks, never_run, some_removed

ALL = sorted(MODELS)
RAW = {"normalize_by_layer": False, "normalize_globally": False, "progress": False}


def derivatives(model: nn.Module, batch: dict, gates=None) -> np.ndarray:
    """d loss / d gate through the columns of the output projections, ``[N]``."""
    units = unit_map(model)
    leaf = torch.ones(units.num_heads) if gates is None else torch.tensor(gates, dtype=torch.float32)
    leaf.requires_grad_(True)
    with_scaled_columns(model, units, leaf, batch).backward()
    model.zero_grad()
    return leaf.grad.double().numpy()


def one_by_one(batch: dict) -> list[dict]:
    return [{key: value[i : i + 1] for key, value in batch.items()} for i in range(len(batch["labels"]))]


def close(ours: np.ndarray, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("name", ALL)
def test_per_batch_and_per_example(name):
    model = make(name)
    batches = [batch_of(name, step, examples=2 + step) for step in range(2)]
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    per_batch = head_importance(model, batches, **RAW)
    close(per_batch, sum(np.abs(derivatives(model, batch)) for batch in batches) / tokens)
    per_example = head_importance(model, batches, per_example=True, **RAW)
    singles = [example for batch in batches for example in one_by_one(batch)]
    close(per_example, sum(np.abs(derivatives(model, example)) for example in singles) / tokens)
    assert per_batch.shape == (unit_map(model).num_heads,) and per_batch.dtype == np.float64
    assert (per_example > 1.5 * per_batch).any()  # derivatives of opposite sign cancel in a batch


@pytest.mark.parametrize("per_example", [False, True])
def test_losses_of_ones_own(per_example):
    """A mean and the vector of the examples' losses are the same thing; batches may be of any type."""
    model = make("bert")
    batches = [batch_of("bert", step) for step in range(2)]

    def mean(model, batch):
        return model(**batch).loss

    def vector(model, batch):
        ids, mask, labels = batch
        return nn.functional.cross_entropy(model(ids, mask).logits, labels, reduction="none")

    expected = head_importance(model, batches, per_example=per_example, **RAW)
    np.testing.assert_array_equal(head_importance(model, batches, per_example=per_example, loss=mean, **RAW), expected)
    listed = [[batch["input_ids"], batch["attention_mask"], batch["labels"]] for batch in batches]
    found = head_importance(model, listed, per_example=per_example, loss=vector, **RAW)
    examples = sum(len(batch["labels"]) for batch in batches)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    close(found * examples, expected * tokens)
    encoded = [BatchEncoding(batch) for batch in batches]
    np.testing.assert_array_equal(head_importance(model, encoded, per_example=per_example, **RAW), expected)


@pytest.mark.parametrize("per_example", [False, True])
def test_masked_heads_have_derivatives_and_pruned_heads_have_none(per_example):
    model = make("bart")
    units = unit_map(model)
    batches = [batch_of("bart", step, examples=1) for step in range(2)]
    mask = mask_without(units, some_removed(units))
    masked = head_importance(model, batches, mask=mask, per_example=per_example, **RAW)
    expected = sum(np.abs(derivatives(model, batch, mask.keep)) for batch in batches)
    close(masked, expected / sum(int(batch["attention_mask"].sum()) for batch in batches))
    assert masked[~mask.keep].any()
    mask_heads(model, mask)
    pruned = head_importance(model, batches, per_example=per_example, **RAW)
    close(pruned, np.where(mask.keep, masked, 0.0))


def test_normalisation_is_that_of_the_core():
    model, batches = make("t5"), [batch_of("t5")]
    raw = head_importance(model, batches, **RAW)
    for by_layer in (False, True):
        for globally in (False, True):
            options = {"normalize_by_layer": by_layer, "normalize_globally": globally, "progress": False}
            expected = normalize_importance(raw, unit_map(model), by_layer=by_layer, globally=globally)
            np.testing.assert_array_equal(head_importance(model, batches, **options), expected)
    by_site = unit_map(model).by_site(raw)
    assert list(by_site) == [site.name for site in unit_map(model).attention]
    np.testing.assert_array_equal(np.concatenate(list(by_site.values())), raw)


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(per_example, fails):
    model = make("bert").train()
    model.bert.encoder.layer[0].eval()
    model.classifier.weight.requires_grad_(False)
    model(**batch_of("bert")).loss.backward()
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    seen = []

    def loss(model, batch):
        seen.append((any(m.training for m in model.modules()), any(p.requires_grad for p in model.parameters())))
        if fails:
            raise KeyError
        return model(**batch).loss

    options = {"per_example": per_example, "loss": loss, **RAW}
    with torch.no_grad():
        if fails:
            with pytest.raises(KeyError):
                head_importance(model, [batch_of("bert")], **options)
        else:
            assert head_importance(model, [batch_of("bert")], **options).all()
    assert seen == [(False, False)]
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    for parameter, before in zip(model.parameters(), gradients):
        assert (parameter.grad is None) == (before is None)
        assert before is None or torch.equal(parameter.grad, before)
    assert hooks(model) == 0


def test_the_least_important_heads_that_are_left():
    model = make("bart")
    units = unit_map(model)  # 4 encoder heads, 2 cross, 2 decoder
    encoder, cross, decoder = (site.name for site in units.attention)
    scores = np.array([5.0, 1.0, 4.0, 1.0, 2.0, 6.0, 0.0, 3.0])
    assert least_important(model, scores, 3) == {encoder: [1, 3], cross: [], decoder: [0]}
    assert least_important(model, scores, 2) == {encoder: [1], cross: [], decoder: [0]}
    mask_heads(model, least_important(model, scores, 3))
    assert least_important(model, scores, 2) == {encoder: [], cross: [0], decoder: [1]}
    assert mask_heads(model, least_important(model, scores, 5)).kept == 0
    assert least_important(model, scores, 0) == {encoder: [], cross: [], decoder: []}
    for count in (1, -1):
        with pytest.raises(HeadPruningError, match="The model has 0 heads left; choose from 0 to 0"):
            least_important(model, scores, count)
    with pytest.raises(HeadPruningError, match="3 scores for 8 heads"):
        least_important(model, scores[:3], 1)


def test_data_without_a_loss_is_refused():
    model, batch = make("bert"), batch_of("bert")
    without = {key: value for key, value in batch.items() if key != "labels"}
    with pytest.raises(HeadPruningError, match="put labels into the batches, or pass loss="):
        head_importance(model, [without], **RAW)
    with pytest.raises(HeadPruningError, match="A batch is a tuple, not a dict of the model's inputs"):
        head_importance(model, [tuple(batch.values())], **RAW)
    with pytest.raises(HeadPruningError, match="no batches"):
        head_importance(model, [], **RAW)
    with pytest.raises(HeadPruningError, match="no tensor with examples"):
        head_importance(model, [{}], per_example=True, loss=lambda model, batch: model(**batch_of("bert")).loss, **RAW)
    with pytest.raises(HeadPruningError, match="The loss of batch 1 of 1 is NaN or infinite"):
        head_importance(model, [batch], loss=lambda model, batch: model(**batch).loss * float("nan"), **RAW)
    assert hooks(model) == 0


def test_the_loss_of_a_dict_and_of_a_tuple():
    model, batch = make("bert"), batch_of("bert")
    expected, forward = head_importance(model, [batch], **RAW), model.forward
    for other in (
        lambda **batch: {"logits": 0, "loss": forward(**batch).loss},
        lambda **batch: forward(**batch, return_dict=False),
        lambda **batch: SimpleNamespace(loss=forward(**batch).loss),
    ):
        model.forward = other
        np.testing.assert_array_equal(head_importance(model, [batch], **RAW), expected)
    model.forward = lambda labels=None, **batch: forward(**batch, return_dict=False)  # whose first part is no loss
    without = {key: value for key, value in batch.items() if key != "labels"}
    for inputs in (batch, without):
        with pytest.raises(HeadPruningError, match="returned no loss; put labels into the batches, or pass loss="):
            head_importance(model, [inputs], **RAW)


def test_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(HeadPruningError, match="call head_importance outside of it"):
        head_importance(make("bert"), [batch_of("bert")], **RAW)


def test_sites_that_do_not_run_and_foreign_masks_are_refused():
    model = make("bert")
    with pytest.raises(UnfiredSiteError, match="gates of unused_attention never ran"):
        head_importance(model, [batch_of("bert")], unit_map=never_run(model), **RAW)
    alone = UnitMap(never_run(model).attention[-1:])
    with pytest.raises(UnfiredSiteError, match="gates of unused_attention never ran"):
        head_importance(model, [batch_of("bert")], unit_map=alone, **RAW)
    foreign = unit_map(make("bart"))
    with pytest.raises(HeadPruningError, match="The head mask belongs to another architecture"):
        head_importance(model, [batch_of("bert")], mask=HeadMask(foreign, np.ones(8)), **RAW)


def test_progress_is_shown_when_asked_for(capsys):
    model = make("bert")
    for progress in (False, True):
        head_importance(model, [batch_of("bert")], progress=progress)
        assert ("importance" in capsys.readouterr().err) == progress
