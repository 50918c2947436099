"""The model and the batches that the published BERT code was recorded on."""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "labels")
# What the recorded state has beside transformers' own: the published code's logits, and positions that are a constant.
NOT_OF_THE_MODEL = {"w", "bert.embeddings.position_ids"}


def recorded_bert(reference: Path, attention: str = "sdpa") -> BertForSequenceClassification:
    """The recorded classifier of 2 layers x 4 heads, without dropout, in evaluation mode.

    Args:
        reference: the folder with the recorded numbers.
        attention: ``eager`` or ``sdpa``.
    """
    options = json.loads((reference / "hf_tiny_config.json").read_text(encoding="utf-8"))
    del options["output_attentions"]  # would choose eager attention
    assert not options["hidden_dropout_prob"] and not options["attention_probs_dropout_prob"]
    model = BertForSequenceClassification(BertConfig(**options, num_labels=2, attn_implementation=attention))
    assert model.config._attn_implementation == attention
    with np.load(reference / "hf_tiny.npz", allow_pickle=False) as arrays:
        state = {name[3:]: torch.from_numpy(arrays[name]) for name in arrays if name.startswith("sd.")}
    missing, left_over = model.load_state_dict(state, strict=False)
    assert not missing and set(left_over) == NOT_OF_THE_MODEL
    return model.eval()


def batch_of(arrays: dict, prefix: str = "", rows: slice = slice(None)) -> dict[str, torch.Tensor]:
    """What the model is called with: the recorded inputs whose names start with ``prefix``."""
    return {name: torch.from_numpy(arrays[prefix + name][rows]) for name in INPUTS}
