"""Many sizes from one Michel run: the models of some rounds, cut, trained on and saved, each in its own folder."""

import copy
import logging
from pathlib import Path
from typing import Any

from head_pruning.files import SIZES_FOLDER, write_json
from head_pruning.importance.rounds import RoundsReport
from head_pruning.report.report_file import counts_told
from head_pruning.report.runs import RESULTS_FILE
from head_pruning.surgery.removal import remove_heads

from ..saving.folders import save_compact, save_pruned

logger = logging.getLogger("hf_plugin.run_michel")

_OPTIONS = ("num_of_heads", "exact_pruning", "per_example", "finetune_updates", "finetune_learning_rate")


def sizes_left(michel: Any, report: RoundsReport) -> list[dict]:
    """The rounds of ``--save_at`` whose models are not there yet; ``michel`` is a :class:`.michel.MichelRun`."""
    wanted = [entry for entry in report.entries if entry["heads"] in michel.arguments.sizes]
    return [entry for entry in wanted if not (_folder(michel, entry["heads"]) / RESULTS_FILE).exists()]


def save_sizes(michel: Any, report: RoundsReport) -> None:
    """Cut, train and save the models of ``--save_at`` that are not there yet; each ``all_results.json`` comes last.

    Every model starts from the weights that the run started from, so that one that was cut off is made again alone.
    """
    arguments = michel.arguments
    for entry in sizes_left(michel, report):
        mask, out = report.mask(entry), _folder(michel, entry["heads"])
        model: Any = copy.deepcopy(michel.model)
        if not mask.keep.all():
            remove_heads(model, michel.unit_map, mask)
        training = {"max_steps": arguments.finetune_updates, "learning_rate": arguments.finetune_learning_rate}
        trainer = michel.trainer_of(model, save_strategy="no", **training)
        if arguments.finetune_updates:
            logger.info("training the model of %s for %d updates", mask.words, arguments.finetune_updates)
            trainer.train()
        metrics = michel.metrics_of(trainer)
        about = {
            "processing_class": michel.tokenizer,
            "method": "michel",
            "options": {name: getattr(arguments, name) for name in _OPTIONS},
            "scores": metrics,
            "dataset": f"GLUE {michel.task.folder}",
        }
        if mask.keep.all():
            save_pruned(model, mask, out, **about)
        else:
            save_compact(model, out, **about)
        write_json(out / RESULTS_FILE, {**metrics, **counts_told(mask)})
        logger.info("%s: %s %.4f, in %s", mask.words, michel.metric, metrics[f"eval_{michel.metric}"], out)


def _folder(michel: Any, heads: int) -> Path:
    return michel.out / SIZES_FOLDER / f"heads{heads}"
