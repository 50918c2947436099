"""Whether a model has broken down."""

import torch
from torch import nn


def all_finite(model: nn.Module) -> bool:
    """Whether no trained weight is NaN or infinite; the device is waited for once.

    Of weights that are sharded over ranks, those of this rank are looked at.
    """
    trained = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in trained]
    sums = [tensor.sum(dtype=torch.float32) for tensor in local if tensor.numel()]
    return not sums or bool(torch.stack([total.to(sums[0].device) for total in sums]).isfinite().all())
