"""What the runs of all tasks share: resume, train with or without a pruner, report, save."""

import contextlib
import logging
import math
from pathlib import Path
from typing import Any, Iterator, Optional

from datasets import Dataset
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, set_seed

from head_pruning import HeadMask, HeadPruningError
from head_pruning.report.tables import head_table

from .arguments import Arguments
from .checkpoints import last_checkpoint
from .export import save_pruned
from .logs import set_up
from .optimizers import check_resumed, trainer_options
from .trainer import HeadPruningTrainer
from .weights import save_weight_masks_and_report, weight_masks

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def loading(name: str) -> Iterator[None]:
    """Inside the block the model ``name`` is loaded; what goes wrong becomes a HeadPruningError."""
    try:
        yield
    except HeadPruningError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise HeadPruningError(
            f"{name} cannot be loaded ({reason}); give the folder or the hub name of a model with its tokenizer."
        ) from error


def first_examples(dataset: Dataset, count: Optional[int]) -> Dataset:
    """At most ``count`` examples, all if None."""
    return dataset if count is None else dataset.select(range(min(count, len(dataset))))


class _Ordered:
    """A Trainer that can keep the dataset's order when it does not train; transformers groups by length there too."""

    in_order = False

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Optional[Sampler]:
        if not self.in_order:
            return super()._get_eval_sampler(eval_dataset)
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None


class _DenseTrainer(_Ordered, Trainer):
    pass


class _PruningTrainer(_Ordered, HeadPruningTrainer):
    pass


