"""A real BertForSequenceClassification with the recorded weights gives the numbers of the published code."""

import json

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from head_pruning import HeadMask
from hf_plugin.heads.importance import head_importance
from hf_plugin.heads.masking import head_mask, mask_heads
from hf_plugin.mapping.unit_map import unit_map


@pytest.fixture(scope="module")
def recorded(load_arrays):
    return load_arrays("hf_tiny.npz")


@pytest.fixture
def model(reference, recorded) -> BertForSequenceClassification:
    config = BertConfig(**json.loads((reference / "hf_tiny_config.json").read_text()), num_labels=2)
    model = BertForSequenceClassification(config)
    state = {name[3:]: torch.from_numpy(value) for name, value in recorded.items() if name.startswith("sd.")}
    missing, unknown = model.load_state_dict(state, strict=False)
    # Of the recorded state, all but the published code's own logits is the model.
    assert not missing and not [n for n in unknown if n != "w" and not n.endswith(("log_a", "position_ids"))]
    return model.eval()


def batch_of(recorded: dict, index: int) -> dict[str, torch.Tensor]:
    prefix = f"batch{index}."
    return {name[len(prefix) :]: torch.from_numpy(v) for name, v in recorded.items() if name.startswith(prefix)}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_outputs_plain_and_masked(model, recorded, attention):
    """The published mask multiplies probabilities; ours multiplies what the heads give."""
    model.set_attn_implementation(attention)
    mask, batch = recorded["michel.partial_mask"], batch_of(recorded, 0)

    def check(kind):
        with torch.no_grad():
            out = model(**batch)
        np.testing.assert_allclose(out.logits, recorded[f"{kind}.logits"], rtol=0, atol=3e-6)
        np.testing.assert_allclose(out.loss, recorded[f"{kind}.loss"], rtol=0, atol=3e-6)

    check("plain")
    with head_mask(model, mask):
        check("masked")
    check("plain")
    mask_heads(model, HeadMask(unit_map(model), mask))
    check("masked")


@pytest.mark.parametrize("prefix", ["michel.", "michel.partial_"])
def test_importance(model, recorded, prefix):
    mask = HeadMask(unit_map(model), recorded["michel.partial_mask"]) if "partial" in prefix else None
    batches = [batch_of(recorded, index) for index in range(3)]
    stages = {"raw": (False, False), "layernorm": (True, False), "final": (True, True)}
    compared = 0
    for stage, (by_layer, globally) in stages.items():
        if f"{prefix}{stage}" not in recorded:
            continue
        expected = recorded[f"{prefix}{stage}"].reshape(-1)
        options = {"normalize_by_layer": by_layer, "normalize_globally": globally, "progress": False}
        found = head_importance(model, batches, mask=mask, **options)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * expected.max())
        compared += 1
    assert compared == (2 if mask else 3)
