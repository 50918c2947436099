"""Smaller models that a run leaves on its way: scored, cut, saved, each in a folder of its own."""

import logging
from pathlib import Path
from typing import Any, Callable, Optional

import fairseq

from head_pruning import HeadPruningError
from head_pruning.files import SIZES_FOLDER, read_json, temporary_folder, write_json
from head_pruning.pruner import options_of
from head_pruning.report.artifacts import write_artifacts
from head_pruning.report.report_file import counts_told
from head_pruning.report.runs import RESULTS_FILE

from .checkpoints.reports import dense_and_left
from .exporting.checkpoints import export_counted

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint_last.pt"


def watch_sizes(trainer: Any, epoch_itr: Any, validate: Callable[[], Any]) -> None:
    """Tell a trainer, which is about to train, how its model is scored, and where it is in its data.

    Raises:
        HeadPruningError: the run saves sizes and nothing is to be saved.
    """
    if trainer.task.session.overrides("size_before") and trainer.cfg.checkpoint.no_save:
        raise HeadPruningError("--save-at saves models and --no-save saves none; drop one of them.")
    trainer.head_pruning_loop = (epoch_itr, validate)


def save_last_size(trainer: Any) -> None:
    """Training is over: save what :func:`save_size` would have saved next, and the model of the run itself."""
    session, updates = trainer.task.session, trainer.get_num_updates()
    save_size(trainer, updates)
    name = session.size_before(None)
    made = name and Path(trainer.cfg.checkpoint.save_dir) / SIZES_FOLDER / name / RESULTS_FILE
    known = read_json(made, {str: object}, cure="delete it") if made and made.is_file() else {}
    if known.get("updates") != updates:  # a finished run that is started again is left as it is
        save_size(trainer, None)


def save_size(trainer: Any, step: Optional[int]) -> None:
    """If a smaller model is finished with ``step`` updates: validate it, and save it without the heads that it lacks.

    ``checkpoint_last.pt`` in its folder is a compact checkpoint, and ``all_results.json`` has the score that
    ``--best-checkpoint-metric`` names; it comes last. All ranks call this.
    """
    session = trainer.task.session
    name = session.size_before(step)
    if name is None or getattr(trainer, "head_pruning_size", None) == name:  # an update that is tried again
        return
    trainer.head_pruning_size = name
    mask, checkpoint = session.head_mask(), trainer.cfg.checkpoint
    folder = Path(checkpoint.save_dir) / SIZES_FOLDER / name
    epoch_itr, validate = getattr(trainer, "head_pruning_loop", (None, None))
    score = None if validate is None or trainer.cfg.dataset.disable_validation else validate()
    extra = {"val_loss": score, **({} if epoch_itr is None else {"train_iterator": epoch_itr.state_dict()})}
    trainer.consolidate_optimizer()
    with temporary_folder(folder.parent) as temporary:
        if trainer.should_save_checkpoint_on_current_rank:
            trainer.save_checkpoint(str(temporary / CHECKPOINT), extra)
        if trainer.data_parallel_rank != 0:
            return
        _, left = export_counted(temporary / CHECKPOINT, folder / CHECKPOINT)
    write_artifacts(
        folder,
        mask,
        method="+".join(pruner.name for pruner in session.pruners),
        options=options_of(session.pruners),
        versions={"fairseq": fairseq.__version__},
        parameters=dense_and_left(trainer.get_model(), mask),
        compact_parameters=left,
    )
    scores = {} if score is None else {checkpoint.best_checkpoint_metric: score}
    write_json(folder / RESULTS_FILE, {**scores, **counts_told(mask), "updates": trainer.get_num_updates()})
    logger.info("%s: the compact model, as trained so far, is in %s", mask.words, folder)
