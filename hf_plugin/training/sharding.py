"""Models that FSDP2 shards over the processes: what is refused, and the whole model where one is needed."""

import contextlib
from typing import Any, Iterator, cast

from torch import nn

from head_pruning import HeadPruningError, PruningSession


def refuse_sharding(trainer: Any, session: PruningSession) -> None:
    """Raise HeadPruningError if a Trainer shards what the session's pruners need whole."""
    if not getattr(trainer, "is_fsdp_enabled", False):
        if trainer.args.fsdp and trainer.args.device.type == "cpu":
            raise HeadPruningError(
                "accelerate shards models on GPUs and the like alone, and trains on CPUs as if --fsdp were not there; "
                "drop --fsdp."
            )
        return
    if trainer.accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise HeadPruningError(
            "Models are pruned under FSDP2 alone; leave version out of --fsdp_config, or use plain data parallelism "
            "(DDP)."
        )
    quantizes = session.of_kind("quantizes")
    if quantizes:
        raise HeadPruningError(
            f"{quantizes[0].name} computes with whole matrices, which FSDP splits over processes; use plain data "
            "parallelism (DDP)."
        )


def shard_again(model: nn.Module) -> None:
    """Let go of the whole weights that FSDP keeps of some modules after a forward pass without a backward one."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            cast(Any, module).reshard()


def _shards_in(module: nn.Module) -> list[tuple[str, Any]]:
    return [(name, each) for name, each in module._parameters.items() if hasattr(each, "full_tensor")]


@contextlib.contextmanager
def whole(model: nn.Module) -> Iterator[bool]:
    """Inside the block a sharded model is whole, on the CPU of the main process: to be saved or counted, not to run.

    Every process must enter it. What is written to the weights is lost with the block.

    Args:
        model: any model; one that is not sharded is left as it is.

    Yields:
        Whether the model is whole in this process.
    """
    shard_again(model)
    shards = [(module, name, shard) for module in model.modules() for name, shard in _shards_in(module)]
    if not shards:
        yield True
        return
    from torch import distributed
    from torch.distributed.fsdp import FSDPModule

    main = distributed.get_rank() == 0
    classes = [(module, type(module)) for module in model.modules() if isinstance(module, FSDPModule)]
    known: dict[int, nn.Parameter] = {}  # tied ones stay tied
    try:
        for module, name, shard in shards:
            if id(shard) not in known:
                full = shard.detach().full_tensor()
                known[id(shard)] = nn.Parameter(full.cpu(), requires_grad=shard.requires_grad) if main else shard
            module._parameters[name] = known[id(shard)]
        if main:
            for module, sharded in classes:
                module.__class__ = sharded.__bases__[1]  # which FSDP derived its own from
        yield main
    finally:
        for module, sharded in classes:
            module.__class__ = sharded
        for module, name, shard in shards:
            module._parameters[name] = shard
