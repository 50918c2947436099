"""Adapters of PEFT and pruned heads: loading both, and merging so that the merged model is pruned too."""

import logging
from pathlib import Path
from typing import Any, Iterator, Optional, Union

import torch
from torch import nn
from transformers import PreTrainedModel

from head_pruning import HeadMask, HeadPruningError
from head_pruning.errors import one_line
from head_pruning.files import MASKS_FILE, read_json
from head_pruning.gates.engine.bank import refuse_gates
from head_pruning.hosts import holds_heads
from head_pruning.surgery.remaining import recipe_of

from ..heads.masking import mask_heads, masked_heads, restore_heads
from ..heads.pruning import prune_heads
from ..mapping.unit_map import unit_map
from .folders import save_compact

logger = logging.getLogger(__name__)

_ADAPTER = "adapter_config.json"
_UNGATE = "keep its mask (mask = session.harden()), detach() the session that is open on the model, and pass mask=mask"


def load_pruned_peft(
    folder: "str | Path", model: Optional[PreTrainedModel] = None, *, is_trainable: bool = False, **options: Any
) -> Any:
    """Load an adapter and the heads that were pruned with it: what a pruned PEFT model was when it was saved.

    An adapter leaves the base model's weights alone, so nothing in it tells which heads were removed; the
    ``masks.safetensors`` beside it does. The heads are masked by :func:`hf_plugin.mask_heads`.

    Args:
        folder: what :func:`hf_plugin.save_pruned`, or ``save_model`` of a pruning Trainer, wrote of a PEFT model.
        model: the base model; default: the one that the adapter names, loaded by the class that it names.
        is_trainable: whether the adapter is to be trained on; else it is frozen.
        **options: for the base model's ``from_pretrained``, such as ``num_labels``; with ``model``, for PEFT's.

    Returns:
        The ``PeftModel``, in evaluation mode.

    Raises:
        HeadPruningError: the folder holds no adapter or no masks, or the masks are of another model.
    """
    from peft import PeftModel

    folder = Path(folder)
    if not (folder / _ADAPTER).is_file():
        raise HeadPruningError(f"{folder} holds no adapter ({_ADAPTER}); load it with from_pretrained.")
    read_json(folder / _ADAPTER, dict, cure="copy the adapter again")
    if not (folder / MASKS_FILE).is_file():
        raise HeadPruningError(
            f"{folder} holds an adapter but no {MASKS_FILE}, so no heads were pruned with it; load it with "
            "PeftModel.from_pretrained."
        )
    mask = HeadMask.load(folder / MASKS_FILE) if holds_heads(folder / MASKS_FILE) else None
    try:
        if model is None:
            adapted = _auto_class(folder).from_pretrained(str(folder), is_trainable=is_trainable, **options)
        else:
            adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable, **options)
    except HeadPruningError:
        raise
    except Exception as error:  # PEFT, transformers and torch each have errors of their own
        raise HeadPruningError(
            f"The adapter in {folder} cannot be loaded ({one_line(error):.300}); copy it again, or give the model "
            "that it was made for."
        ) from error
    adapted.eval()
    if mask is not None:
        sites = unit_map(adapted)
        mask_heads(adapted, mask.fitted(sites), unit_map=sites)
    return adapted


def _auto_class(folder: Path) -> Any:
    """PEFT's class that loads the base model, too."""
    import peft
    from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

    config = peft.PeftConfig.from_pretrained(str(folder))
    if not config.base_model_name_or_path or not (config.task_type or config.auto_mapping):
        raise HeadPruningError(
            f"The adapter in {folder} does not name its base model; load that, and pass it: load_pruned_peft(folder, "
            "model)."
        )
    wanted = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type)
    autos = (auto for name, auto in vars(peft).items() if name.startswith("AutoPeftModel"))
    return next((auto for auto in autos if wanted and auto._target_peft_class is wanted), peft.AutoPeftModel)


