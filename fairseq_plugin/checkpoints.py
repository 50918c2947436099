"""Checkpoint files: safe loading, and what is saved beside them."""

import argparse
import collections
import functools
import json
import logging
import math
import os
import sys
import weakref
from pathlib import Path
from typing import Any, Callable, Optional

import fairseq
import numpy as np
import omegaconf
import torch
from fairseq import checkpoint_utils
from fairseq.distributed import utils as distributed_utils

from head_pruning import PruningSession
from head_pruning.artifacts import REPORT_FILE
from head_pruning.report.artifacts import write_artifacts
from head_pruning.report.tables import head_table

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
            logger.info("not a candidate for checkpoint_best: the gates have not reached their target yet")
            val_loss = None
        saved = original(cfg, trainer, epoch_itr, val_loss)
        if session is not None and not cfg.no_save and trainer.data_parallel_rank == 0:
            last = trainer.get_num_updates() >= (session.total_steps or math.inf)
            write_beside(cfg.save_dir, trainer, log_heads=last or epoch_itr.end_of_epoch())
        return saved

    save_checkpoint.knows_head_pruning = True
    checkpoint_utils.save_checkpoint = save_checkpoint


def watch_target(session: PruningSession) -> None:
    """Let ``--patience`` count validations only once ``session``, from now on the current one, is at its target."""
    global _current
    _current = weakref.ref(session)
    for name in ("fairseq_cli.train", "__main__"):  # whichever fairseq-train was started as
        module = sys.modules.get(name)
        original = getattr(module, "should_stop_early", None)
        if original is None or getattr(original, "knows_head_pruning", False):
            continue

        def should_stop_early(cfg, valid_loss, original=original):
            session = _current()
            return (session is None or session.at_target()) and original(cfg, valid_loss)

        should_stop_early.knows_head_pruning = True
        module.should_stop_early = should_stop_early


def write_beside(save_dir: str, trainer, log_heads: bool) -> None:
    """Write pruning.json and masks.safetensors into ``save_dir``; with ``log_heads`` log the kept heads by site."""
    session = trainer.task.session
    mask = session.head_mask()
    if mask is None:
        return
    numbers = {name: value if math.isfinite(value) else None for name, value in session.metrics().items()}
    entry = {"updates": trainer.get_num_updates(), "at_target": session.at_target(), **numbers}
    write_artifacts(
        Path(save_dir),
        mask,
        method="+".join(pruner.name for pruner in session.pruners),
        options={name: value for pruner in session.pruners for name, value in vars(pruner.config).items()},
        history=[*_history(Path(save_dir), entry["updates"]), entry],
        versions={"fairseq": fairseq.__version__},
        parameters=mask_parameters(trainer.get_model(), mask),
    )
    if log_heads:
        logger.info("kept heads by site:%s%s", os.linesep, head_table(mask))


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
