"""One GLUE run: fine-tune, prune or both; evaluate, predict, and save what came out."""

import logging
import math
from pathlib import Path
from typing import Any, Optional

import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    set_seed,
)

from head_pruning import HeadMask, HeadPruningError
from head_pruning.report.tables import head_table

from .arguments import Arguments, ModelArguments
from .checkpoints import last_checkpoint
from .data import GlueTask, TaskData, compute_metrics, find_task, load_task, write_predictions
from .defaults import pruner
from .export import save_pruned
from .logs import set_up
from .trainer import HeadPruningTrainer

logger = logging.getLogger(__name__)


def load_pieces(model_args: ModelArguments, task: GlueTask) -> tuple[Any, Any, GlueTask]:
    """The tokenizer and the classifier for a GLUE task, and the task with its classes in the classifier's order.

    Raises:
        HeadPruningError: the model or its tokenizer cannot be loaded.
    """
    name, hub = model_args.model_name_or_path, model_args.hub_options()
    try:
        config = AutoConfig.from_pretrained(model_args.config_name or name, **hub)
        task = task.ordered_as(config.id2label)
        config.num_labels = task.num_labels
        if not task.regression:
            config.id2label, config.label2id = task.id2label, task.label2id
        config.problem_type = "regression" if task.regression else "single_label_classification"
        tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or name, **hub)
        # A model saved in half precision is trained in float32 (--fp16 and --bf16 mix precisions themselves).
        model = AutoModelForSequenceClassification.from_pretrained(name, config=config, dtype=torch.float32, **hub)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise HeadPruningError(
            f"{name} cannot be loaded ({reason}); give the folder or the hub name of a model with its tokenizer."
        ) from error
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, model, task


def first_examples(dataset: Dataset, count: Optional[int]) -> Dataset:
    """At most ``count`` examples, all if None."""
    return dataset if count is None else dataset.select(range(min(count, len(dataset))))


