"""Opening a pruning session on a transformers model."""

import functools
from typing import Any, Mapping, Optional, Sequence

from torch import nn

from head_pruning import HeadPruningError, Pruner, PruningSession, UnitMap
from head_pruning.outputs import ATTENTIONS, EAGER_ATTENTION
from head_pruning.session import LAYERDROP_UPDATES, check_pruners, needs_of

from ..heads.masking import masked_heads
from ..mapping.module_tree import check_model
from ..mapping.unit_map import unit_map as map_units
from ..saving.card import is_adapted
from ..saving.notices import watch_session
from .attention import ask_for_probabilities, switch_to_eager
from .teachers import load_teacher

_LAYERDROP = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


def open_session(
    model: nn.Module,
    pruners: Sequence[Pruner],
    *,
    unit_map: Optional[UnitMap] = None,
    seed: int = 42,
    teacher_options: Optional[Mapping[str, Any]] = None,
    starts_trained: bool = True,
    **options: Any,
) -> PruningSession:
    """Map a transformers model and put gates and masks on it; freeze it when only the gates are to be trained.

    Where a pruner looks at attention probabilities, the model computes its attention eagerly until ``detach()``.

    Args:
        model: any model that :func:`hf_plugin.unit_map` can map, also in a module of one's own; PEFT models after
            ``get_peft_model``.
        pruners: the methods, such as ``[hf_plugin.pruner("dsp", num_of_heads=12, joint_pruning=True)]``.
        unit_map: the sites; default: found by :func:`hf_plugin.unit_map`. Pruners of weights that are all named by
            ``weights_include`` need none.
        seed: of every draw.
        teacher_options: for ``from_pretrained`` of the model that ``teacher_path`` names, such as ``cache_dir``.
        starts_trained: False for a model that has learnt nothing yet (made by ``from_config``, say): head_sensitivity
            and subset then choose heads early and spread them, unless their options say otherwise. Nothing in a model
            tells: one that was made and then trained in the same process looks like one that was only made.
        **options: further arguments of :class:`head_pruning.PruningSession`.

    Returns:
        The attached session; its ``detach()`` leaves the model as it was.

    Raises:
        HeadPruningError: the model cannot be mapped, its heads are masked or gated already, or the options do not fit
            it or each other; the model is left as it was.
    """
    check_model(model)
    pruners = check_pruners(pruners)
    options.setdefault("fired_within", LAYERDROP_UPDATES if _drops_layers(model) else 1)
    gated = any(pruner.needs_gates for pruner in pruners)
    needs = needs_of(pruners)
    if unit_map is None and (gated or needs or any(pruner.needs_unit_map for pruner in pruners)):
        unit_map = map_units(model)
    if is_adapted(model) and any(pruner.kind == "quantizes" for pruner in pruners):
        raise HeadPruningError(
            "A model with adapters is not quantized in training, as its adapters alone are saved; merge them first "
            "(hf_plugin.merge_pruned, which keeps zeros) and train the merged model."
        )
    if gated and masked_heads(model) is not None:
        raise HeadPruningError(
            "Heads of the model are masked by mask_heads; call restore_heads(model) before a session is opened on it, "
            "or remove them with prune_heads."
        )
    options.setdefault("load_teacher", functools.partial(load_teacher, model, **(teacher_options or {})))
    session = PruningSession(model, unit_map, pruners, seed=seed, starts_trained=starts_trained, **options)
    # Before pruners are attached, so that copies of the model compute their attention so too.
    if needs & {ATTENTIONS, EAGER_ATTENTION}:
        session.on_detach(switch_to_eager(model))
        if ATTENTIONS in needs and unit_map is not None:
            session.on_detach(ask_for_probabilities(model, unit_map))
    try:
        session.attach()
        if session.freezes_model:
            session.freeze()  # neither HeadPruningCallback nor before_step() lets what is left be stepped
        watch_session(model, session)
    except BaseException:
        session.detach()
        raise
    return session


def _drops_layers(model: nn.Module) -> bool:
    """Whether a part of the model skips layers at random; parts without a config of transformers do not tell."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    return any(getattr(config, name, 0) or 0 for config in configs for name in _LAYERDROP)
