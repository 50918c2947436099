"""Pruning of single weights: PLATON and its siblings, gradual magnitude, the masks of SPD; in float32."""

import numpy as np

ONE = np.float32(1.0)


def cubic_ratio(t, first, last, start, stop):
    """Remaining ratio of update t, from 1."""
    if t <= start:
        return first
    if t > stop:
        return last
    return last + (first - last) * (1.0 - (t - start) / (stop - start)) ** 3


class Platon:
    """PLATON: its buffers, score and global mask. ``kind``: ``platon``, ``sensitivity`` or ``magnitude``."""

    def __init__(self, kind, total, *, warmup_steps, initial_warmup, final_warmup, initial_threshold, final_threshold,
                 deltaT, beta1=0.85, beta2=0.0):  # fmt: skip
        self.kind, self.window = kind, deltaT
        self.b1, self.b2 = np.float32(beta1), np.float32(1.0 if kind == "sensitivity" else beta2)
        self.start, self.stop = initial_warmup * warmup_steps, total - final_warmup * warmup_steps
        self.first, self.last = initial_threshold, final_threshold
        self.s, self.average, self.uncertainty = {}, {}, {}

    def scores(self, t, weights, gradients):
        """Of all tensors by name, after update t."""
        found, tau, n = {}, t % self.window, t // self.window
        for name, theta in weights.items():
            if self.kind == "magnitude":
                found[name] = np.abs(theta)
                continue
            newest, zero = np.abs(theta * gradients[name]), np.zeros_like(theta)
            s, average = self.s.get(name, zero), self.average.get(name, zero)
            u = self.uncertainty.get(name, zero)
            if tau == 0:
                average = self.b1 * average + (ONE - self.b1) * s
                if self.b2 == 2:
                    u = (np.float32(n) * u + (s - average) ** 2) / np.float32(n + 1)
                else:
                    u = self.b2 * u + (ONE - self.b2) * np.abs(s - average)
                s = newest
            else:
                s = (np.float32(tau) * s + newest) / np.float32(tau + 1)
            self.s[name], self.average[name], self.uncertainty[name] = s, average, u
            if self.b2 == 1:
                found[name] = average
            elif self.b2 == 0:
                found[name] = average * np.abs(s - average)
            else:
                found[name] = average * (np.sqrt(u) if self.b2 == 2 else u)
        return found

    def update(self, t, weights, gradients):
        """Zero, in place, what the mask of update t zeroes; returns the remaining ratio."""
        ratio = cubic_ratio(t, self.first, self.last, self.start, self.stop)
        scores = self.scores(t, weights, gradients)
        due = t > self.start and (t > self.stop or t % self.window == 0)
        if due:
            every = sorted(float(value) for score in scores.values() for value in score.flat)
            k = int(len(every) * (1.0 - ratio))
            if k:
                threshold = every[k - 1]
                for name, theta in weights.items():
                    theta[scores[name] < threshold] = 0.0
        return ratio


def gradual_progress(t, begin, end):
    """q(t) of Zhu and Gupta, from 0 to 1."""
    if t >= end:
        return 1.0
    return 1.0 - min(max((1.0 - (t - begin) / (end - begin)) ** 3, 0.0), 1.0)


def smallest(x, k):
    """The threshold below and at which k values lie; below all of them for k = 0."""
    ordered = sorted(float(value) for value in x.flat)
    return ordered[k - 1] if k else ordered[0] - 1.0


class GradualMagnitude:
    """The masks of the Intel package: per tensor, per block of rows and columns, or n of every m."""

    def __init__(
        self,
        *,
        target_sparsity,
        initial_sparsity=0.0,
        threshold_decay=0.0,
        pruning_frequency,
        begin_pruning_step,
        end_pruning_step,
        policy_begin_step,
        policy_end_step,
        block=None,
        group=None,
    ):
        self.target, self.initial, self.decay = target_sparsity, initial_sparsity, threshold_decay
        self.frequency, self.begin, self.end = pruning_frequency, begin_pruning_step, end_pruning_step
        self.first, self.last = policy_begin_step, policy_end_step
        self.block, self.group = block, group
        self.threshold, self.masks = {}, {}

    def mask(self, name, w, sparsity):
        size = np.abs(w)
        if self.group:
            keep = np.ones(size.size, dtype=bool)
            for start in range(0, size.size, self.group):
                order = sorted(range(start, start + self.group), key=lambda i: (size.flat[i], i))
                keep[order[: int(sparsity * self.group)]] = False
            return keep.reshape(size.shape)
        pooled = size
        if self.block:
            rows, columns = size.shape[0] // self.block, size.shape[1] // self.block
            parts = size.reshape(rows, self.block, columns, self.block)
            pooled = np.array([[parts[i, :, j, :].mean() for j in range(columns)] for i in range(rows)])
        new = smallest(pooled, int(sparsity * pooled.size))
        self.threshold[name] = self.decay * self.threshold.get(name, 0.0) + (1.0 - self.decay) * new
        keep = pooled > self.threshold[name]
        return np.kron(keep, np.ones((self.block, self.block), dtype=bool)) if self.block else keep

    def attach(self, weights):
        """The masks before the first update."""
        self.masks = {name: self.mask(name, w, self.initial) for name, w in weights.items()}

    def update(self, t, weights):
        """The masks after update t, counted from 0; ``weights`` are the values that masks do not zero."""
        on = t >= self.begin and (self.end == -1 or t <= self.end) and (t - self.begin) % self.frequency == 0
        if on:
            q = gradual_progress(t, self.first, self.last)
            sparsity = self.initial + (self.target - self.initial) * q
            self.masks = {name: self.mask(name, w, sparsity) for name, w in weights.items()}
        return self.masks


class SpdMasks:
    """The masks of sparse progressive distillation: per tensor, nested, at ``t`` from 1."""

    def __init__(self, sparsity, length, frequency):
        self.sparsity, self.length, self.frequency = sparsity, length, frequency
        self.masks = {}

    def update(self, t, weights):
        """Zero, in place; returns whether masks were drawn."""
        drawn = 0 < t < self.length and t % self.frequency == 0
        for name, w in weights.items():
            if name in self.masks:
                w[~self.masks[name]] = 0.0
            if drawn:
                part = (t // self.frequency) / (self.length // self.frequency)
                s = self.sparsity + (0.0 - self.sparsity) * (1.0 - part) ** 3
                keep = int(w.size * (1.0 - s))
                ordered = sorted((abs(float(value)) for value in w.flat), reverse=True)
                self.masks[name] = np.abs(w) >= ordered[keep - 1] if keep else np.zeros(w.shape, dtype=bool)
            if name in self.masks:
                w[~self.masks[name]] = 0.0
        return drawn
