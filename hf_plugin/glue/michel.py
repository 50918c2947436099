"""Removing the heads of a fine-tuned classifier by their importance (Michel et al. 2019), round by round."""

import logging
import sys
from pathlib import Path
from typing import Any, Sequence

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

from head_pruning import HeadMask, HeadPruningError, UnitMap
from head_pruning.files import alone_in, write_json, writing
from head_pruning.importance import pruning_rounds
from head_pruning.importance.michel import macs_words, round_sizes
from head_pruning.importance.rounds import MASKS_FOLDER, ROUNDS_FILE, RoundsReport
from head_pruning.report.report_file import counts_told
from head_pruning.report.runs import RESULTS_FILE
from head_pruning.report.tables import head_table, text_table
from head_pruning.surgery.per_unit import unit_macs

from ..command_line.michel import MichelArguments
from ..heads.importance import head_importance
from ..heads.masking import head_mask
from ..host import COMPANIONS
from ..mapping.unit_map import unit_map
from ..saving.folders import save_pruned
from ..scripts import logs
from ..scripts.models import refuse_stored_integers
from ..scripts.output_folder import REPORTS, clear_folders, make_folder, refuse_masked_start, refuse_taken
from ..scripts.run import first_examples
from . import compute_metrics, find_task, load_task
from .features import check_files
from .metrics import find_metric
from .run import load_pieces
from .sizes import save_sizes, sizes_left

logger = logging.getLogger("hf_plugin.run_michel")

# What the heads that are removed depend on, beside the model and its data.
_CHOICE = (
    *("num_of_heads", "exact_pruning", "dont_normalize_importance_by_layer", "dont_normalize_global_importance"),
    *("per_example", "max_train_samples", "prune_units", "macs_per_round"),
)
_SETTINGS = ("model_name_or_path", "task_name", "data_dir", "data_subset", *_CHOICE, "max_seq_length", "batch_size")
_FLAGS = {"model_checksum": "set of weights, from --model_name_or_path or drawn with --seed"}
_CURE = "choose another --output_dir or add --overwrite_output_dir"


