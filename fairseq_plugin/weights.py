"""Weight pruners in fairseq: where they are refused, and their state in a checkpoint."""

import logging
from typing import Any, Mapping, Optional

import torch

from head_pruning import HeadPruningError, PruningSession
from head_pruning.weights import WeightPruner, pack_mask, unpack_mask

logger = logging.getLogger(__name__)

#: In a checkpoint's ``extra_state``. Not in the model's: fairseq averages that, and loads it strictly.
KEY = "head_pruning"
_UNTESTED = ("fully_sharded", "slowmo", "slow_mo")


def weight_pruners(session: Optional[PruningSession]) -> list[WeightPruner]:
    """Those of the session's pruners that prune weights."""
    return [pruner for pruner in (session.pruners if session else ()) if isinstance(pruner, WeightPruner)]


def weight_masks(session: PruningSession) -> dict[str, torch.Tensor]:
    """Parameter name to ``bool`` mask (true: stays) on the CPU; empty before the first mask."""
    return {name: mask for pruner in weight_pruners(session) for name, mask in pruner.weight_masks().items()}


def refuse_hosts(options: Any) -> None:
    """Raise HeadPruningError where ranks do not hold the same whole weights and gradients at every update."""
    backend = str(getattr(options, "ddp_backend", ""))
    if backend in _UNTESTED or getattr(options, "use_bmuf", False):
        named = f"--ddp-backend {backend}" if backend in _UNTESTED else "--use-bmuf"
        raise HeadPruningError(
            f"Weights are not pruned with {named}, where ranks do not hold the same whole weights at every update; "
            "use --ddp-backend pytorch_ddp or legacy_ddp, or prune heads only."
        )


def own_state(session: PruningSession) -> dict[str, Any]:
    """What :meth:`PruningSession.state_dict` has of weight pruners."""
    prefixes = tuple(f"{pruner.name}." for pruner in weight_pruners(session))
    return {name: value for name, value in session.state_dict().items() if prefixes and name.startswith(prefixes)}


def stored_state(session: PruningSession, *, resumable: bool = True) -> dict[str, Any]:
    """What a checkpoint keeps of a session's weight pruners.

    Args:
        session: with weight pruners.
        resumable: whether training is to go on from it; else only the masks are kept, one bit per weight.
    """
    masks = weight_masks(session)
    state = {
        "pruners": [pruner.name for pruner in weight_pruners(session)],
        "shapes": {name: list(mask.shape) for name, mask in masks.items()},
        "masks": {name: pack_mask(mask) for name, mask in masks.items()},
    }
    if resumable:
        state["session"] = {name: torch.from_numpy(value.copy()) for name, value in own_state(session).items()}
        state["tensors"] = session.tensor_state()
    return state


def restore_state(
    session: Optional[PruningSession], stored: Mapping[str, Any], *, reset: bool, refuse: bool = False
) -> None:
    """Take what a checkpoint keeps of weight pruners.

    Args:
        session: that of this run; None for a run that does not prune.
        stored: of :func:`stored_state`.
        reset: whether this run starts anew from the checkpoint's model.
        refuse: whether a run without weight pruners must not go on.

    Raises:
        HeadPruningError: this run would go on with other pruners, or the state is damaged.
    """
    theirs, mine = stored["pruners"], [pruner.name for pruner in weight_pruners(session)]
    if (session is not None or refuse) and theirs != mine and not reset:
        raise HeadPruningError(
            f"The checkpoint's weights were pruned with {', '.join(theirs)}, this run uses "
            f"{', '.join(mine) or 'no weight pruner'}; resume with the same --weight-pruner, or add --reset-optimizer "
            "to start anew from its weights."
        )
    if not mine:
        logger.warning(
            "the checkpoint's weights were pruned with %s, and this run trains its zeros too; --weight-pruner lock "
            "keeps them",
            ", ".join(theirs),
        )
    elif reset or "tensors" not in stored:
        logger.info("the pruner of weights starts anew, from the weights of the checkpoint")
    else:
        values = {name: value.cpu().numpy() for name, value in stored["session"].items()}
        try:
            session.load_state_dict({**session.state_dict(), **values})
        except (KeyError, IndexError, ValueError) as error:
            raise HeadPruningError(
                f"The checkpoint's state of {', '.join(mine)} is damaged ({error!r}); use the checkpoint before it."
            ) from error
        session.load_tensor_state(stored["tensors"])


def stored_masks(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weight masks of a whole checkpoint, parameter name to ``bool``; empty when there are none."""
    stored = (state.get("extra_state") or {}).get(KEY) or {"masks": {}}
    return {name: unpack_mask(packed, stored["shapes"][name]) for name, packed in stored["masks"].items()}


def stored_method(state: Mapping[str, Any]) -> str:
    """The registered names of the weight pruners of a whole checkpoint, joined by ``+``; empty when there are none."""
    return "+".join(((state.get("extra_state") or {}).get(KEY) or {"pruners": []})["pruners"])


def zero_weights(weights: dict, masks: Mapping[str, torch.Tensor]) -> None:
    """Zero, in place, what the masks remove of a model state dict."""
    for name, mask in masks.items():
        weights[name].masked_fill_(~mask.to(weights[name].device), 0)


def finish(session: PruningSession) -> None:
    """Training is over: where the schedule is not, mask the model at the final density."""
    for pruner in weight_pruners(session):
        if not pruner.at_target():
            logger.warning(
                "training ended before the schedule of %s did: the model was never trained with exactly the weights "
                "that are kept",
                pruner.name,
            )
            pruner.harden()