class TaskRun:
    """The steps of one run; ``run()`` does all that the arguments ask for.

    A task's own class loads model and data, sets ``trainer`` (see :meth:`build_trainer`), ``dataset`` and
    ``main_metric``, and brings :meth:`evaluate` and :meth:`predict`.
    """

    #: Whether evaluation must keep the dataset's order.
    in_order = False

    trainer: Trainer
    #: What the scores were measured on, for the model card.
    dataset: str
    #: Name of the metric that ranks models.
    main_metric: str

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments
        training = arguments.training
        self.out = Path(training.output_dir)
        self.resume = self._checkpoint()
        if self.resume is not None:
            check_resumed(arguments.optimizer, self.resume)
        set_seed(training.seed)
        self.splits = tuple(
            split
            for split, do in (
                ("train", training.do_train),
                ("validation", training.do_eval or str(training.eval_strategy.value) != "no"),
                ("test", training.do_predict),
            )
            if do
        )
        if not self.splits:
            raise HeadPruningError("There is nothing to do; add --do_train, --do_eval or --do_predict.")
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

    def build_trainer(self, **options: Any) -> Trainer:
        """The Trainer with ``options``, and with the pruners if some were chosen."""
        arguments = self.arguments
        options = {"args": arguments.training, **trainer_options(arguments.optimizer, arguments.training), **options}
        if not arguments.chosen:
            trainer = _DenseTrainer(**options)
            trainer.in_order = self.in_order
            return trainer
        mask_steps = 1000 if arguments.data.intermediate_masks else 0
        trainer = _PruningTrainer(**options, pruners=arguments.pruners(), mask_steps=mask_steps)
        trainer.in_order = self.in_order
        session = trainer.session
        if arguments.method is not None:
            logger.info(
                "pruning with %s: %d heads in %d attention layers, the model's own weights are %s",
                arguments.method.name,
                session.unit_map.num_heads,
                len(session.unit_map.attention),
                "kept as they are (pipelined)" if session.freezes_model else "trained too (joint)",
            )
        if arguments.weight_method is not None:
            logger.info("pruning weights with %s", arguments.weight_method.name)
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
            samples = {"train_samples": len(self.trainer.train_dataset)}
            self.report("train", {**outcome.metrics, **samples, **self.kept_metrics()})
            self.trainer.save_state()
        elif self.arguments.chosen:
            raise HeadPruningError("Pruning learns what to keep; add --do_train.")
        if training.do_eval:
            self.evaluate()
        if training.do_predict:
            self.predict()
        self.save()
        return self.results

    def report(self, split: str, metrics: dict[str, float]) -> None:
        """Log the metrics and write them into ``all_results.json``.

        Raises:
            HeadPruningError: a score is not finite.
        """
        broken = [name for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]
        if split != "train" and broken:
            raise HeadPruningError(
                f"{broken[0]} is not finite: the model's outputs are NaN or infinite; lower --learning_rate."
            )
        self.results.update(metrics)
        self.trainer.log_metrics(split, metrics)
        self.trainer.save_metrics(split, metrics)

    def kept_metrics(self) -> dict[str, int]:
        """How many heads and weights stay, of how many; empty for a dense run."""
        kept: dict[str, int] = {}
        if self.head_mask is not None:
            kept |= {"heads_kept": self.head_mask.kept, "heads_total": self.head_mask.keep.size}
        masks = weight_masks(self.trainer.session) if self.arguments.chosen else {}
        if masks:
            kept["weights_kept"] = sum(int(keep.sum()) for keep in masks.values())
            kept["weights_total"] = sum(keep.numel() for keep in masks.values())
        return kept

    def evaluate(self) -> None:
        """Score the validation sets."""
        raise NotImplementedError

    def predict(self) -> None:
        """Write predictions for the test sets."""
        raise NotImplementedError

    def save(self) -> None:
        """Write the model and, when something was pruned, what tells of it."""
        training, chosen, mask = self.arguments.training, self.arguments.chosen, self.head_mask
        if not training.do_train:
            return
        if mask is None:
            # Weight pruners have put their zeros into the model itself.
            self.trainer.save_model(**({"_internal_call": True} if chosen else {}))
        elif self.trainer.is_world_process_zero():
            save_pruned(
                self.trainer.accelerator.unwrap_model(self.trainer.model),
                mask,
                self.out,
                processing_class=self.trainer.processing_class,
                method="+".join(method.name for method, _ in chosen),
                options={name: value for _, options in chosen for name, value in options.items()},
                scores=self._final_scores(),
                dataset=self.dataset,
                history=self._history(),
            )
            logger.info("kept heads by site:\n%s", head_table(mask))
            score = self.results.get(f"eval_{self.main_metric}")
            logger.info(
                "%d of %d heads are left%s; model, mask and report are in %s",
                mask.kept,
                mask.keep.size,
                "" if score is None else f", {self.main_metric} {score:.4f}",
                self.out,
            )
        if self.arguments.weight_method is not None and self.trainer.is_world_process_zero():
            self._save_weight_masks()

    def _final_scores(self) -> dict[str, float]:
        return {name: value for name, value in self.results.items() if name.startswith("eval_")}

    def _history(self) -> list[dict[str, float]]:
        """The scores on the way and at the end."""
        return [entry for entry in self.trainer.state.log_history if "eval_loss" in entry]

    def _save_weight_masks(self) -> None:
        """Add the masks and the densities reached to the model's folder."""
        trainer, kept = self.trainer, self.kept_metrics()
        save_weight_masks_and_report(
            self.out,
            trainer.accelerator.unwrap_model(trainer.model),
            trainer.session,
            scores=self._final_scores(),
            dataset=self.dataset,
            history=self._history(),
        )
        logger.info(
            "%d of %d weights are left; masks and densities are in %s",
            kept["weights_kept"],
            kept["weights_total"],
            self.out,
        )


def start(run: type[TaskRun], arguments: Arguments) -> dict[str, float]:
    """Set up the log, then do all that the arguments ask for; returns the metrics that ``all_results.json`` holds."""
    training = arguments.training
    shown = training.should_log and training.log_level == "passive"
    set_up(None if shown else training.get_process_log_level())
    for note in arguments.notes:
        logger.info("%s", note)
    return run(arguments).run()
