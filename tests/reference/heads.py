"""Gates on heads: DSP and its straight-through variant (Li et al. 2021), L0 gates (Voita et al. 2019), Michel."""

import math

import numpy as np

SMALLEST = 2.2250738585072014e-308


def softmax(x):
    """By the definition, with the largest taken out."""
    e = np.exp(x - x.max())
    return e / e.sum()


def soft_top_k(w, u, k, temperature):
    """The relaxed subset and its Jacobian by w: ``[N]``, ``[N, N]``.

    Li et al., equations 8 to 10, the Jacobian carried along with every step.
    """
    n = len(w)
    r, by_w = np.array(w, dtype=np.float64), np.eye(n)
    for i in range(n):
        r[i] += -math.log(-math.log(u[i] * (1.0 - SMALLEST) + SMALLEST))
    mask, jacobian = np.zeros(n), np.zeros((n, n))
    p, p_by_w = np.zeros(n), np.zeros((n, n))
    for j in range(k):
        if j > 0:
            for i in range(n):
                if 1.0 - p[i] > SMALLEST:
                    r[i] += math.log(1.0 - p[i])
                    by_w[i] += -p_by_w[i] / (1.0 - p[i])
                else:
                    r[i] += math.log(SMALLEST)
        p = softmax(r / temperature)
        p_by_w = (np.diag(p) - np.outer(p, p)) @ by_w / temperature
        mask += p
        jacobian += p_by_w
    return mask, jacobian


def straight_through(w, k):
    """1 for every logit above the (K+1)-th largest; the gradient of the mask is handed to w as it is."""
    threshold = sorted(w, reverse=True)[k]
    return np.array([1.0 if value > threshold else 0.0 for value in w])


def top_k(w, k):
    """The final mask: the K largest, the first of equal ones."""
    order = sorted(range(len(w)), key=lambda i: (-w[i], i))
    return np.array([i in order[:k] for i in range(len(w))])


def temperature(step, initial, final, cooldown):
    """T(s) = Ti^(1 - s/Sc) * Tf^(s/Sc)."""
    if step >= cooldown:
        return final
    return initial ** (1.0 - step / cooldown) * final ** (step / cooldown)


BETA, LOW, HIGH, EPSILON = 0.33, -0.1, 1.1, 1e-6


def logistic(x):
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def clip(x, low, high):
    return min(max(x, low), high)


def l0_gate(log_a, u):
    """A training gate."""
    u = (1.0 - 2.0 * EPSILON) * u + EPSILON
    s = logistic((math.log(u) - math.log(1.0 - u) + log_a) / BETA)
    return clip(s * (HIGH - LOW) + LOW, 0.0, 1.0)


def l0_evaluation_gate(log_a):
    return clip(1.2 * logistic(log_a) - 0.1, 0.0, 1.0)


def l0_open(log_a):
    """The probability that a gate is open."""
    return clip(logistic(log_a - BETA * math.log(-LOW / HIGH)), EPSILON, 1.0 - EPSILON)


def slope(function, x, step=1e-6):
    """The derivative, as a difference."""
    return (function(x + step) - function(x - step)) / (2.0 * step)


def gradient(function, x, step=1e-5):
    """All partial derivatives of a function of an array, as differences."""
    found = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        found[index] = (function(up) - function(down)) / (2.0 * step)
    return found


def importance(loss, batches, mask, signed=False):
    """Michel: the sum over batches of ``|d loss / d mask|``."""
    total = np.zeros(mask.shape)
    for batch in batches:
        of_batch = gradient(lambda xi, batch=batch: loss(batch, xi), mask)
        total += of_batch if signed else np.abs(of_batch)
    return total


def normalized(scores, by_layer=True, globally=True):
    """Each row divided by its length, then all scaled to 0..1; ``[rows, heads]``."""
    scores = scores.copy()
    if by_layer:
        for row in scores:
            row /= math.sqrt(sum(value * value for value in row)) + 1e-20
    if globally:
        scores = (scores - scores.min()) / (scores.max() - scores.min())
    return scores


def michel_rounds(measure, shape, per_round, exact):
    """The masks after each round: the ``per_round`` least important of the heads that are left go."""
    mask, masks = np.ones(shape), []
    scores = measure(mask)
    while mask.any():
        ranked = [(math.inf if mask[place] == 0 else scores[place], place) for place in np.ndindex(shape)]
        for _, place in sorted(ranked)[:per_round]:
            mask[place] = 0.0
        masks.append(mask.copy())
        if exact and mask.any():
            scores = measure(mask)
    return masks


class Adam:
    """Adam with decoupled weight decay, as fairseq and transformers 3.1 have it: epsilon before bias correction."""

    def __init__(self, lr, beta1=0.9, beta2=0.999, decay=0.0):
        self.lr, self.beta1, self.beta2, self.decay, self.t = lr, beta1, beta2, decay, 0
        self.m = self.v = 0.0

    def step(self, w, g, factor=1.0):
        self.t += 1
        self.m = self.beta1 * self.m + (1.0 - self.beta1) * g
        self.v = self.beta2 * self.v + (1.0 - self.beta2) * g * g
        lr = self.lr * factor
        w = w - lr * self.decay * w
        size = lr * math.sqrt(1.0 - self.beta2**self.t) / (1.0 - self.beta1**self.t)
        return w - size * self.m / (np.sqrt(self.v) + 1e-8)
