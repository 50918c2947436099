"""A tiny classifier and sentences that it can learn."""

import copy
from typing import Callable

import numpy as np
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

VOCABULARY = 40
HEADS = 8  # 2 layers of 4
_models: dict[str, tuple[nn.Module, torch.Tensor]] = {}


def built(seed: int, build: Callable[..., nn.Module], **options) -> nn.Module:
    """What ``build(**options)`` gives behind this seed, in evaluation mode: a copy, which is quicker than another."""
    key = f"{seed} {build.__qualname__} {options}"
    if key not in _models:
        torch.manual_seed(seed)
        _models[key] = build(**options).eval(), torch.get_rng_state()
    model, drawn = _models[key]
    torch.set_rng_state(drawn)
    return copy.deepcopy(model)


def tiny_bert(seed: int = 0, **options) -> BertForSequenceClassification:
    """2 layers x 4 heads, hidden size 16."""
    return built(seed, _bert, **options)


def _bert(**options) -> BertForSequenceClassification:
    values = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    values |= {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "num_labels": 2, **options}
    return BertForSequenceClassification(BertConfig(**values))


def sentences(count: int, seed: int = 0) -> list[dict]:
    """Sequences of different lengths; the label tells whether the first token comes back."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        ids = generator.integers(5, VOCABULARY, generator.integers(4, 10))
        label = int(generator.random() < 0.5)
        ids[-1] = ids[0] if label else (ids[0] - 4) % (VOCABULARY - 5) + 5
        rows.append({"input_ids": ids.tolist(), "attention_mask": [1] * len(ids), "labels": label})
    return rows


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Pad to the longest."""
    longest = max(len(row["input_ids"]) for row in rows)
    padded = {
        name: torch.tensor([row[name] + [0] * (longest - len(row[name])) for row in rows])
        for name in ("input_ids", "attention_mask")
    }
    return {**padded, "labels": torch.tensor([row["labels"] for row in rows])}


def arguments(folder, **options) -> TrainingArguments:
    """Arguments of a short quiet run on the CPU."""
    values = {"output_dir": str(folder), "max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    values |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    return TrainingArguments(**{**values, **options})
