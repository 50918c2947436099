"""Opening a pruning session on a transformers model."""

from typing import Any, Optional, Sequence

from torch import nn

from head_pruning import Pruner, PruningSession, UnitMap

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
    """Map a transformers model and put gates on it; freeze it when only the gates are to be trained.

    Args:
        model: any model that :func:`hf_plugin.unit_map` can map; PEFT models after ``get_peft_model``.
        pruners: the methods, such as ``[hf_plugin.pruner("dsp", num_of_heads=12, joint_pruning=True)]``.
        unit_map: the sites; default: found by :func:`hf_plugin.unit_map`.
        seed: of every draw.
        **options: further arguments of :class:`head_pruning.PruningSession`.

    Returns:
        The attached session; its ``detach()`` leaves the model as it was.

    Raises:
        HeadPruningError: the model cannot be mapped, or the options do not fit it.
    """
    drops_layers = any(
        getattr(model.config, name, 0) or 0 for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
    )
    options.setdefault("fired_within", _LAYERDROP_UPDATES if drops_layers else 1)
    session = PruningSession(model, unit_map or map_units(model), pruners, seed=seed, **options).attach()
    if session.freezes_model:
        session.freeze()  # HeadPruningCallback never steps what is left
    return session
