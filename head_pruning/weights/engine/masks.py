"""One bit per weight, kept where it costs least."""

from __future__ import annotations

from typing import Sequence

import numpy as np
import torch

from .portions import Portion

# The smallest normal float32: what a carrier holds in place of 0, so that its sign tells.
TINY = 2.0**-126
_SIGN = -(2**31)  # the sign's bit of a float32 seen as int32


class BoolMasks:
    """Masks of one byte per weight, in the portions' state ``mask``."""

    kind = "mask"

    def store(self, portion: Portion, keep: Sequence[torch.Tensor]) -> None:
        """Set the masks of a portion."""
        for mask, new in zip(portion.state[self.kind], keep):
            mask.copy_(new)

    def store_above(
        self, portion: Portion, scores: Sequence[torch.Tensor], threshold: torch.Tensor, inclusive: bool
    ) -> None:
        """Keep what scores at least ``threshold``, or with ``inclusive`` pruning more than it; the scores are lost."""
        for mask, score in zip(portion.state[self.kind], scores):
            (torch.gt if inclusive else torch.ge)(score, threshold, out=mask)

    def prune(self, portion: Portion, number: int, places: np.ndarray) -> None:
        """Take weights out of the ``number``-th mask of a portion on the CPU, by their places in row-major order."""
        portion.state[self.kind][number].view(-1).numpy()[places] = False

    def keep(self, portion: Portion) -> list[torch.Tensor]:
        """``bool`` of the portion's shapes: which weights stay."""
        return portion.state[self.kind]

    def _positive(self, portion: Portion) -> list[torch.Tensor]:
        """float32, above 0 where the weight stays."""
        scratch = portion.scratch(1)
        torch._foreach_copy_(scratch, portion.state[self.kind])
        return scratch

    def apply(self, portion: Portion, *groups: Sequence[torch.Tensor]) -> None:
        """Zero what does not stay, in each of the groups of tensors of the portion's shapes."""
        positive = None
        for tensors in groups:
            if all(tensor.dtype == torch.float32 for tensor in tensors):
                positive = self._positive(portion) if positive is None else positive
                for tensor, x in zip(tensors, positive):
                    # tensor = x > 0 ? tensor : 0 in one vectorised pass; products with booleans take ten times as long
                    torch.ops.aten.threshold_backward.grad_input(tensor, x, 0.0, grad_input=tensor)
            else:
                for tensor, keep in zip(tensors, self.keep(portion)):
                    tensor.masked_fill_(~keep, 0.0)


class SignMasks(BoolMasks):
    """Masks in the signs of a float32 state whose values are above 0 otherwise (negative: the weight goes).

    They take no memory. Whoever owns the state reads it through ``abs``.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def store(self, portion: Portion, keep: Sequence[torch.Tensor]) -> None:
        for carrier, x, new in zip(portion.state[self.kind], portion.scratch(1), keep):
            torch.copysign(carrier, x.copy_(new).sub_(0.5), out=carrier)

    def store_above(
        self, portion: Portion, scores: Sequence[torch.Tensor], threshold: torch.Tensor, inclusive: bool
    ) -> None:
        for carrier, score in zip(portion.state[self.kind], scores):
            # The sign of a difference of floats is exact, that of equal ones positive: no score is -0.0.
            difference = score.sub_(threshold).neg_().add_(0.0).neg_() if inclusive else score.sub_(threshold)
            # Takes half the time of copysign, which calls a function for every few numbers.
            bits = carrier.view(torch.int32).bitwise_and_(~_SIGN)
            bits.bitwise_or_(difference.view(torch.int32).bitwise_and_(_SIGN))

    def prune(self, portion: Portion, number: int, places: np.ndarray) -> None:
        flat = portion.state[self.kind][number].view(-1).numpy()
        flat[places] = -np.abs(flat[places])

    def keep(self, portion: Portion) -> list[torch.Tensor]:
        return [carrier > 0 for carrier in portion.state[self.kind]]

    def _positive(self, portion: Portion) -> list[torch.Tensor]:
        return portion.state[self.kind]
