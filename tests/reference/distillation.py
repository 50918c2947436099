"""Sparse progressive distillation (Huang et al. 2022): its losses and the rate at which layers are replaced."""

import math

import numpy as np

from tests.reference.heads import softmax


def replacing_rate(n, kind, rate, k=0.0, start=0, base=None):
    """The rate in force in update n, from 0."""
    if n == 0:
        return rate  # the schedulers act after the first update
    if kind == "none":
        return rate if n < start else 1.0
    if kind == "linear":
        return min(k * n + rate, 1.0)
    if kind == "mixed":
        return rate if n < start else min(rate + k * (n - start), 1.0)
    assert kind == "constantLinearWithGap"
    return rate if n < start else min((rate if base is None else base) + k * (n - start), 1.0)


def mean_square(first, second):
    return float(np.mean((np.asarray(first) - np.asarray(second)) ** 2))


def soft_cross_entropy(mine, theirs, temperature):
    """Mean over rows and classes."""
    terms = []
    for ours, target in zip(mine, theirs):
        p, q = softmax(np.asarray(target) / temperature), softmax(np.asarray(ours) / temperature)
        terms += [-p[c] * math.log(q[c]) for c in range(len(p))]
    return sum(terms) / len(terms)


def losses(mine, theirs, temperature):
    """(L_att, L_rep, L_cls) of two results of :func:`tests.reference.bert.bert`."""
    of_attention = sum(mean_square(*pair) for pair in zip(mine[2], theirs[2]))
    of_states = sum(mean_square(*pair) for pair in zip(mine[1], theirs[1]))
    return of_attention, of_states, soft_cross_entropy(mine[0], theirs[0], temperature)
