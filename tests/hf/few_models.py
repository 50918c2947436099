"""One tiny random model of each kind of attention, with a batch, for tests of what must hold of all of them."""

from typing import Callable

import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from head_pruning import UnitMap
from tests.hf.tiny import built

VOCABULARY = 40
# A larger initializer_range than usual, so that single heads matter.
WIDE = {"initializer_range": 0.3, "vocab_size": VOCABULARY}


def _bert() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**sizes, **WIDE, **dropout))


def _llama() -> nn.Module:
    """4 query heads in 2 key/value groups."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **WIDE, intermediate_size=32))


def _bart() -> nn.Module:
    """Its decoder has fewer and wider heads than its encoder."""
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 2}
    dropout = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    return BartForConditionalGeneration(BartConfig(**sizes, **heads, **dropout, vocab_size=VOCABULARY, init_std=0.3))


def _t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 4, "num_layers": 2, "num_heads": 4, "d_ff": 16}
    return T5ForConditionalGeneration(
        T5Config(**sizes, vocab_size=VOCABULARY, dropout_rate=0.0, decoder_start_token_id=0, initializer_factor=1.5)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"bert": _bert, "llama": _llama, "bart": _bart, "t5": _t5}


def make(name: str) -> nn.Module:
    """The model, the same each time, without dropout, in evaluation mode."""
    return built(7, MODELS[name])


def batch_of(name: str, step: int = 0, examples: int = 3) -> dict[str, torch.Tensor]:
    """Inputs with labels; in a sequence model every example has as many targets as the others."""
    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(5, VOCABULARY, (examples, 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    labels = torch.randint(5, VOCABULARY, (examples, 5), generator=generator)
    if name == "bert":
        labels = labels[:, 0] % 2
    if name == "llama":
        mask, labels = torch.ones_like(ids), ids
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def logits(model: nn.Module, name: str) -> torch.Tensor:
    """Outputs for the first batch."""
    with torch.no_grad():
        return model(**batch_of(name)).logits


def with_scaled_columns(
    model: nn.Module, unit_map: UnitMap, gates: torch.Tensor, batch: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The loss when the columns of the output projections are multiplied by ``[N]`` gates: what a head gate means."""
    weights = {}
    for site, where in unit_map.slices():
        name = f"{site.out_proj}.weight"
        weights[name] = model.get_parameter(name) * gates[where].repeat_interleave(site.head_dim)
    return torch.func.functional_call(model, weights, kwargs=batch).loss