def merge_pruned(model: Any, *, keep_zeros: bool = True, mask: Optional[HeadMask] = None) -> nn.Module:
    """Merge the adapters of a PEFT model into its base model, which stays pruned: PEFT's ``merge_and_unload`` forgets.

    Like it, this changes the model in place and returns the base model.

    Args:
        model: a PEFT model whose adapters can be merged (LoRA and its kin).
        keep_zeros: the base model's weights that were zero are zero again once the adapters are added. A sparse model
            stays as sparse as it was; its outputs are not those of the model before, whose adapters reached these
            weights too.
        mask: the heads that stay; default: what :func:`hf_plugin.mask_heads` left of them. They are masked in the
            merged model.

    Raises:
        HeadPruningError: the model has no adapters that can be merged, its heads are gated by a session, or the mask
            is of another model; the model is unchanged then.
    """
    mask = _mask_before_merging(model, mask)
    zeros = list(_base_zeros(model)) if keep_zeros else []
    restore_heads(model)
    merged = model.merge_and_unload()
    with torch.no_grad():
        for weight, found in zeros:
            weight.masked_fill_(found, 0)
    if zeros:
        logger.info("%d zeros of %d tensors were kept in the merge", sum(int(z.sum()) for _, z in zeros), len(zeros))
    if mask is not None and not mask.keep.all():
        sites = unit_map(merged)
        mask_heads(merged, mask.fitted(sites), unit_map=sites)
    return merged


def merge_and_cut(
    model: Any,
    folder: "Optional[Union[str, Path]]" = None,
    *,
    mask: Optional[HeadMask] = None,
    keep_zeros: bool = True,
    **report: Any,
) -> nn.Module:
    """Merge the adapters of a pruned PEFT model, cut its removed heads out, and save what is left.

        merge_and_cut(load_pruned_peft("adapter"), "compact")
        AutoModelForSequenceClassification.from_pretrained("compact")

    Args:
        model: as for :func:`merge_pruned`; changed in place.
        folder: where the compact model is written, as by :func:`hf_plugin.save_compact`; default: nowhere.
        mask: the heads that stay; default: what :func:`hf_plugin.mask_heads` left of them.
        keep_zeros: see :func:`merge_pruned`.
        **report: further arguments of :func:`hf_plugin.save_compact`, such as ``processing_class``.

    Returns:
        The compact model of transformers.

    Raises:
        HeadPruningError: as :func:`merge_pruned`, or no heads are to be removed (the model is unchanged then), or a
            site cannot be cut exactly (the model is merged then, and its heads are masked).
    """
    mask = _mask_before_merging(model, mask)
    if mask is None or mask.keep.all():
        raise HeadPruningError(
            "The model keeps all heads, so nothing can be cut out; pass mask=, or merge it with merge_pruned alone."
        )
    merged = merge_pruned(model, keep_zeros=keep_zeros, mask=mask)
    sites = unit_map(merged)
    mask = mask.fitted(sites)
    restore_heads(merged)
    try:
        # A compact model knows the original's sites itself; these are what it has left of them.
        prune_heads(merged, mask, unit_map=sites if recipe_of(merged) is None else None)
    except BaseException:
        mask_heads(merged, mask, unit_map=sites)
        raise
    if folder is not None:
        save_compact(merged, folder, **report)
    return merged


def _mask_before_merging(model: Any, mask: Optional[HeadMask]) -> Optional[HeadMask]:
    """The heads that stay, by the names of the adapted model; None when all do. Raises if it cannot be merged."""
    if not callable(getattr(model, "merge_and_unload", None)) or not hasattr(model, "peft_config"):
        raise HeadPruningError(
            f"{type(model).__name__} has no adapters that can be merged; give a PEFT model with LoRA or its kin "
            "(PeftModel.from_pretrained, load_pruned_peft)."
        )
    sites = unit_map(model)
    own = masked_heads(model)
    if own is None:
        refuse_gates(model, sites, _UNGATE)
    if mask is None:
        return own
    mask = mask.fitted(sites)
    return mask if own is None else HeadMask(sites, mask.keep & own.keep)


def _base_zeros(model: nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The weights under adapters that have zeros, and where these are."""
    for module in model.modules():
        base_layer: Any = getattr(module, "get_base_layer", None)
        weight = None if base_layer is None else getattr(base_layer(), "weight", None)
        if isinstance(weight, torch.Tensor) and weight.is_floating_point():
            zeros = weight.detach() == 0
            if zeros.any():
                yield weight, zeros
