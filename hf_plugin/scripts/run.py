"""What the runs of all tasks share: resume, train with or without a pruner, report, save."""

import contextlib
import copy
import logging
import math
import sys
from typing import Any, ContextManager, Iterator, Optional

from datasets import Dataset
from torch import nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, set_seed

from head_pruning import HeadMask, HeadPruningError
from head_pruning.errors import one_line
from head_pruning.files import alone_in, atomic_path, writing
from head_pruning.pruner import options_of
from head_pruning.report.report_file import counts_told
from head_pruning.report.tables import head_table
from head_pruning.report.weights import session_counts, sum_counts

from ..command_line.arguments import Arguments
from ..saving.card import dense_card
from ..saving.folders import describe_pruned, save_pruned
from ..saving.quantized import only_evaluated, stored_form
from ..training.callback import refuse_broken
from ..training.checkpoints import Checkpoint, check_resumable, last_checkpoint
from ..training.optimizers import check_resumed, trainer_options
from ..training.session import open_session
from ..training.sharding import whole
from ..training.trainer import HeadPruningTrainer
from ..training.weights import save_weight_masks_and_report
from ..training.wrapping import save_at_once, wrap_checkpoints, wrap_end
from .logs import no_bars, set_up
from .models import refuse_stored_integers
from .output_folder import REPORTS, clear_folders, make_folder, refuse_masked_start, refuse_taken
from .settings import RunSettings, check_same_settings, settings_of

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def loading(name: str) -> Iterator[None]:
    """Inside the block the model ``name`` is loaded; what goes wrong becomes a HeadPruningError."""
    try:
        yield
    except HeadPruningError:
        raise
    except Exception as error:  # each class fails in its own way with a damaged configuration
        reason = one_line(error)[:300]
        raise HeadPruningError(
            f"{name} cannot be loaded ({reason}); give the folder or the hub name of a model with its tokenizer."
        ) from error


def first_examples(dataset: Dataset, count: Optional[int]) -> Dataset:
    """At most ``count`` examples, all if None."""
    return dataset if count is None else dataset.select(range(min(count, len(dataset))))


_Trainer: Any = object  # the class of the trainer comes after the mixin


class _Ordered(_Trainer):
    """A Trainer that can keep the dataset's order when it does not train; transformers groups by length there too."""

    in_order = False

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Optional[Sampler]:
        if not self.in_order:
            return super()._get_eval_sampler(eval_dataset)
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None


class DenseTrainer(_Ordered, Trainer):
    """That of a run without pruners."""


class PruningTrainer(_Ordered, HeadPruningTrainer):
    """That of a run with pruners."""


