"""Checkpoints of transformers 4 whose heads were removed by its ``prune_heads``."""

import copy
from pathlib import Path
from typing import Any, Optional

import torch
import transformers
from transformers import PreTrainedModel

from head_pruning import HeadPruningError
from head_pruning.compact.checks import MAX_HEADS
from head_pruning.compact.shapes import Whole, conform
from head_pruning.errors import one_line
from head_pruning.masks import mask_without
from head_pruning.surgery.removal import plan_recipe

from ..compact.quantizer import METHOD
from ..mapping.unit_map import unit_map


def load_pruned_v4(
    folder: "str | Path", model_class: Optional[type[PreTrainedModel]] = None, **options: Any
) -> PreTrainedModel:
    """Load a checkpoint whose config has ``pruned_heads`` and whose weights are already cut, as a compact model.

    Its ``save_pretrained``, or :func:`hf_plugin.save_compact`, then writes a folder that today's transformers loads.

    Args:
        folder: what ``save_pretrained`` of transformers 4 wrote, or its name on the hub.
        model_class: a class of transformers; default: the one that the config names.
        **options: for ``from_pretrained``.

    Raises:
        HeadPruningError: the config names no pruned heads, a class that transformers has no more, or layers and heads
            that the model does not have.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except Exception as error:  # each class fails in its own way with a damaged configuration
        raise HeadPruningError(
            f"The config of {folder} cannot be loaded ({one_line(error):.300}); give the folder or the hub name of a "
            "model."
        ) from error
    pruned = getattr(config, "pruned_heads", None)
    if not pruned:
        raise HeadPruningError(f"The config of {folder} names no pruned_heads; load it with from_pretrained.")
    del config.pruned_heads
    if model_class is None:
        name = str((config.architectures or ["no class"])[0])
        model_class = getattr(transformers, name, None)
        if model_class is None:
            raise HeadPruningError(f"The config of {folder} names {name}, not a class of transformers; give one.")
    with torch.device("meta"):
        twin = model_class(copy.deepcopy(config))
    sites = unit_map(twin)
    kinds = list(sites.kinds())
    if len(kinds) > 1:
        raise HeadPruningError(f"{folder} has {', '.join(kinds)} attention, of which transformers 4 pruned none.")
    try:
        removed = {
            sites.attention[int(layer)].name: heads
            for layer, heads in conform(pruned, {str: [Whole(0, MAX_HEADS)]}).items()
        }
    except (IndexError, TypeError, ValueError, AttributeError):
        raise HeadPruningError(
            f"The config of {folder} names pruned_heads {pruned!r:.200}, but the model has {len(sites.attention)} "
            "layers with attention; correct the config."
        ) from None
    recipe = plan_recipe(twin, sites, mask_without(sites, removed))
    config.quantization_config = {"quant_method": METHOD, "recipe": recipe}
    try:
        return model_class.from_pretrained(folder, config=config, **options)
    except HeadPruningError:
        raise
    except Exception as error:  # torch, safetensors and transformers each have errors of their own
        raise HeadPruningError(
            f"The weights in {folder} cannot be loaded without the pruned_heads that its config names "
            f"({one_line(error):.300}); take the config.json that was saved with them."
        ) from error
