"""How large a model is and how much it computes: parameters, bytes and multiply-accumulates (MACs)."""

import contextlib
from dataclasses import dataclass
from typing import Any, Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..quantization.engine.tensors import stored_bytes
from ..unit_map import UnitMap


@dataclass(frozen=True)
class Sizes:
    """Of one model and one forward pass.

    Args:
        parameters: each shared one counted once.
        bytes: of the parameters; what a file of them takes but for its header.
        macs: multiply-accumulates of all matrix products and convolutions; looking up embeddings is none.
        attention_macs: those within the sites: query, key, value and output projections, scores and their sums.
    """

    parameters: int
    bytes: int
    macs: int
    attention_macs: int


def _attention(
    query_shape: Sequence[int], key_shape: Sequence[int], value_shape: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    """Floating-point operations, two per MAC; keys and values may be shared by several queries' heads."""
    batch, heads, queries, width = query_shape
    return 2 * batch * heads * queries * key_shape[-2] * (width + value_shape[-1])


# The kernel that the CPU takes; the counter knows those of GPUs only.
_MORE = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


@contextlib.contextmanager
def _frozen(parameters: list[nn.Parameter]) -> Iterator[None]:
    """The counter hooks what could have a gradient, and fails at a view of a parameter, which has no history."""
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def measure_sizes(model: nn.Module, unit_map: UnitMap, inputs: Mapping[str, Any]) -> Sizes:
    """Count by running ``model(**inputs)`` once, without gradients, on any device ("meta" too).

    Attention is counted as computed in full, under a causal mask as well: per token ``2 * s * d`` for scores and sums.
    """
    parameters = list(model.parameters())
    with _frozen(parameters), FlopCounterMode(display=False, custom_mapping=_MORE) as counter, torch.no_grad():
        model(**inputs)
    root = type(model).__name__
    by_module = {name: sum(count.values()) for name, count in counter.get_flop_counts().items()}
    # The output projection may lie outside of the module that names the site.
    inside: set[str] = set()
    for site in unit_map.attention:
        inside.update(name for name in (site.name, site.out_proj, *site.projections) if f"{root}.{name}" in by_module)
    outermost = [name for name in inside if not any(name.startswith(f"{other}.") for other in inside)]
    return Sizes(
        parameters=sum(p.numel() for p in parameters),
        bytes=sum(map(stored_bytes, parameters)),
        macs=counter.get_total_flops() // 2,
        attention_macs=sum(by_module[f"{root}.{name}"] for name in outermost) // 2,
    )


def mac_bound(dense: Sizes, compact: Sizes) -> float:
    """How many times as fast the compact model can be at most, if time goes with MACs."""
    return dense.macs / compact.macs
