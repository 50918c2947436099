"""Exactly K of N: independent coins, given that K of them show heads. Marginals, covariance and draws, in float64.

The distribution of SIMPLE (Ahmed et al. 2023, "SIMPLE: A Gradient Estimator for k-Subset Sampling"):
p(z) proportional to exp(w.z) on |z| = K.
"""

from __future__ import annotations

import math

import numpy as np

from ...errors import HeadPruningError

# exp(-_TAIL) is below the rounding of float64: terms and tails that small are left out.
_TAIL = 43.0
# Up to so many coins are thrown together: the more there are, the more seldom exactly K show heads.
_MANY = 2048


class ConditionalBernoulli:
    """p(z) proportional to exp(w.z) over all z in {0, 1}^N with exactly K ones.

    A shift of all logits does not change p. It is chosen so that independent coins of p_i = sigmoid(w_i + shift) show
    K heads in the mean; then the probability that they show exactly K is never small, and nothing underflows. It is
    the Fourier inverse of the count's characteristic function, phi(t) = prod_j (1 - p_j + p_j e^it). With
    r_j(t) = p_j e^it / (1 - p_j + p_j e^it) and the weights psi(t) proportional to phi(t) e^-itK, whose sum is 1,

        P(z_i = 1) = sum_t psi(t) r_i(t)        P(z_i = z_j = 1) = sum_t psi(t) r_i(t) r_j(t)        (i != j)

    where t runs over the multiples of 2 pi / M: exactly, where M exceeds the distance from K to any count that may
    occur; to the rounding of float64, where it exceeds that to any count of a probability above exp(-43). Some 25 of
    these t matter, whatever K: the cost is linear in N.

    Args:
        logits: w, ``float64[N]``.
        keep: K, from 0 to N.

    Raises:
        HeadPruningError: a logit is NaN or infinite.
    """

    def __init__(self, logits: np.ndarray, keep: int) -> None:
        if not np.isfinite(logits).all():
            raise HeadPruningError(
                "The gate logits are NaN or infinite; lower --pruning-lr or --gate-clip-norm "
                "and train from the last good checkpoint."
            )
        self.keep, self._logits = keep, logits
        self._certain = keep in (0, logits.size)
        if self._certain:
            self.marginals = np.full(logits.size, float(keep > 0))
            return
        self._p = p = _coins(logits, keep)
        period, angles = _angles(p, max(keep, logits.size - keep))
        turned = p[:, None] * np.exp(1j * angles)
        factors = turned + (1.0 - p)[:, None]
        self._r = turned / factors
        psi = factors.prod(axis=0) * np.exp(-1j * keep * angles)
        psi[1:] *= 2.0
        self.probability_of_keep = float(psi.real.sum()) / period
        self._psi = psi / psi.real.sum()
        self.marginals = (self._r @ self._psi).real

    def covariance_times(self, gradient: np.ndarray) -> np.ndarray:
        """Cov(z) g, ``float64[N]``: the gradient of g.z's mean with respect to the logits (SIMPLE's estimator).

        Args:
            gradient: g = dL/dz, ``[N]``.
        """
        if self._certain:
            return np.zeros(self.marginals.size)
        g = gradient - gradient.mean()  # the sum of z is K: what all entries share counts for nothing
        pairs = self._r @ (self._psi * (g @ self._r))
        own = g * ((self._r * (1.0 - self._r)) @ self._psi)
        return (pairs + own).real - self.marginals * (self.marginals @ g)

    def sample(self, generator: np.random.Generator) -> np.ndarray:
        """``bool[N]``: a draw. Coins are thrown until exactly K show heads; of many, the first half until the second
        may well show the others, and then the second as a draw of its own.
        """
        if self._certain:
            return self.marginals > 0.0
        if self._p.size > _MANY:
            half = self._p.size // 2
            drawn, rest = self._first(half, generator)
            return np.concatenate([drawn, ConditionalBernoulli(self._logits[half:], rest).sample(generator)])
        throws = math.ceil(3.0 / self.probability_of_keep)
        while True:
            thrown = generator.random((throws, self._p.size)) < self._p
            hits = np.flatnonzero(thrown.sum(axis=1) == self.keep)
            if hits.size:
                return thrown[hits[0]]

    def _first(self, half: int, generator: np.random.Generator) -> tuple[np.ndarray, int]:
        """The first ``half`` coins of a draw, and how many of the others must show heads.

        Coins are thrown, and taken in proportion to the probability that the others show what is missing, which is
        never above that of their count's characteristic function in absolute value, summed.
        """
        p = self._p[half:]
        _, angles = _angles(p, p.size, around=2)
        phi = (p[:, None] * np.exp(1j * angles) + (1.0 - p)[:, None]).prod(axis=0)
        phi[1:] *= 2.0
        never_above = np.abs(phi).sum()
        while True:
            drawn = generator.random(half) < self._p[:half]
            rest = self.keep - int(drawn.sum())
            likely = (phi * np.exp(-1j * rest * angles)).real.sum()
            if 0 <= rest <= p.size and generator.random() * never_above < likely:
                return drawn, rest


def _angles(p: np.ndarray, farthest: int, around: int = 1) -> tuple[int, np.ndarray]:
    """M, and the multiples of 2 pi / M from 0 to pi that matter for the count of coins ``p``.

    Args:
        p: ``float64[N]``.
        farthest: the largest distance of two counts.
        around: 1 if only the mean count is asked for; 2 if any that may occur is.
    """
    variance = float((p * (1.0 - p)).sum())
    # Bernstein's inequality bounds the counts that occur; an odd M has no t = pi, where 1 - p + p e^it may be 0.
    reach = _TAIL / 3.0 + math.sqrt(_TAIL**2 / 9.0 + 2.0 * _TAIL * variance)
    period = min(farthest, math.ceil(around * reach)) + 1 | 1
    angles = 2.0 * np.pi / period * np.arange(period // 2 + 1)  # those below 0 are the conjugates
    return period, angles[variance * (1.0 - np.cos(angles)) < _TAIL]  # |phi(t)| <= exp(-variance (1 - cos t))


def _coins(logits: np.ndarray, keep: int) -> np.ndarray:
    """``sigmoid(logits + shift)``, whose sum is ``keep`` to within 0.01."""
    ordered = np.sort(logits)[::-1]
    low, high = -ordered[0] - 50.0, -ordered[-1] + 50.0
    shift = -0.5 * (ordered[keep - 1] + ordered[keep])
    while True:
        p = 0.5 * (np.tanh(0.5 * (logits + shift)) + 1.0)
        excess = p.sum() - keep
        if abs(excess) < 0.01 or high - low < 1e-12 * max(1.0, abs(shift)):
            return p
        low, high = (low, shift) if excess > 0 else (shift, high)
        slope = (p * (1.0 - p)).sum()
        step = shift - excess / slope if slope > 0 else np.inf
        shift = step if low < step < high else 0.5 * (low + high)
