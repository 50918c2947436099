"""The float32 copies that fairseq's half-precision optimizer steps in place of the parameters."""

from typing import Any, Callable, Optional

import torch
from fairseq.optim import FP16Optimizer
from fairseq.optim.amp_optimizer import AMPOptimizer
from torch import nn


def master_of(optimizer: Any) -> Optional[Callable[[nn.Parameter], torch.Tensor]]:
    """Lead from a parameter to its float32 copy, with its gradient in ``.grad``; None where there are no copies.

    Where fairseq keeps all copies in one flat tensor per device (``--fp16`` without ``--fp16-no-flatten-grads``)
    these are views into it.
    """
    if not isinstance(optimizer, FP16Optimizer):
        return None
    copies = optimizer.fp32_params
    if isinstance(copies, dict):
        found = dict(_views(copies, optimizer.fp16_params))
    else:
        found = {id(own): copy for own, copy in zip(optimizer.fp16_params, copies)}
    return lambda parameter: found.get(id(parameter), parameter)


def _views(flat: dict, parameters: list):
    for device, whole in flat.items():
        start = 0
        for own in parameters:
            if len(flat) > 1 and own.device.index != device:  # one of several devices of a pipeline
                continue
            stop = start + own.numel()
            view = whole.data[start:stop].view_as(own)
            view.grad = whole.grad.data[start:stop].view_as(own)
            yield id(own), view
            start = stop


def unscale(optimizer: Any) -> None:
    """Divide the gradients by the loss scale now, where the optimizer would do it on the fly while it steps."""
    if hasattr(optimizer, "_unscale_grads"):
        optimizer._unscale_grads()


def carry_over(old: Any, new: Any) -> None:
    """Let an optimizer that takes the place of another go on with its float32 copies and its loss scale."""
    before, after = master_of(old), master_of(new)
    if before is not None and after is not None:
        for parameter in new.fp16_params:
            copy = before(parameter)
            if copy is not parameter:
                after(parameter).data.copy_(copy.data)
    if isinstance(new, AMPOptimizer):
        new._grad_scaler = old._grad_scaler
    elif getattr(old, "scaler", None) is not None:
        new.scaler = old.scaler