class GlueRun:
    """The steps of one run; ``run()`` does all that the arguments ask for."""

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments
        training = arguments.training
        self.out = Path(training.output_dir)
        self.resume = self._checkpoint()
        set_seed(training.seed)
        wanted = [
            split
            for split, do in (
                ("train", training.do_train),
                ("validation", training.do_eval or str(training.eval_strategy.value) != "no"),
                ("test", training.do_predict),
            )
            if do
        ]
        if not wanted:
            raise HeadPruningError("There is nothing to do; add --do_train, --do_eval or --do_predict.")
        tokenizer, self.model, self.task = load_pieces(arguments.model, find_task(arguments.data.task_name))
        data = arguments.data
        with training.main_process_first(desc="tokenising"):
            self.data: TaskData = load_task(
                self.task,
                tokenizer=tokenizer,
                data_dir=data.data_dir,
                cache_dir=arguments.model.cache_dir,
                max_seq_length=data.max_seq_length,
                overwrite_cache=data.overwrite_cache,
                splits=tuple(wanted),
            )
        self.validation = {
            name: first_examples(part, data.max_eval_samples) for name, part in self.data.validation.items()
        }
        self.trainer = self._trainer(tokenizer)
        self.results: dict[str, float] = {}

    def _checkpoint(self) -> Optional[Path]:
        """The checkpoint to go on from, if there is one."""
        training = self.arguments.training
        if not training.do_train:
            return None
        if training.resume_from_checkpoint:
            return Path(training.resume_from_checkpoint)
        if self.arguments.data.overwrite_output_dir or not self.out.is_dir():
            return None
        found = last_checkpoint(self.out)
        if found is not None:
            logger.info("resuming from %s (--overwrite_output_dir starts anew)", found)
        elif any(path.suffix == ".safetensors" for path in self.out.iterdir()):
            raise HeadPruningError(
                f"{self.out} already holds a model; choose another --output_dir or add --overwrite_output_dir."
            )
        return found

    def _trainer(self, tokenizer: Any) -> Trainer:
        training, method = self.arguments.training, self.arguments.method
        options = {
            "model": self.model,
            "args": training,
            "train_dataset": None
            if self.data.train is None
            else first_examples(self.data.train, self.arguments.data.max_train_samples),
            "eval_dataset": next(iter(self.validation.values()), None),
            "processing_class": tokenizer,
            "data_collator": DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if training.fp16 else None),
            "compute_metrics": compute_metrics(self.task),
        }
        if method is None:
            return Trainer(**options)
        pruners = [pruner(method.name, **self.arguments.options)]
        mask_steps = 1000 if self.arguments.data.intermediate_masks else 0
        trainer = HeadPruningTrainer(**options, pruners=pruners, mask_steps=mask_steps)
        session = trainer.session
        logger.info(
            "pruning with %s: %d heads in %d attention layers, the model's own weights are %s",
            method.name,
            session.unit_map.num_heads,
            len(session.unit_map.attention),
            "kept as they are (pipelined)" if session.freezes_model else "trained too (joint)",
        )
        return trainer

    @property
    def head_mask(self) -> Optional[HeadMask]:
        """The heads that stay; None for a dense run."""
        return getattr(self.trainer, "head_mask", None)

    def run(self) -> dict[str, float]:
        """Train, evaluate, predict, save; returns all metrics."""
        training = self.arguments.training
        if training.do_train:
            outcome = self.trainer.train(resume_from_checkpoint=str(self.resume) if self.resume else None)
            self._report("train", {**outcome.metrics, "train_samples": len(self.trainer.train_dataset)})
            self.trainer.save_state()
        elif self.head_mask is not None:
            raise HeadPruningError("Pruning learns which heads to keep; add --do_train.")
        if training.do_eval:
            self.evaluate()
        if training.do_predict:
            self.predict()
        self.save()
        return self.results

    def _report(self, split: str, metrics: dict[str, float]) -> None:
        self.results.update(metrics)
        self.trainer.log_metrics(split, metrics)
        self.trainer.save_metrics(split, metrics)

    def evaluate(self) -> None:
        """Score every validation set (MNLI has two)."""
        metrics: dict[str, float] = {}
        for i, (name, part) in enumerate(self.validation.items()):
            prefix = "eval" if i == 0 else f"eval_{name.rpartition('-')[2]}"
            metrics |= self.trainer.evaluate(part, metric_key_prefix=prefix)
            metrics[f"{prefix}_samples"] = len(part)
        mask = self.head_mask
        if mask is not None:
            metrics["heads_kept"], metrics["heads_total"] = mask.kept, mask.keep.size
        broken = [name for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]
        if broken:
            raise HeadPruningError(
                f"{broken[0]} is not finite: the model's outputs are NaN or infinite; lower --learning_rate."
            )
        self._report("eval", metrics)

    def predict(self) -> None:
        """Write GLUE's submission files."""
        for name, part in self.data.test.items():
            outputs = self.trainer.predict(part).predictions
            if self.trainer.is_world_process_zero():
                logger.info("predictions are in %s", write_predictions(self.task, name, outputs, self.out))

    def save(self) -> None:
        """Write the model and, when heads were pruned, what tells of them."""
        training, method, mask = self.arguments.training, self.arguments.method, self.head_mask
        if not training.do_train:
            return
        if mask is None:
            self.trainer.save_model()
            return
        if self.trainer.is_world_process_zero():
            save_pruned(
                self.trainer.accelerator.unwrap_model(self.trainer.model),
                mask,
                self.out,
                processing_class=self.trainer.processing_class,
                method=method.name,
                options=self.arguments.options,
                scores={name: value for name, value in self.results.items() if name.startswith("eval_")},
                dataset=f"GLUE {self.task.folder}",
                history=[entry for entry in self.trainer.state.log_history if "eval_loss" in entry],
            )
            logger.info("kept heads by site:\n%s", head_table(mask))
            score = self.results.get(f"eval_{self.task.main_metric}")
            logger.info(
                "%d of %d heads are left%s; model, mask and report are in %s",
                mask.kept,
                mask.keep.size,
                "" if score is None else f", {self.task.main_metric} {score:.4f}",
                self.out,
            )


def run(arguments: Arguments) -> dict[str, float]:
    """Do all that the arguments ask for; returns the metrics that ``all_results.json`` holds."""
    training = arguments.training
    shown = training.should_log and training.log_level == "passive"
    set_up(None if shown else training.get_process_log_level())
    for note in arguments.notes:
        logger.info("%s", note)
    return GlueRun(arguments).run()