class TaskRun:
    """The steps of one run; ``run()`` does all that the arguments ask for.

    A task's own class loads model and data, sets ``trainer`` (see :meth:`build_trainer`), ``dataset`` and
    ``main_metric``, and brings :meth:`scores` and :meth:`predict`.
    """

    #: Whether evaluation must keep the dataset's order.
    in_order = False
    dense_trainer, pruning_trainer = DenseTrainer, PruningTrainer

    trainer: Trainer
    #: What the scores were measured on, for the model card.
    dataset: str
    #: Name of the metric that ranks models.
    main_metric: str

    @staticmethod
    def task_name(arguments: Arguments) -> Optional[str]:
        """The one name of a task that users may spell in several ways; None where a script has one task."""
        return None

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments
        training = arguments.training
        self.out = make_folder(training.output_dir)
        self.settings = settings_of(arguments, self.task_name(arguments))
        self._check_training()
        if any(pruner.kind == "heads" and not pruner.takes_zeroed_heads for pruner in arguments.pruners):
            refuse_masked_start(arguments.model.model_name_or_path)
        self.resume = self._checkpoint()
        if self.resume is not None:
            check_same_settings(self.resume, self.settings)
            check_resumed(arguments.optimizer, self.resume.folder)
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

    def takes_new(self, tensor: str) -> None:
        """Raise HeadPruningError where a tensor that starts anew would never be trained, or be learnt from."""
        name, pruners = self.arguments.model.model_name_or_path, self.arguments.pruners
        learners = [each.name for each in pruners if each.kind == "distils" and each.needs_trained_model]
        if learners:
            raise HeadPruningError(
                f"{' and '.join(learners)} would learn from {name} itself, whose {tensor} was never trained; "
                "fine-tune it on the task first and start from the outcome, or give --teacher_path."
            )
        freezing = [each.name for each in pruners if each.freezes_model]
        if freezing and self.arguments.training.do_train:
            raise HeadPruningError(
                f"{' and '.join(freezing)} would train gates alone and leave the model as it is, but {tensor} is not "
                f"in {name} and was never trained; add --joint_pruning to train the model too, or fine-tune it on the "
                "task first and start from the outcome."
            )

    def _checkpoint(self) -> Optional[Checkpoint]:
        """The checkpoint to go on from, if there is one."""
        training = self.arguments.training
        if not training.do_train:
            return None
        asked = training.resume_from_checkpoint
        if asked and str(asked).lower() != "true":
            return check_resumable(asked)
        if self.arguments.data.overwrite_output_dir and not asked:
            found = None
        else:
            found = last_checkpoint(self.out)
        if found is not None:
            logger.info("resuming from %s (--overwrite_output_dir starts anew)", found.folder)
        elif asked:
            raise HeadPruningError(f"There is no whole checkpoint in {self.out} to resume from.")
        elif not self.arguments.data.overwrite_output_dir:
            refuse_taken(self.out)
        return found

    def _check_training(self) -> None:
        """Raise HeadPruningError for what transformers would take without a word, or notice too late."""
        training = self.arguments.training
        if training.do_train and training.max_steps <= 0 and training.num_train_epochs <= 0:
            raise HeadPruningError(
                f"--num_train_epochs is {training.num_train_epochs:g}, so nothing would be trained; give a number "
                "above 0, or leave out --do_train."
            )
        if training.do_predict and training.prediction_loss_only:
            raise HeadPruningError(
                "--prediction_loss_only leaves nothing to write for --do_predict; drop one of them."
            )

    def _clear(self) -> None:
        """Remove what is left of the run that --overwrite_output_dir gives up, but for what this one starts from."""
        options = [self.arguments.model, *(pruner.config for pruner in self.arguments.pruners if pruner.config)]
        named = [value for each in options for value in vars(each).values() if isinstance(value, str)]
        clear_folders(self.out, "checkpoint-*", named)
        for pattern in ("mask[0-9]*.safetensors", "*_results.json", "trainer_state.json"):
            for path in self.out.glob(pattern):
                path.unlink()

    def fits(self, twin: nn.Module) -> None:
        """Raise HeadPruningError if models like ``twin``, which is left as it is, cannot be trained with the options.

        Distillers, which would load a teacher, are left out.
        """
        if self.arguments.training.do_train:
            refuse_stored_integers(twin.config, self.arguments.model.model_name_or_path)
        cutting = [each for each in self.arguments.pruners if each.kind in ("heads", "units", "weights")]
        if cutting:
            pruners = [type(each)(copy.deepcopy(each.config)) for each in cutting]
            open_session(twin, pruners, seed=self.arguments.training.seed).detach()

    def build_trainer(self, **options: Any) -> Trainer:
        """The Trainer with ``options``, and with the pruners if some were chosen."""
        arguments = self.arguments
        options = {"args": arguments.training, **trainer_options(arguments.optimizer, arguments.training), **options}
        options["callbacks"] = [RunSettings(self.settings), *options.get("callbacks", [])]
        if not arguments.pruners:
            with contextlib.nullcontext() if arguments.training.do_train else only_evaluated(options["model"]):
                trainer = self.dense_trainer(**options)
            wrap_end(trainer, lambda: 0 if self.resume is None else self.resume.step)
            wrap_checkpoints(trainer)
            return self._prepared(trainer)
        mask_steps = 1000 if arguments.data.intermediate_masks else 0
        hub = {name: value for name, value in arguments.model.hub_options().items() if name != "revision"}
        trainer = self.pruning_trainer(
            **options, pruners=arguments.pruners, mask_steps=mask_steps, teacher_options=hub
        )
        trainer.score_size = self.scores if arguments.training.do_eval else dict
        for pruner in trainer.session.pruners:
            logger.info("pruning with %s: %s", pruner.name, pruner.summary())
        return self._prepared(trainer)

    def _prepared(self, trainer: Any) -> Trainer:
        """A Trainer with what all runs set."""
        trainer.in_order = self.in_order
        # Losses of the tasks are means. transformers takes them for sums over all micro-batches and processes where
        # ``forward`` has any ``**kwargs``: it would add them up, and evaluations would say several times their loss.
        trainer.model_accepts_loss_kwargs = False
        return trainer

    @property
    def head_mask(self) -> Optional[HeadMask]:
        """The heads that stay; None for a dense run."""
        return getattr(self.trainer, "head_mask", None)

    def run(self) -> dict[str, float]:
        """Train, evaluate, predict, save; returns all metrics."""
        training = self.arguments.training
        if training.do_train:
            if self.arguments.data.overwrite_output_dir and self.resume is None:
                if self.trainer.is_world_process_zero():
                    self._clear()
            outcome = self.trainer.train(resume_from_checkpoint=self._resumed())
            samples = {"train_samples": len(self.trainer.train_dataset)}
            self.report("train", {**outcome.metrics, **samples, **self.kept_metrics()})
            self.trainer.save_state()
            refuse_broken(self.trainer.accelerator.unwrap_model(self.trainer.model), self.trainer.state.global_step)
            self.save()  # before anything else can fail
        elif self.arguments.pruners:
            raise HeadPruningError("Pruning learns what to keep; add --do_train.")
        if training.do_eval:
            self.evaluate()
        if training.do_predict:
            self.predict()
        if training.do_train:
            with self._whole() as here:
                if here and self.trainer.is_world_process_zero():
                    if self._final_scores():
                        self.describe()
                    self.tell()
        return self.results

    def _resumed(self) -> "Checkpoint | str | None":
        """What the Trainer resumes: one that prunes takes what was read and checked already."""
        return self.resume if self.resume is None or self.arguments.pruners else str(self.resume.folder)

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
            kept |= counts_told(self.head_mask)
        with self._whole() as here:
            counts = session_counts(self.trainer.session) if here and self.arguments.pruners else {}
        if counts:
            numbers = sum_counts(counts).told()
            kept |= {name: number for name, number in numbers.items() if isinstance(number, int)}
        return kept

    def evaluate(self) -> None:
        """Score the validation sets."""
        self.report("eval", {**self.scores(), **self.kept_metrics()})

    def scores(self) -> dict[str, float]:
        """The metrics of the model on the validation sets."""
        raise NotImplementedError

    def predict(self) -> None:
        """Write predictions for the test sets."""
        raise NotImplementedError

    def save(self) -> None:
        """Write the model and its tokenizer; of a model whose heads were pruned, with what tells of it."""
        trainer, mask = self.trainer, self.head_mask
        if trainer.is_world_process_zero():
            for name in REPORTS:  # of a run that was here before
                (self.out / name).unlink(missing_ok=True)
        if mask is None:
            internal = bool(self.arguments.pruners)  # with the zeros of weight pruners
            with self._form():
                save_at_once(
                    trainer, self.out, lambda place: Trainer.save_model(trainer, place, _internal_call=internal)
                )
        with self._whole() as here:
            if not here or not trainer.is_world_process_zero():
                return
            if mask is not None:
                model, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
                save_pruned(model, mask, self.out, processing_class=tokenizer, form=self._form, **self._about())
            if self.arguments.pruners:
                trainer.session.save_beside(self.out)
            self._describe_the_rest()

    def _whole(self) -> ContextManager[bool]:
        """Inside the block a model that is sharded is whole in the main process."""
        session = getattr(self.trainer, "session", None)
        return whole(self.trainer.accelerator.unwrap_model(self.trainer.model), session)

    def _form(self) -> ContextManager[None]:
        """Inside the block the model is in the form in which it is stored."""
        if not self.arguments.pruners:
            return contextlib.nullcontext()
        return stored_form(self.trainer.accelerator.unwrap_model(self.trainer.model), self.trainer.session)

    def describe(self) -> None:
        """Write anew what tells of the model, with its scores."""
        if self.head_mask is not None:
            model = self.trainer.accelerator.unwrap_model(self.trainer.model)
            describe_pruned(model, self.head_mask, self.out, **self._about())
        self._describe_the_rest()

    def _describe_the_rest(self) -> None:
        """What tells of pruned weights, or of a dense model."""
        if self.arguments.of("weights") is not None:
            self._save_weight_masks()
        elif self.head_mask is None:
            model = self.trainer.accelerator.unwrap_model(self.trainer.model)
            with atomic_path(self.out / "README.md") as temporary:
                temporary.write_text(dense_card(model, self._final_scores(), self.dataset), encoding="utf-8")

    def tell(self) -> None:
        """Log what is left, and where it is."""
        mask, kept = self.head_mask, self.kept_metrics()
        if mask is not None:
            logger.info("kept heads by site:\n%s", head_table(mask))
            score = self.results.get(f"eval_{self.main_metric}")
            logger.info(
                "%s are left%s; model, mask and report are in %s",
                mask.words,
                "" if score is None else f", {self.main_metric} {score:.4f}",
                self.out,
            )
        if "weights_kept" in kept:
            logger.info(
                "%d of %d weights are left%s; masks and densities are in %s",
                kept["weights_kept"],
                kept["weights_total"],
                f", of {kept['weights_of_dense']} in the dense model" if "weights_of_dense" in kept else "",
                self.out,
            )

    def _about(self) -> dict[str, Any]:
        pruners = self.trainer.session.pruners
        return {
            "method": "+".join(pruner.name for pruner in pruners),
            "options": options_of(pruners),
            "scores": self._final_scores(),
            "dataset": self.dataset,
            "history": self._history(),
        }

    def _final_scores(self) -> dict[str, float]:
        return {name: value for name, value in self.results.items() if name.startswith("eval_")}

    def _history(self) -> list[dict[str, float]]:
        """The scores on the way and at the end."""
        return [entry for entry in self.trainer.state.log_history if "eval_loss" in entry]

    def _save_weight_masks(self) -> None:
        """Add the masks and the densities reached to the model's folder."""
        trainer = self.trainer
        save_weight_masks_and_report(
            self.out,
            trainer.accelerator.unwrap_model(trainer.model),
            trainer.session,
            scores=self._final_scores(),
            dataset=self.dataset,
            history=self._history(),
        )


def start(run: type[TaskRun], arguments: Arguments) -> dict[str, float]:
    """Set up the log, then do all that the arguments ask for; returns the metrics that ``all_results.json`` holds."""
    training = arguments.training
    shown = training.should_log and training.log_level == "passive"
    set_up(None if shown else training.get_process_log_level())
    for note in arguments.notes:
        logger.info("%s", note)
    if not sys.stderr.isatty():
        training.disable_tqdm = True  # its log, in lines, is printed instead
        no_bars()
    with contextlib.ExitStack() as stack:
        if training.should_save:
            stack.enter_context(alone_in(make_folder(training.output_dir)))
            stack.enter_context(writing(training.output_dir, also_reading=True))
        return run(arguments).run()
