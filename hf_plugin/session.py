"""Opening a pruning session on a transformers model."""

from typing import Any, Optional, Sequence

from torch import nn

from head_pruning import HeadPruningError, Pruner, PruningSession, UnitMap

from .unit_map import unit_map as map_units

# Models that skip whole layers at random need some updates until every site has run.
_LAYERDROP_UPDATES = 100


def open_session(
    model: nn.Module,
    pruners: Sequence[Pruner],
    *,
    unit_map: Optional[UnitMap] = None,
    seed: int = 42,
    **options: Any,
) -> PruningSession:
    """Map a transformers model and put gates and masks on it; freeze it when only the gates are to be trained.

    Args:
        model: any model that :func:`hf_plugin.unit_map` can map; PEFT models after ``get_peft_model``.
        pruners: the methods, such as ``[hf_plugin.pruner("dsp", num_of_heads=12, joint_pruning=True)]``.
        unit_map: the sites; default: found by :func:`hf_plugin.unit_map`. Pruners of weights that are all named by
            ``weights_include`` need none.
        seed: of every draw.
        **options: further arguments of :class:`head_pruning.PruningSession`.

    Returns:
        The attached session; its ``detach()`` leaves the model as it was.

    Raises:
        HeadPruningError: the model cannot be mapped, or the options do not fit it or each other.
    """
    drops_layers = any(
        getattr(model.config, name, 0) or 0 for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
    )
    options.setdefault("fired_within", _LAYERDROP_UPDATES if drops_layers else 1)
    if unit_map is None and any(p.needs_gates or not getattr(p.config, "weights_include", None) for p in pruners):
        unit_map = map_units(model)
    session = PruningSession(model, unit_map, pruners, seed=seed, **options).attach()
    if session.freezes_model:
        if not all(pruner.needs_gates for pruner in pruners):
            session.detach()
            raise HeadPruningError(
                "Pipelined pruning of heads leaves the model's weights as they are, so they cannot be pruned in the "
                "same run; train jointly (joint_pruning), or prune the weights in a run of their own."
            )
        session.freeze()  # HeadPruningCallback never steps what is left
    return session
