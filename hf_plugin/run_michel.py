"""Prune the heads of a fine-tuned model by their importance (Michel et al. 2019), without training.

    python -m hf_plugin.run_michel --data_dir data/MNLI/ --model_name_or_path output/ --task_name MNLI \\
        --output_dir michel_output/ --exact_pruning --num_of_heads 12

Each round removes ``--num_of_heads`` heads and scores the model on the validation set. The rounds go into
``michel_rounds.json`` in ``--output_dir``, the mask of each into ``michel_masks/``; a run that was stopped goes on
after its last finished round.
"""

import logging
import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

from head_pruning import HeadMask
from head_pruning.importance import pruning_rounds
from head_pruning.importance.rounds import RoundsReport
from head_pruning.report.tables import head_table, text_table
from hf_plugin import logs, running
from hf_plugin.arguments import MichelArguments, parse_michel
from hf_plugin.data import compute_metrics, find_task, load_task
from hf_plugin.glue import load_pieces
from hf_plugin.heads import head_mask
from hf_plugin.importance import head_importance
from hf_plugin.task_run import first_examples
from hf_plugin.unit_map import unit_map

logger = logging.getLogger("hf_plugin.run_michel")


class MichelRun:
    """A fine-tuned model, its training data for importance and its validation data for scores."""

    def __init__(self, arguments: MichelArguments) -> None:
        self.arguments = arguments
        set_seed(arguments.seed)
        tokenizer, self.model, task = load_pieces(arguments, find_task(arguments.task_name))
        self.unit_map = unit_map(self.model)
        self.data = load_task(
            task,
            tokenizer=tokenizer,
            data_dir=arguments.data_dir,
            cache_dir=arguments.cache_dir,
            max_seq_length=arguments.max_seq_length,
            overwrite_cache=arguments.overwrite_cache,
            splits=("train", "validation"),
        )
        subset = arguments.data_subset if arguments.data_subset > 0 else None
        self.validation = {name: first_examples(part, subset) for name, part in self.data.validation.items()}
        self.collator = DataCollatorWithPadding(tokenizer)
        self.metric = arguments.metric_name or task.main_metric
        self.trainer = Trainer(
            model=self.model,
            args=TrainingArguments(
                output_dir=arguments.output_dir,
                per_device_eval_batch_size=arguments.batch_size,
                report_to="none",
                dataloader_pin_memory=not arguments.no_cuda and torch.cuda.is_available(),
                use_cpu=arguments.no_cuda,
                disable_tqdm=not sys.stderr.isatty(),
                seed=arguments.seed,
            ),
            data_collator=self.collator,
            processing_class=tokenizer,
            compute_metrics=compute_metrics(task),
        )
        self.device = self.trainer.args.device
        self.scores: dict[str, float] = {}

    def importance(self, mask: HeadMask) -> np.ndarray:
        """The importance of all heads over the training set, in its order."""
        arguments = self.arguments
        train = first_examples(self.data.train, arguments.max_train_samples)
        loader = DataLoader(train, batch_size=arguments.batch_size, collate_fn=self.collator)
        return head_importance(
            self.model,
            loader,
            mask=mask,
            unit_map=self.unit_map,
            per_example=arguments.per_example,
            normalize_by_layer=not arguments.dont_normalize_importance_by_layer,
            normalize_globally=not arguments.dont_normalize_global_importance,
        )

    def score(self, mask: HeadMask) -> float:
        """100 x the task's metric on its (first) validation set."""
        with head_mask(self.model, mask):
            for name, part in self.validation.items():
                self.scores[name] = 100.0 * self.trainer.evaluate(part)[f"eval_{self.metric}"]
        return next(iter(self.scores.values()))


def run(arguments: MichelArguments) -> list[dict]:
    """All rounds; returns and saves one entry per round."""
    logs.set_up()
    for note in arguments.notes:
        logger.info("%s", note)
    michel = MichelRun(arguments)
    settings = {
        name: getattr(arguments, name)
        for name in (
            *(
                "model_name_or_path",
                "task_name",
                "data_dir",
                "data_subset",
                "max_train_samples",
                "exact_pruning",
                "num_of_heads",
            ),
            *("dont_normalize_importance_by_layer", "dont_normalize_global_importance", "per_example"),
            *("max_seq_length", "batch_size"),
        )
    }
    weights = sum(float(parameter.detach().double().sum()) for parameter in michel.model.parameters())
    settings["model_checksum"] = weights
    if arguments.overwrite_output_dir:
        (Path(arguments.output_dir) / "michel_rounds.json").unlink(missing_ok=True)
    report = RoundsReport(arguments.output_dir, settings, michel.unit_map)
    if report.start is not None:
        logger.info("going on after the round that left %d heads", report.start.mask.kept)
    for result in pruning_rounds(
        michel.unit_map,
        michel.importance,
        michel.score,
        heads_per_round=arguments.num_of_heads,
        exact=arguments.exact_pruning,
        start=report.start,
    ):
        report.add(result, scores=dict(michel.scores))
        logger.info("%d heads left: %s %.2f", result.mask.kept, michel.metric, result.score)
        if 0 < result.mask.kept <= 2 * arguments.num_of_heads:
            logger.info("kept heads by site:\n%s", head_table(result.mask))
    names = list(michel.validation)
    rows = [(e["heads"], e["removed_percent"], *(float(e["scores"][name]) for name in names)) for e in report.entries]
    print(text_table(("heads kept", "removed %", *(f"{name} {michel.metric} x 100" for name in names)), rows))
    logger.info("rounds are in %s", report.path)
    return report.entries


def main() -> None:
    """Command line."""
    running.main(lambda: run(parse_michel(sys.argv[1:])))


if __name__ == "__main__":
    main()
