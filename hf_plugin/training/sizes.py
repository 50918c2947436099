"""Smaller models that a run leaves on its way: scored, cut, saved, each in a folder of its own."""

import contextlib
import logging
from pathlib import Path
from typing import Any, Callable

import torch
from transformers import PreTrainedModel

from head_pruning import HeadPruningError, PruningSession
from head_pruning.files import SIZES_FOLDER, temporary_folder, write_json
from head_pruning.report.report_file import counts_told
from head_pruning.report.runs import RESULTS_FILE

from ..host import export_compact
from ..saving.card import is_adapted

logger = logging.getLogger(__name__)


def check_sizes(session: PruningSession) -> None:
    """Raise HeadPruningError if heads cannot be cut out of models like the session's."""
    model, quantizers = session.model, [pruner.name for pruner in session.of_kind("quantizes")]
    if quantizers:
        raise HeadPruningError(
            f"The models of --save-at are cut out of the weights, which {quantizers[0]} stores as integers; quantize "
            "a compact model in a run of its own."
        )
    if is_adapted(model):
        raise HeadPruningError(
            "The models of --save-at are cut out of the weights, and PEFT's adapters are not a part of these; merge "
            "the adapter first, or leave --save-at out."
        )
    if not isinstance(model, PreTrainedModel):
        raise HeadPruningError(
            f"--save-at saves models of transformers, and {type(model).__name__} is none; call session.size_before() "
            "in a loop of your own."
        )


def save_size(trainer: Any, session: PruningSession, name: str, save_outcome: Callable[..., None]) -> None:
    """Score the model of a Trainer as it is in evaluation, and save it without the heads that it lacks.

    ``all_results.json`` comes last; what an earlier try left is written over.

    Args:
        trainer: what its ``score_size()`` gives are the scores; default: those of its validation set.
        session: on its model.
        name: of the folder in ``output_dir/sizes``.
        save_outcome: ``save_outcome(folder, None)`` writes the pruned model.
    """
    folder = Path(trainer.args.output_dir) / SIZES_FOLDER / name
    score = getattr(trainer, "score_size", trainer.evaluate if trainer.eval_dataset is not None else dict)
    with torch.random.fork_rng(devices=[]):  # loaders draw a seed: a resumed run may do this once more
        metrics = {key: value for key, value in score().items() if key != "epoch"}
    mask = session.head_mask()
    assert mask is not None  # a session that has sizes prunes heads
    with contextlib.ExitStack() as stack:
        whole = folder if mask.keep.all() else stack.enter_context(temporary_folder(folder.parent))
        save_outcome(str(whole), None)
        if not trainer.is_world_process_zero():
            return
        (folder / RESULTS_FILE).unlink(missing_ok=True)  # of an earlier try
        if whole != folder:
            export_compact(whole, folder, scores={key: found for key, found in metrics.items() if "eval_" in key})
    write_json(folder / RESULTS_FILE, {**metrics, **counts_told(mask)})
    logger.info("%s: the compact model, as trained so far, is in %s", mask.words, folder)
