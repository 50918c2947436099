"""Small models without any training framework."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from head_pruning import AttentionSite, UnitMap


class Attention(nn.Module):
    """Multi-head attention with the four projections of every framework."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            p(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for p, source in ((self.q, x), (self.k, memory), (self.v, memory))
        )
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Seq2Seq(nn.Module):
    """Two encoder layers and one decoder layer; ``forward(source, target)`` gives one vector per target place."""

    width, heads = 12, 3

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(Attention(self.width, self.heads) for _ in range(2))
        self.cross = Attention(self.width, self.heads)
        self.decoder = Attention(self.width, self.heads)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(self.width, 5)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        for layer in self.encoder:
            source = torch.tanh(source + self.dropout(layer(source, source)))
        target = torch.tanh(target + self.dropout(self.decoder(target, target)))
        target = torch.tanh(target + self.dropout(self.cross(target, source)))
        return self.head(target)


def _site(name: str, kind: str, layer: str, model: nn.Module) -> AttentionSite:
    return AttentionSite(
        name=name,
        kind=kind,
        layer=layer,
        heads=model.heads,
        head_dim=model.width // model.heads,
        out_proj=f"{name}.out",
        projections=(f"{name}.q", f"{name}.k", f"{name}.v"),
    )


def make_seq2seq(seed: int = 0) -> tuple[nn.Module, UnitMap]:
    """The model and its map of 12 heads: rows encoder, encoder, cross, decoder."""
    torch.manual_seed(seed)
    model = Seq2Seq()
    names = (
        ("encoder.0", "encoder_self", "encoder.0"),
        ("encoder.1", "encoder_self", "encoder.1"),
        ("cross", "decoder_cross", "decoder"),
        ("decoder", "decoder_self", "decoder"),
    )
    return model, UnitMap(tuple(_site(*entry, model) for entry in names))


def make_batch(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Source, target and labels of one batch, always the same for a step."""
    generator = torch.Generator().manual_seed(1000 + step)
    source, target = torch.randn(2, 4, 6, Seq2Seq.width, generator=generator)
    return source, target, torch.randint(5, (4, 6), generator=generator)


def sum_loss(model: nn.Module, batch: tuple) -> torch.Tensor:
    """Cross-entropy summed over the 24 target places of a batch."""
    source, target, labels = batch
    return nn.functional.cross_entropy(model(source, target).flatten(0, 1), labels.flatten(), reduction="sum")


@pytest.fixture
def toy() -> SimpleNamespace:
    """The encoder-decoder model: ``make(seed)``, ``batch(step)``, ``loss(model, batch)``."""
    return SimpleNamespace(make=make_seq2seq, batch=make_batch, loss=sum_loss)


class BertLayer(nn.Module):
    """One post-norm layer of BERT, with transformers' names."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        linear = nn.Linear
        self.attention = nn.ModuleDict(
            {
                "self": nn.ModuleDict({name: linear(width, width) for name in ("query", "key", "value")}),
                "output": nn.ModuleDict({"dense": linear(width, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)}),
            }
        )
        self.intermediate = nn.ModuleDict({"dense": linear(width, inner)})
        self.output = nn.ModuleDict({"dense": linear(inner, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)})

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            self.attention["self"][name](x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        p = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias, -1)
        out = self.attention["output"]
        x = out["LayerNorm"](out["dense"]((p @ v).transpose(1, 2).flatten(2)) + x)
        inner = nn.functional.gelu(self.intermediate["dense"](x))
        return self.output["LayerNorm"](self.output["dense"](inner) + x)


class TinyBert(nn.Module):
    """BERT for sequence classification, without dropout, in the sizes of the recorded run."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        width, layers = config["hidden_size"], config["num_hidden_layers"]
        embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(config["vocab_size"], width, padding_idx=0),
                "position_embeddings": nn.Embedding(config["max_position_embeddings"], width),
                "token_type_embeddings": nn.Embedding(config["type_vocab_size"], width),
                "LayerNorm": nn.LayerNorm(width, eps=1e-12),
            }
        )
        layer = nn.ModuleList(
            BertLayer(width, config["num_attention_heads"], config["intermediate_size"]) for _ in range(layers)
        )
        self.bert = nn.ModuleDict(
            {
                "embeddings": embeddings,
                "encoder": nn.ModuleDict({"layer": layer}),
                "pooler": nn.ModuleDict({"dense": nn.Linear(width, width)}),
            }
        )
        self.classifier = nn.Linear(width, 2)

    def forward(self, input_ids, attention_mask, token_type_ids) -> torch.Tensor:
        e = self.bert["embeddings"]
        position = torch.arange(input_ids.shape[1])
        x = e["word_embeddings"](input_ids) + e["position_embeddings"](position)
        x = e["LayerNorm"](x + e["token_type_embeddings"](token_type_ids))
        bias = (1.0 - attention_mask[:, None, None, :].float()) * -10000.0
        for layer in self.bert["encoder"]["layer"]:
            x = layer(x, bias)
        return self.classifier(torch.tanh(self.bert["pooler"]["dense"](x[:, 0])))


def bert_of(config: dict) -> SimpleNamespace:
    """A BERT: ``model``, ``unit_map`` (of all its heads), ``loss(batch) -> loss, logits``."""
    model = TinyBert(config)
    heads = config["num_attention_heads"]
    names = [f"bert.encoder.layer.{i}" for i in range(config["num_hidden_layers"])]
    unit_map = UnitMap(
        tuple(
            AttentionSite(
                name=f"{name}.attention",
                kind="encoder_self",
                layer=name,
                heads=heads,
                head_dim=config["hidden_size"] // heads,
                out_proj=f"{name}.attention.output.dense",
                projections=tuple(f"{name}.attention.self.{part}" for part in ("query", "key", "value")),
            )
            for name in names
        )
    )

    def loss(batch: dict[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
        labels = tensors.pop("labels")
        logits = model(**tensors)
        return nn.functional.cross_entropy(logits, labels), logits

    return SimpleNamespace(model=model, unit_map=unit_map, loss=loss)


@pytest.fixture
def tiny_bert(reference) -> SimpleNamespace:
    """The recorded BERT, of 2 layers x 4 heads."""
    import json

    found = bert_of(json.loads((reference / "hf_tiny_config.json").read_text()))
    state = torch.load(reference / "hf_tiny_state.pt", weights_only=True)
    state = {name: value for name, value in state.items() if name not in ("w", "bert.embeddings.position_ids")}
    found.model.load_state_dict({name: value for name, value in state.items() if not name.endswith("log_a")})
    return found
