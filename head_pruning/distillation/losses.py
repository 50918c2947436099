"""How far a student is from its teacher: logits, hidden states, attention probabilities.

Each is a mean over the elements of the real tokens, in float32 or wider. The published code of SPD and of others takes
the mean over padding too: pass no masks for that.
"""

from __future__ import annotations

from typing import Optional, Sequence

import torch

from ..errors import HeadPruningError
from ..outputs import Outputs


def soft_cross_entropy(
    mine: torch.Tensor, theirs: torch.Tensor, temperature: float, mask: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """SPD's loss of logits (Huang et al. 2022, section 3.3): the mean over rows *and* classes of
    ``-softmax(theirs / temperature) * log_softmax(mine / temperature)``.

    Args:
        mine: ``[..., classes]`` of the student.
        theirs: the same of the teacher.
        temperature: above 0; the loss is not scaled by its square.
        mask: ``bool[...]`` of the rows that count; None: all.
    """
    terms = torch.nn.functional.softmax(_wide(theirs) / temperature, -1) * torch.nn.functional.log_softmax(
        _wide(mine) / temperature, -1
    )
    return _mean_of_rows(-terms.mean(-1), mask)


def divergence(
    mine: torch.Tensor, theirs: torch.Tensor, temperature: float, mask: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """Distillation of logits (Hinton et al. 2015): ``temperature**2`` times the Kullback-Leibler divergence of the
    student from the teacher, summed over classes and averaged over rows. Arguments as :func:`soft_cross_entropy`.
    """
    ours = torch.nn.functional.log_softmax(_wide(mine) / temperature, -1)
    target = torch.nn.functional.log_softmax(_wide(theirs) / temperature, -1)
    far = torch.nn.functional.kl_div(ours, target, reduction="none", log_target=True).sum(-1)
    return temperature**2 * _mean_of_rows(far, mask)


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _mean_of_rows(values: torch.Tensor, mask: Optional[torch.Tensor]) -> torch.Tensor:
    return values.mean() if mask is None else (values * mask).sum() / mask.sum().clamp(min=1)


def mean_square(mine: torch.Tensor, theirs: torch.Tensor, mask: Optional[torch.Tensor]) -> torch.Tensor:
    """Mean of squared differences over the elements where ``mask``, which broadcasts to their shape, is true."""
    if mask is None:
        return torch.nn.functional.mse_loss(_wide(mine), _wide(theirs))
    # Elements per element of the mask, which has as many dimensions.
    repeated = mine.numel() // mask.numel()
    far = (_wide(mine) - _wide(theirs)) * mask
    return torch.dot(far.flatten(), far.flatten()) / (mask.sum() * repeated).clamp(min=1)


def cosine_distance(mine: torch.Tensor, theirs: torch.Tensor, mask: Optional[torch.Tensor]) -> torch.Tensor:
    """Mean of ``1 - cosine`` over the rows where ``mask`` (``bool[..., 1]``) is true."""
    ours, target = (_wide(values).flatten(0, -2) for values in (mine, theirs))
    alike = ours.new_ones(ours.shape[0])
    far = torch.nn.functional.cosine_embedding_loss(ours, target, alike, reduction="none")
    return _mean_of_rows(far, None if mask is None else mask.flatten())


#: How hidden states may be compared, by name.
HIDDEN = {"mse": mean_square, "cosine": cosine_distance}


def hidden_states(
    mine: Outputs, theirs: Outputs, pairs: Sequence[tuple[int, int]], *, padding: bool = False, kind: str = "mse"
) -> torch.Tensor:
    """Sum over ``pairs`` (student's, teacher's) of how far hidden states are from each other.

    Args:
        mine: what the student gave.
        theirs: what the teacher gave.
        pairs: which states are compared, counted from 0 as :class:`~head_pruning.outputs.Outputs` lists them.
        padding: whether the means run over padding too.
        kind: one of :data:`HIDDEN`.

    Raises:
        HeadPruningError: the widths differ.
    """
    terms = []
    for i, j in pairs:
        ours, target = mine.hidden_states[i], theirs.hidden_states[j]
        if ours.shape != target.shape:
            raise HeadPruningError(
                f"The student's hidden states are {ours.shape[-1]} wide and its teacher's {target.shape[-1]}, so they "
                "cannot be compared; take a teacher of the same width, or compare logits only (--distill-hidden 0)."
            )
        tokens = None if padding else mine.masks[i]
        terms.append(HIDDEN[kind](ours, target, None if tokens is None else tokens[:, :, None]))
    return torch.stack(terms).sum()


def attentions(
    mine: Outputs, theirs: Outputs, pairs: Sequence[tuple[int, int]], *, padding: bool = False
) -> torch.Tensor:
    """Sum over ``pairs`` of the mean squared difference of attention probabilities, as :func:`hidden_states`.

    Where padding is left out, what is compared is how real tokens attend to real tokens.

    Raises:
        HeadPruningError: the numbers of heads differ.
    """
    terms = []
    for i, j in pairs:
        ours, target = mine.attentions[i], theirs.attentions[j]
        if ours.shape != target.shape:
            raise HeadPruningError(
                f"The student has {ours.shape[1]} heads in an attention where its teacher has {target.shape[1]}, so "
                "they cannot be compared; compare no attentions (--distill-attention 0)."
            )
        query, key = (None, None) if padding else mine.attention_masks[i]
        mask = None
        if query is not None:
            mask = query[:, None, :, None]
        if key is not None:
            mask = key[:, None, None, :] if mask is None else mask & key[:, None, None, :]
        terms.append(mean_square(ours, target, mask))
    return torch.stack(terms).sum()


def layer_pairs(given: Optional[str], mine: int, theirs: int) -> list[tuple[int, int]]:
    """Which of the student's hidden states or attentions is compared with which of the teacher's.

    Args:
        given: pairs such as "0:0,1:2,2:4", or "last"; None: all, where the teacher has more, spread evenly from
            first to last.
        mine: how many the student has.
        theirs: how many the teacher has.

    Raises:
        HeadPruningError: a pair is none, or names one that is not there.
    """
    if given is None:
        if mine > 1 and theirs > 1:
            return [(i, round(i * (theirs - 1) / (mine - 1))) for i in range(mine)]
        return [(i, theirs - 1) for i in range(mine)]
    if given.strip().lower() == "last":
        return [(mine - 1, theirs - 1)]
    pairs = []
    for word in given.split(","):
        left, colon, right = word.strip().partition(":")
        if not (colon and left.isdecimal() and right.isdecimal()):
            raise HeadPruningError(
                f"--distill-layers {given} is no list of pairs; write STUDENT:TEACHER with commas between, such as "
                "0:0,1:2,2:4, or last."
            )
        if int(left) >= mine or int(right) >= theirs:
            raise HeadPruningError(
                f"--distill-layers {given} names the pair {word.strip()}, but the student has {mine} (from 0) and the "
                f"teacher {theirs}; correct it."
            )
        pairs.append((int(left), int(right)))
    return pairs
