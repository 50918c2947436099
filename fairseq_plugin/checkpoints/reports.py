"""The files beside a checkpoint: what is pruned, as masks, numbers, a table and a picture."""

import contextlib
import logging
import math
import os
from pathlib import Path
from typing import Optional

import fairseq
import torch

from head_pruning import HeadMask, PruningSession
from head_pruning.files import REPORT_FILE
from head_pruning.pruner import options_of
from head_pruning.report.artifacts import write_artifacts
from head_pruning.report.report_file import read_report
from head_pruning.report.tables import head_table
from head_pruning.report.weights import count_weights, density_table, session_counts, write_weight_artifacts
from head_pruning.surgery.zeros import removed_counts, zeroed_heads

logger = logging.getLogger(__name__)


def write_beside(save_dir: str, trainer, log_heads: bool, numbers: Optional[dict[str, float]] = None) -> None:
    """Write pruning.json and masks.safetensors into ``save_dir``, with weight masks also their table and picture.

    With ``log_heads`` also log the kept heads by site, and the kept weights by tensor. ``numbers`` are those of the
    session unless named: some are of the last update, which a session that was just loaded has not seen.
    """
    session, folder = trainer.task.session, Path(save_dir)
    mask, masks = session.head_mask(), session.weight_masks()
    if mask is None and not masks:
        return
    measured = session.metrics() if numbers is None else numbers
    finite = {name: value if math.isfinite(value) else None for name, value in measured.items()}
    entry = {"updates": trainer.get_num_updates(), "at_target": session.at_target(), **finite}
    history, versions = [*_history(folder, entry["updates"]), entry], {"fairseq": fairseq.__version__}
    if mask is not None:
        write_artifacts(
            folder,
            mask,
            method="+".join(pruner.name for pruner in session.pruners),
            options=options_of(session.pruners),
            history=history,
            versions=versions,
            parameters=dense_and_left(trainer.get_model(), mask),
        )
    if masks:
        _write_weights(folder, trainer.get_model(), session, masks, history, versions)
    if log_heads and mask is not None:
        logger.info("kept heads by site:%s%s", os.linesep, head_table(mask))
    if log_heads and masks:
        logger.info("kept weights by tensor:%s%s", os.linesep, density_table(masks, session_counts(session)))


def _write_weights(
    folder: Path, model: torch.nn.Module, session: PruningSession, masks: dict, history: list, versions: dict
) -> None:
    """Add the weight masks to the files in ``folder``; the numbers are of the model masked, without removed heads."""
    pruners, mask = session.of_kind("weights"), session.head_mask()
    with session.evaluating(), contextlib.nullcontext() if mask is None else zeroed_heads(model, mask):
        parameters = dict(model.named_parameters())
        removed = {} if mask is None else removed_counts(model, mask)
        write_weight_artifacts(
            folder,
            masks,
            parameters,
            counts=count_weights(masks, parameters, removed=removed),
            left_dense=session.left_dense(),
            method="+".join(pruner.name for pruner in pruners),
            options=options_of(pruners),
            head_mask=mask,
            history=history,
            versions=versions,
        )


def reported(save_dir: str, session: PruningSession, updates: int) -> bool:
    """Whether :func:`write_beside` has written all it has to say of the checkpoint of update ``updates``."""
    report = _report(Path(save_dir))
    whole = bool(session.weight_masks()) == ("weights" in report)
    return whole and any(entry["updates"] == updates for entry in report.get("history", []))


def _history(save_dir: Path, updates: int) -> list[dict]:
    """The entries that earlier saves left, up to the one that training went on from."""
    return [entry for entry in _report(save_dir).get("history", []) if entry["updates"] < updates]


def _report(save_dir: Path) -> dict:
    """What an earlier save left; empty where nothing is, or something else."""
    try:
        report = read_report(save_dir / REPORT_FILE)
        return report if all(isinstance(entry["updates"], int) for entry in report["history"]) else {}
    except (OSError, ValueError, KeyError):
        return {}


def dense_and_left(model: torch.nn.Module, mask: HeadMask) -> tuple[int, int]:
    """Parameters of the model, and how many are left when those of the removed heads are zero."""
    total = sum(parameter.numel() for parameter in model.parameters())
    return total, total - sum(removed_counts(model, mask).values())
