"""Tensors of which each rank holds some rows: DTensors, as FSDP2 makes them."""

from __future__ import annotations

from typing import Any, Iterator, Mapping

import torch

from ...errors import HeadPruningError


def is_shard(tensor: Any) -> bool:
    """Whether a rank holds but a part of the tensor."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Any) -> torch.Tensor:
    """This rank's rows, the memory itself; a tensor that is not sharded as it is."""
    return tensor.detach().to_local() if is_shard(tensor) else tensor


class Ranks:
    """The ranks that hold the rows of some tensors; of tensors that are not sharded this one alone.

    All of them must call the same methods in the same order, but for :meth:`first` and :meth:`part`.

    Args:
        tensors: by name; all of them or none are sharded, along their first dimensions.

    Raises:
        HeadPruningError: they are sharded otherwise.
    """

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self.several = any(map(is_shard, tensors.values()))
        self._mesh: Any = None
        self._dim = 0
        for name, tensor in tensors.items() if self.several else ():
            dims = [dim for dim, place in enumerate(getattr(tensor, "placements", ())) if place.is_shard()]
            if len(dims) != 1 or tensor.placements[dims[0]].dim or self._mesh not in (None, tensor.device_mesh):
                raise HeadPruningError(
                    f"{name} is not sharded along its rows over the ranks that hold the other pruned weights; shard "
                    "the model by FSDP2 alone and as a whole, or leave it out (--weights-exclude)."
                )
            self._mesh, self._dim = tensor.device_mesh, dims[0]

    def first(self, tensor: torch.Tensor) -> int:
        """The first row of a tensor that this rank holds."""
        if not self.several:
            return 0
        rows, ranks = tensor.shape[0], self._mesh.size(self._dim)
        return min(rows, self._mesh.get_local_rank(self._dim) * -(-rows // ranks))

    def part(self, full: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """This rank's rows of a whole tensor of the shape of ``like``."""
        return full.narrow(0, self.first(like), local(like).shape[0]) if self.several else full

    def whole(self, rows: torch.Tensor, like: Any) -> torch.Tensor:
        """The whole tensor of the shape of ``like``, of which each rank gives its rows."""
        if not self.several:
            return rows
        from torch.distributed.tensor import DTensor

        shape, stride = like.shape, torch.empty(like.shape, device="meta").stride()
        bits = rows.contiguous().view(torch.uint8) if rows.dtype == torch.bool else rows.contiguous()
        shards = DTensor.from_local(bits, self._mesh, like.placements, run_check=False, shape=shape, stride=stride)
        return shards.full_tensor().view(rows.dtype)

    def sum(self, counts: torch.Tensor) -> torch.Tensor:
        """Counts summed over the ranks, in place; no rank waits for its device."""
        if self.several:
            torch.distributed.all_reduce(counts, group=self._mesh.get_group(self._dim))
        return counts

    @property
    def writes(self) -> bool:
        """Whether this is the rank that writes for all of them."""
        return not self.several or torch.distributed.get_rank() == 0


class Wholes(Mapping[str, "torch.Tensor"]):
    """Tensors by name, each gathered on the CPU when it is asked for, by all ranks in the same order."""

    def __init__(self, ranks: Ranks, tensors: Mapping[str, torch.Tensor]) -> None:
        self._ranks, self._tensors = ranks, tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        return self._ranks.whole(local(tensor), tensor).cpu() if self._ranks.several else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
