"""The loss of each example of a batch, where the model gives one loss for all of them."""

from typing import Any, Iterator, Mapping, Optional

import torch
from torch import nn
from torch.nn.functional import cross_entropy

IGNORED = -100  # the label that no loss of transformers counts
# How close the loss of all examples must come to the model's own, relative to it; float32 sums are closer.
_EQUAL = 2e-5


def mean_of_examples(model: nn.Module, batch: Any) -> bool:
    """Whether the model's mean over a batch weighs every example alike: whether no label is left out of it.

    Waits for the device.
    """
    if not isinstance(batch, Mapping):
        return True
    config = getattr(model, "config", None)
    padding = getattr(config, "pad_token_id", None)  # which some models leave out, too
    longest = max(
        (value.shape[1] for value in batch.values() if torch.is_tensor(value) and value.dim() > 1), default=0
    )
    left_out = []
    for name, labels in batch.items():
        if not torch.is_tensor(labels) or labels.is_floating_point():
            continue
        if "label" in name:
            left_out.append(labels == IGNORED)
            if isinstance(padding, int) and labels.dim() > 1:
                left_out.append(labels == padding)
        elif name in ("start_positions", "end_positions"):
            left_out.append(labels >= longest)  # answers that were cut off
    return not any(bool(found.any()) for found in left_out)


def token_losses(value: torch.Tensor, output: Any, batch: Mapping) -> Optional[torch.Tensor]:
    """``[B]``: each example's mean over its own labels, or None where the model's loss is no such mean.

    Tried are the labels as they are and as labels of the token before; that they give the model's own loss is checked.

    Args:
        value: the model's loss, ``[]``.
        output: what else the model returned; its ``logits`` are looked at.
        batch: the inputs; their ``labels`` are looked at.
    """
    labels, logits = batch.get("labels"), getattr(output, "logits", None)
    if not torch.is_tensor(labels) or not torch.is_tensor(logits) or logits.dim() != labels.dim() + 1:
        return None
    fitting = []
    for shift in (0, 1) if labels.dim() == 2 else (0,):
        counted = labels[:, shift:] if shift else labels
        scores = logits[:, :-shift] if shift else logits
        if scores.shape[:-1] != counted.shape:
            continue
        losses = cross_entropy(
            scores.flatten(0, -2).float(), counted.flatten(), reduction="none", ignore_index=IGNORED
        )
        sums = losses.view_as(counted).flatten(1).sum(1) if counted.dim() > 1 else losses
        counts = (counted != IGNORED).view(len(counted), -1).sum(1)
        whole = sums.detach().sum() / counts.sum()
        if bool((whole - value.detach()).abs() <= _EQUAL * value.detach().abs()):
            fitting.append(sums / counts)  # NaN without labels
    return fitting[0] if len(fitting) == 1 else None


def rows_of(batch: Any, count: int) -> Iterator[Any]:
    """The ``count`` examples of a batch, each as a batch of one."""
    return (_row(batch, row, count) for row in range(count))


def _row(batch: Any, row: int, count: int) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch[row : row + 1] if batch.dim() and batch.shape[0] == count else batch
    if isinstance(batch, Mapping):
        return {name: _row(value, row, count) for name, value in batch.items()}
    if type(batch) in (list, tuple):
        return type(batch)(_row(value, row, count) for value in batch)
    return batch
