"""Models that FSDP2 shards over the processes: what is refused, and the whole model where one is needed."""

import contextlib
from typing import Any, Iterator, Optional, cast

from torch import nn

from head_pruning import HeadPruningError, PruningSession


def refuse_deepspeed(deepspeed: Any) -> None:
    """Raise HeadPruningError if weights are to be pruned under DeepSpeed.

    Args:
        deepspeed: whether it is on, as a flag's value: also a word or a dict.
    """
    if deepspeed and str(deepspeed).lower() != "false":
        raise HeadPruningError(
            "Weights are not pruned under DeepSpeed, which splits them over processes; use FSDP2 (--fsdp) or plain "
            "data parallelism (DDP), or prune heads only."
        )


def refuse_sharding(trainer: Any, session: PruningSession) -> None:
    """Raise HeadPruningError if a Trainer shards what the session's pruners need whole."""
    if session.of_kind("weights"):
        refuse_deepspeed(getattr(trainer, "is_deepspeed_enabled", False))
    if not getattr(trainer, "is_fsdp_enabled", False):
        if trainer.args.fsdp:
            raise HeadPruningError(
                "--fsdp does not shard the model here: accelerate does so on GPUs and the like alone, trains on CPUs "
                "as if it were not there, and XLA has its own; drop --fsdp."
            )
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2 or "FULL" not in str(plugin.state_dict_type):
        raise HeadPruningError(
            "Models are pruned under FSDP2 alone, and with whole state dicts; leave version and state_dict_type out "
            "of --fsdp_config, or use plain data parallelism (DDP)."
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
def whole(model: nn.Module, session: Optional[PruningSession] = None) -> Iterator[bool]:
    """Inside the block a sharded model is whole, on the CPU of the main process: to be saved or counted, not to run.

    Every process must enter it. What is written to the weights is lost with the block.

    Args:
        model: any model; one that is not sharded is left as it is.
        session: its session, if it has one, whose masks are gathered too.

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
        with contextlib.nullcontext() if session is None else session.gathered():
            yield main
    finally:
        for module, sharded in classes:
            module.__class__ = sharded
        for module, name, shard in shards:
            module._parameters[name] = shard
