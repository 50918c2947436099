"""One GLUE run: fine-tune, prune or both; evaluate, predict, and save what came out."""

import logging
from typing import Any, Callable, Optional

from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, DataCollatorWithPadding

from head_pruning import HeadPruningError

from ..command_line.arguments import Arguments
from ..command_line.fields import GlueArguments, ModelArguments
from ..scripts.models import check_twin, give_padding, load_model, load_tokenizer
from ..scripts.run import TaskRun, first_examples, loading, start
from . import GlueTask, TaskData, compute_metrics, find_task, load_task, write_predictions
from .features import check_files

logger = logging.getLogger(__name__)


def load_pieces(
    model_args: ModelArguments,
    task: GlueTask,
    training: bool = False,
    takes_new: Callable[[str], Any] = lambda tensor: None,
    fits: Optional[Callable[[nn.Module], Any]] = None,
) -> tuple[Any, Any, GlueTask]:
    """The tokenizer and the classifier for a GLUE task, and the task with its classes in the classifier's order.

    Args:
        model_args: the model's and the tokenizer's names.
        task: the task.
        training: the classifier will be trained, so the outputs of one that learnt a task with another number of
            classes (MNLI before RTE) may start anew.
        takes_new: see :func:`hf_plugin.scripts.models.load_model`.
        fits: raises HeadPruningError for what cannot be done to a model like the one it is given; called, with one
            without weights, before the weights are loaded.

    Raises:
        HeadPruningError: the model or its tokenizer cannot be loaded or does not fit the task, or cannot pad.
    """
    name, hub = model_args.model_name_or_path, model_args.hub_options()
    with loading(name):
        config = AutoConfig.from_pretrained(model_args.config_name or name, **hub)
        task = task.ordered_as(config.id2label)
        config.num_labels = task.num_labels
        if not task.regression:
            config.id2label, config.label2id = task.id2label, task.label2id
        config.problem_type = "regression" if task.regression else "single_label_classification"
        tokenizer = load_tokenizer(model_args)
        if fits is not None:
            check_twin(AutoModelForSequenceClassification, config, fits)
        model, outputs = load_model(AutoModelForSequenceClassification, name, takes_new, config=config, **hub)
    if outputs is not None:
        differs = f"{name} has {outputs} outputs but {task.folder} needs {task.num_labels}"
        if not training:
            raise HeadPruningError(f"{differs}; give a model fine-tuned on {task.folder}.")
        logger.info("%s: its output layer starts anew", differs)
    give_padding(tokenizer, model)
    return tokenizer, model, task


def _data(arguments: Arguments) -> GlueArguments:
    assert isinstance(arguments.data, GlueArguments)  # as run_glue and its like parse them
    return arguments.data


class GlueRun(TaskRun):
    """The steps of one run on a GLUE task."""

    def __init__(self, arguments: Arguments) -> None:
        super().__init__(arguments)
        data, training = _data(arguments), arguments.training
        task = find_task(data.task_name)
        if data.data_dir is not None:
            check_files(task, data.data_dir, self.splits)
        tokenizer, model, self.task = load_pieces(
            arguments.model, task, training.do_train, self.takes_new, fits=self.fits
        )
        self.dataset, self.main_metric = f"GLUE {self.task.folder}", self.task.main_metric
        with training.main_process_first(desc="tokenising"):
            self.data: TaskData = load_task(
                self.task,
                tokenizer=tokenizer,
                data_dir=data.data_dir,
                cache_dir=arguments.model.cache_dir,
                max_seq_length=data.max_seq_length,
                overwrite_cache=data.overwrite_cache,
                splits=self.splits,
            )
        self.validation = {
            name: first_examples(part, data.max_eval_samples) for name, part in self.data.validation.items()
        }
        self.trainer = self.build_trainer(
            model=model,
            train_dataset=None if self.data.train is None else first_examples(self.data.train, data.max_train_samples),
            eval_dataset=next(iter(self.validation.values()), None),
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if training.fp16 else None),
            compute_metrics=compute_metrics(self.task),
        )

    @staticmethod
    def task_name(arguments: Arguments) -> str:
        """As GLUE spells it."""
        return find_task(_data(arguments).task_name).folder

    def scores(self) -> dict[str, float]:
        """Those of every validation set (MNLI has two)."""
        metrics: dict[str, float] = {}
        for i, (name, part) in enumerate(self.validation.items()):
            prefix = "eval" if i == 0 else f"eval_{name.rpartition('-')[2]}"
            metrics |= self.trainer.evaluate(part, metric_key_prefix=prefix)
            metrics[f"{prefix}_samples"] = len(part)
        return metrics

    def predict(self) -> None:
        """Write GLUE's submission files."""
        self.trainer.in_order = True  # their lines are the test sets'
        for name, part in self.data.test.items():
            outputs = self.trainer.predict(part).predictions
            if self.trainer.is_world_process_zero():
                path = write_predictions(self.task, name, outputs, self.out, self.data.ids[name])
                logger.info("predictions are in %s", path)


def run(arguments: Arguments) -> dict[str, float]:
    """Do all that the arguments ask for; returns the metrics that ``all_results.json`` holds."""
    return start(GlueRun, arguments)