class MichelRun:
    """A fine-tuned model, its training data for importance and its validation data for scores."""

    def __init__(self, arguments: MichelArguments) -> None:
        self.arguments = arguments
        task = find_task(arguments.task_name)
        self.scored, self.metric = find_metric(arguments.metric_name, task)
        refuse_masked_start(arguments.model_name_or_path)
        self.out = open_folder(arguments.output_dir, arguments.model_name_or_path, arguments.overwrite_output_dir)
        set_seed(arguments.seed)
        if arguments.data_dir is not None:
            check_files(task, arguments.data_dir, ("train", "validation"))
        tokenizer, self.model, self.task = load_pieces(arguments, task, fits=self._check_sizes)
        self.unit_map = self._numbered(self.model).told()
        by_macs = arguments.macs_per_round is not None
        self.macs = unit_macs(self.model, self.unit_map, arguments.max_seq_length) if by_macs else None
        self.data = load_task(
            self.task,
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
        self.tokenizer = tokenizer
        self.trainer = self.trainer_of(self.model)
        self.device = self.trainer.args.device
        self.scores: dict[str, float] = {}
        self.measured: dict[int, dict[str, float]] = {}

    def trainer_of(self, model: nn.Module, **options: Any) -> Trainer:
        """A Trainer of a model on the run's data; ``options`` of its TrainingArguments."""
        arguments = self.arguments
        return Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=arguments.output_dir,
                per_device_train_batch_size=arguments.batch_size,
                per_device_eval_batch_size=arguments.batch_size,
                report_to="none",
                dataloader_pin_memory=not arguments.no_cuda and torch.cuda.is_available(),
                use_cpu=arguments.no_cuda,
                disable_tqdm=not sys.stderr.isatty(),
                seed=arguments.seed,
                **options,
            ),
            train_dataset=first_examples(self.data.train, arguments.max_train_samples),
            data_collator=self.collator,
            processing_class=self.tokenizer,
            compute_metrics=compute_metrics(self.task),
        )

    def _check_sizes(self, twin: nn.Module) -> None:
        """Raise HeadPruningError if the rounds do not fit models like ``twin``, or leave no count of ``--save_at``."""
        refuse_stored_integers(twin.config, self.arguments.model_name_or_path)
        left = round_sizes(self._numbered(twin), self._per_round)
        missing = [count for count in self.arguments.sizes if count not in left]
        if missing:
            raise HeadPruningError(
                f"No round leaves the {missing[0]} heads of --save_at, only {', '.join(map(str, left[:-1]))}; choose "
                f"among these, or another --num_of_heads than {self.arguments.num_of_heads}."
            )

    def _numbered(self, model: nn.Module) -> UnitMap:
        return unit_map(model).numbering(self.arguments.prune_units)

    @property
    def _per_round(self) -> int:
        return 1 if self.arguments.macs_per_round else self.arguments.num_of_heads

    def settings(self) -> dict[str, Any]:
        """What the rounds depend on; rounds of other settings are not gone on with.

        What says the same as its default is None: files of rounds may be older than the setting.
        """
        arguments = self.arguments
        found = {name: getattr(arguments, name) for name in _SETTINGS}
        found["prune_units"] = None if arguments.prune_units == "heads" else arguments.prune_units
        for name in ("tokenizer_name", "config_name"):
            given = getattr(arguments, name)
            found[name] = None if given == arguments.model_name_or_path else given
        if arguments.save_at is not None:
            found |= {name: getattr(arguments, name) for name in ("finetune_updates", "finetune_learning_rate")}
        usual = find_metric(None, self.task)
        if (self.scored, self.metric) != usual:
            found["metric_name"] = self.metric if self.scored == usual[0] else f"{self.scored}/{self.metric}"
        # A seed matters only to weights that the model's folder lacks, such as those of a new classifier.
        found["model_checksum"] = sum(float(weight.detach().double().sum()) for weight in self.model.parameters())
        return found

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

    def evaluate(self, mask: HeadMask) -> dict[str, float]:
        """All metrics of all (first) validation examples, under the names that the scripts that train give them."""
        with head_mask(self.model, mask):
            metrics = self.measured[mask.kept] = self.metrics_of(self.trainer)
        for i, name in enumerate(self.validation):
            self.scores[name] = 100.0 * metrics[f"{_prefix(i, name)}_{self.metric}"]
        return metrics

    def metrics_of(self, trainer: Trainer) -> dict[str, float]:
        """All metrics of a Trainer's model."""
        metrics: dict[str, float] = {}
        for i, (name, part) in enumerate(self.validation.items()):
            prefix = _prefix(i, name)
            found = trainer.evaluate(part, metric_key_prefix=prefix)
            # Where a training went before, there is no preparation, and the epoch is the training's.
            other = ("epoch", f"{prefix}_model_preparation_time")
            metrics |= {key: value for key, value in found.items() if key not in other}
            metrics[f"{prefix}_samples"] = len(part)
        return metrics

    def score(self, mask: HeadMask) -> float:
        """100 x the metric on its (first) validation set."""
        self.evaluate(mask)
        return self.scores[self.scored]

    def prune(self, report: RoundsReport) -> None:
        """All rounds that ``report`` lacks."""
        arguments = self.arguments
        if report.start is not None and not report.finished:
            logger.info("going on after the round that left %d heads", report.start.mask.kept)
        for result in pruning_rounds(
            self.unit_map,
            self.importance,
            self.score,
            heads_per_round=self._per_round,
            exact=arguments.exact_pruning,
            start=report.start,
            costs=self.macs,
            cost_per_round=arguments.macs_per_round,
        ):
            told = result.cost_told(self.macs)
            report.add(result, scores=dict(self.scores), **told)
            logger.info("%s left%s: %s %.2f", result.mask.words, macs_words(told), self.metric, result.score)
            if 0 < result.mask.kept <= 2 * arguments.num_of_heads:
                logger.info("kept heads by site:\n%s", head_table(result.mask))

    def save(self, report: RoundsReport) -> None:
        """Write the model of :func:`model_round` and what tells of it; ``all_results.json`` comes last."""
        mask = report.mask(model_round(report.entries))
        metrics = self.measured.get(mask.kept) or self.evaluate(mask)
        save_pruned(
            self.model,
            mask,
            self.out,
            processing_class=self.trainer.processing_class,
            method="michel",
            options={name: getattr(self.arguments, name) for name in _CHOICE},
            scores=metrics,
            dataset=f"GLUE {self.task.folder}",
            history=[{name: value for name, value in e.items() if name != "importance"} for e in report.entries],
        )
        write_json(self.out / RESULTS_FILE, {**metrics, **counts_told(mask)})
        logger.info("%s are left in the model in %s", mask.words, self.out)

    def table(self, report: RoundsReport) -> str:
        """One line per round."""
        names = list(self.validation)
        rows = [
            (entry["heads"], entry["removed_percent"], *(float(entry["scores"][name]) for name in names))
            for entry in report.entries
        ]
        return text_table(("heads kept", "removed %", *(f"{name} {self.metric} x 100" for name in names)), rows)


