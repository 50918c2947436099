"""BERT for sequence classification in float64, head by head, with a gate on every head's attention probabilities."""

import math

import numpy as np

_erf = np.vectorize(math.erf)


def _linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def _norm(state, name, x):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-12) * state[f"{name}.weight"] + state[f"{name}.bias"]


def _softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def layer(state, name, x, bias, heads, gates):
    """One post-norm layer: its output, and the probabilities ``[B, heads, S, S]`` before the gates."""
    query, key, value = (_linear(state, f"{name}.attention.self.{part}", x) for part in ("query", "key", "value"))
    width = x.shape[-1] // heads
    contexts, probabilities = [], []
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        p = _softmax(query[..., own] @ key[..., own].swapaxes(-1, -2) / math.sqrt(width) + bias)
        probabilities.append(p)
        contexts.append((p * gates[head]) @ value[..., own])
    attended = _linear(state, f"{name}.attention.output.dense", np.concatenate(contexts, -1))
    x = _norm(state, f"{name}.attention.output.LayerNorm", attended + x)
    inner = _linear(state, f"{name}.intermediate.dense", x)
    inner = inner * 0.5 * (1.0 + _erf(inner / math.sqrt(2.0)))
    return _norm(state, f"{name}.output.LayerNorm", _linear(state, f"{name}.output.dense", inner) + x), np.stack(
        probabilities, 1
    )


def bert(states, batch, heads, gates=None):
    """Logits ``[B, classes]``, hidden states and attention probabilities.

    Args:
        states: for each layer the weights (by transformers' names) that it takes; the rest is that of the first.
        batch: ``input_ids``, ``attention_mask``, ``token_type_ids``, each ``[B, S]``.
        heads: of every layer.
        gates: ``[layers, heads]``; None: ones.
    """
    state = {name: np.asarray(value, dtype=np.float64) for name, value in states[0].items()}
    gates = np.ones((len(states), heads)) if gates is None else gates
    tables = (state[f"bert.embeddings.{kind}_embeddings.weight"] for kind in ("word", "token_type", "position"))
    word, kind, position = tables
    ids = batch["input_ids"]
    x = word[ids] + kind[batch["token_type_ids"]] + position[np.arange(ids.shape[1])]
    x = _norm(state, "bert.embeddings.LayerNorm", x)
    bias = np.where(batch["attention_mask"][:, None, :] == 0, -1e4, 0.0)
    hidden, attentions = [x], []
    for i, of_layer in enumerate(states):
        of_layer = {name: np.asarray(value, dtype=np.float64) for name, value in of_layer.items()}
        x, p = layer(of_layer, f"bert.encoder.layer.{i}", x, bias, heads, gates[i])
        hidden.append(x)
        attentions.append(p)
    pooled = np.tanh(_linear(state, "bert.pooler.dense", x[:, 0]))
    return _linear(state, "classifier", pooled), hidden, attentions


def cross_entropy(logits, labels):
    """Mean over the rows."""
    return float(np.mean([-math.log(_softmax(row)[label]) for row, label in zip(logits, labels)]))
