"""Checkpoint files: safe loading, and what is saved beside them."""

import argparse
import collections
import contextlib
import functools
import json
import logging
import math
import os
import sys
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Optional

import fairseq
import numpy as np
import omegaconf
import torch
from fairseq import checkpoint_utils
from fairseq.distributed import utils as distributed_utils

from head_pruning import PruningSession
from head_pruning.files import REPORT_FILE
from head_pruning.pruner import options_of
from head_pruning.report.artifacts import write_artifacts
from head_pruning.report.tables import head_table
from head_pruning.report.weights import density_table, write_weight_artifacts

from .export import zero_heads
from .weights import finish, weight_masks, weight_pruners

logger = logging.getLogger(__name__)
_current: Callable[[], Optional[PruningSession]] = lambda: None  # noqa: E731  (a weak reference once there is one)


def allow_safe_globals() -> None:
    """Let torch's weights-only loading read what fairseq puts into checkpoints: a Namespace and numpy numbers."""
    torch.serialization.add_safe_globals(
        [
            argparse.Namespace,
            np.dtype,
            np.ndarray,
            (np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
            (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
            np._core.multiarray._reconstruct,
            np._core.multiarray.scalar,
            *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "u1", "?")),
        ]
    )


def allow_broadcasts() -> None:
    """Let ranks read what rank 0 sends them (a checkpoint with its omegaconf configuration); files may not hold it."""
    original = distributed_utils._broadcast_object_slow
    if getattr(original, "reads_configurations", False):
        return
    between_ranks = [
        *(Any, bool, dict, float, int, list, str, collections.defaultdict),
        *(omegaconf.DictConfig, omegaconf.ListConfig, omegaconf.nodes.AnyNode),
        *(omegaconf.base.ContainerMetadata, omegaconf.base.Metadata),
        distributed_utils._TensorPlaceholder,
    ]

    @functools.wraps(original)
    def broadcast_object_slow(*args, **kwargs):
        with torch.serialization.safe_globals(between_ranks):
            return original(*args, **kwargs)

    broadcast_object_slow.reads_configurations = True
    distributed_utils._broadcast_object_slow = broadcast_object_slow


def install() -> None:
    """Wrap fairseq's saving: no best checkpoint before the target, and the mask beside every checkpoint."""
    original = checkpoint_utils.save_checkpoint
    if getattr(original, "knows_head_pruning", False):
        return

    @functools.wraps(original)
    def save_checkpoint(cfg, trainer, epoch_itr, val_loss):
        session = getattr(trainer.task, "session", None)
        if session is not None and val_loss is not None and not session.at_target():
            logger.info("not a candidate for checkpoint_best: pruning has not reached its target yet")
            val_loss = None
        if session is not None and trainer.get_num_updates() >= (session.total_steps or math.inf):
            finish(session)
        saved = original(cfg, trainer, epoch_itr, val_loss)
        if session is not None and not cfg.no_save and trainer.data_parallel_rank == 0:
            last = trainer.get_num_updates() >= (session.total_steps or math.inf)
            write_beside(cfg.save_dir, trainer, log_heads=last or epoch_itr.end_of_epoch())
        return saved

    save_checkpoint.knows_head_pruning = True
    checkpoint_utils.save_checkpoint = save_checkpoint


def watch_training(session: PruningSession) -> None:
    """Let fairseq-train validate ``session``, from now on the current one, masked.

    ``--patience`` counts validations only once it is at its target.
    """
    global _current
    _current = weakref.ref(session)
    for name in ("fairseq_cli.train", "__main__"):  # whichever fairseq-train was started as
        module = sys.modules.get(name)
        if hasattr(module, "should_stop_early") and not hasattr(module.validate, "knows_head_pruning"):
            _watch(module)


def _watch(module: ModuleType) -> None:
    stop, validate = module.should_stop_early, module.validate

    @functools.wraps(stop)
    def should_stop_early(cfg, valid_loss):
        session = _current()
        return (session is None or session.at_target()) and stop(cfg, valid_loss)

    @functools.wraps(validate)
    def masked_validate(cfg, trainer, task, *args, **kwargs):
        # Here, not batch by batch: masking and taking back is work for every weight.
        with getattr(task, "evaluating", contextlib.nullcontext)():
            return validate(cfg, trainer, task, *args, **kwargs)

    masked_validate.knows_head_pruning = True
    module.should_stop_early, module.validate = should_stop_early, masked_validate


def write_beside(save_dir: str, trainer, log_heads: bool) -> None:
    """Write pruning.json and masks.safetensors into ``save_dir``, with weight masks also their table and picture.

    With ``log_heads`` also log the kept heads by site, and the kept weights by tensor.
    """
    session, folder = trainer.task.session, Path(save_dir)
    mask, masks = session.head_mask(), weight_masks(session)
    if mask is None and not masks:
        return
    numbers = {name: value if math.isfinite(value) else None for name, value in session.metrics().items()}
    entry = {"updates": trainer.get_num_updates(), "at_target": session.at_target(), **numbers}
    history, versions = [*_history(folder, entry["updates"]), entry], {"fairseq": fairseq.__version__}
    if mask is not None:
        write_artifacts(
            folder,
            mask,
            method="+".join(pruner.name for pruner in session.pruners),
            options=options_of(session.pruners),
            history=history,
            versions=versions,
            parameters=mask_parameters(trainer.get_model(), mask),
        )
    if masks:
        _write_weights(folder, trainer.get_model(), session, masks, history, versions)
    if log_heads and mask is not None:
        logger.info("kept heads by site:%s%s", os.linesep, head_table(mask))
    if log_heads and masks:
        logger.info("kept weights by tensor:%s%s", os.linesep, density_table(masks))


def _write_weights(
    folder: Path, model: torch.nn.Module, session: PruningSession, masks: dict, history: list, versions: dict
) -> None:
    """Add the weight masks to the files in ``folder``; the numbers are of the model masked, without removed heads."""
    pruners, mask = weight_pruners(session), session.head_mask()
    with session.evaluating():
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        if mask is not None:
            parameters = {name: parameter.clone() for name, parameter in parameters.items()}
            zero_heads(parameters, mask)
        write_weight_artifacts(
            folder,
            masks,
            parameters,
            method="+".join(pruner.name for pruner in pruners),
            options=options_of(pruners),
            head_mask=mask,
            history=history,
            versions=versions,
        )


def _history(save_dir: Path, updates: int) -> list[dict]:
    """The entries that earlier saves left, up to the one that training went on from."""
    try:
        entries = json.loads((save_dir / REPORT_FILE).read_text(encoding="utf-8"))["history"]
        return [entry for entry in entries if entry["updates"] < updates]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def mask_parameters(model: torch.nn.Module, mask) -> tuple[int, int]:
    """Parameters of the model, and how many remain when the removed heads' q, k, v rows and output columns go."""
    modules = dict(model.named_modules())
    removed = 0
    for site, where in mask.unit_map.slices():
        gone = int((~mask.keep[where]).sum()) * site.head_dim
        removed += gone * modules[site.out_proj].weight.shape[0]
        for name in site.projections:
            removed += gone * (modules[name].weight.shape[1] + (modules[name].bias is not None))
    total = sum(parameter.numel() for parameter in model.parameters())
    return total, total - removed