def _prefix(place: int, validation: str) -> str:
    return "eval" if place == 0 else f"eval_{validation.rpartition('-')[2]}"


def run(arguments: MichelArguments) -> list[dict]:
    """All rounds; returns and saves one entry per round, and saves the model at the end.

    Raises:
        HeadPruningError: the folder holds a run of other settings or another model, the start model's heads are zeroed
            already, there is no such metric, or the model or its data cannot be loaded.
    """
    logs.set_up()
    for note in arguments.notes:
        logger.info("%s", note)
    if not sys.stderr.isatty():
        logs.no_bars()
    michel = MichelRun(arguments)
    with alone_in(michel.out), writing(michel.out, also_reading=True):
        return _all_rounds(michel)


def _all_rounds(michel: MichelRun) -> list[dict]:
    if michel.arguments.overwrite_output_dir:
        clear(michel.out, michel.arguments.model_name_or_path)
    report = RoundsReport(michel.out, michel.settings(), michel.unit_map, flags=_FLAGS, cure=_CURE)
    if report.start is None:
        (michel.out / RESULTS_FILE).unlink(missing_ok=True)  # of some other run; that of this one says that it is done
    if report.finished and (michel.out / RESULTS_FILE).exists() and sizes_left(michel, report) == []:
        logger.info("this run is finished already (--overwrite_output_dir starts anew)")
    else:
        michel.prune(report)
        save_sizes(michel, report)
        michel.save(report)
    print(michel.table(report))
    logger.info("rounds are in %s", report.path)
    return report.entries


# Beside the tokenizer's files.
_MODEL = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "compact_heads.py")


def open_folder(output_dir: "str | Path", start: str, overwrite: bool) -> Path:
    """The folder that a run writes to, made if missing; nothing in it is touched.

    Args:
        output_dir: what ``--output_dir`` says.
        start: what ``--model_name_or_path`` says.
        overwrite: whether the folder may hold the model of another run.

    Raises:
        HeadPruningError: it cannot be made or written, is the start model's own, or holds files of another run that
            this one would write over.
    """
    out = make_folder(output_dir)
    if Path(start).is_dir() and out.resolve() == Path(start).resolve():
        raise HeadPruningError(
            f"--output_dir {out} is the start model's own folder, where the pruned model would take its place; choose "
            "another --output_dir."
        )
    if not overwrite and not (out / ROUNDS_FILE).exists():
        refuse_taken(out)
    return out


def clear(out: Path, start: str) -> None:
    """Remove what an earlier Michel run wrote, but for ``start``; a folder without one is left as it is."""
    if not (out / ROUNDS_FILE).exists():
        return
    clear_folders(out, MASKS_FOLDER, [start])
    written = (RESULTS_FILE, *REPORTS, *_MODEL)
    for path in out.iterdir():
        ours = COMPANIONS.fullmatch(path.name) or any(path.match(pattern) for pattern in written)
        if ours and path.is_file():
            path.unlink()
    # Last: what is cut off on the way is cleared by the next call.
    (out / ROUNDS_FILE).unlink()


def model_round(rounds: Sequence[dict]) -> dict:
    """The entry whose mask the folder's model gets: the fewest heads, but not none where another round leaves some.

    The last round always removes the last head, and nobody wants that model.
    """
    return ([entry for entry in rounds[1:] if entry["heads"]] or rounds)[-1]
