"""One run on SQuAD: fine-tune, prune or both; evaluate, write the answers, and save what came out."""

import logging
import re
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np
from datasets import Dataset
from tokenizers import normalizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    DataCollatorWithPadding,
    EvalPrediction,
)

from head_pruning import HeadPruningError

from ..command_line.arguments import Arguments
from ..command_line.fields import ModelArguments, SquadArguments
from ..saving.notices import quiet_saving
from ..scripts.models import check_twin, give_padding, load_model, load_tokenizer
from ..scripts.run import TaskRun, first_examples, loading, start
from ..training.checkpoints import whole_checkpoints
from .answers import find_answers
from .features import TEXT_COLUMNS, make_features
from .metrics import squad_scores
from .reading import SPLITS, VERSIONS, SquadVersion, from_squad_hub, hub_table, read_squad

logger = logging.getLogger(__name__)


def load_pieces(
    model_args: ModelArguments,
    data: SquadArguments,
    takes_new: Callable[[str], Any] = lambda tensor: None,
    fits: Optional[Callable[[nn.Module], Any]] = None,
) -> tuple[Any, Any]:
    """The tokenizer and the question answering model.

    Args:
        model_args: the model's and the tokenizer's names.
        data: the data's options.
        takes_new: see :func:`hf_plugin.scripts.models.load_model`.
        fits: raises HeadPruningError for what cannot be done to a model like the one it is given; called, with one
            without weights, before the weights are loaded.

    Raises:
        HeadPruningError: the model or its tokenizer cannot be loaded, it is not of the type that was asked for, or it
            cannot pad.
    """
    name, hub = model_args.model_name_or_path, model_args.hub_options()
    with loading(name):
        config = AutoConfig.from_pretrained(model_args.config_name or name, **hub)
        if data.model_type and _family(data.model_type) != _family(config.model_type):
            raise HeadPruningError(
                f"{name} is of the type {config.model_type}, not {data.model_type}; drop --model_type or give another "
                f"model."
            )
        config.num_labels = 2  # a classifier's folder may say another number; the outputs here are start and end
        tokenizer = load_tokenizer(model_args)
        if fits is not None:
            check_twin(AutoModelForQuestionAnswering, config, fits)
        model, outputs = load_model(AutoModelForQuestionAnswering, name, takes_new, config=config, **hub)
        if outputs is not None:
            raise HeadPruningError(
                f"{name} has {outputs} outputs, but SQuAD needs a start and an end; give another model."
            )
        if data.do_lower_case and tokenizer.is_fast and not _lowers(tokenizer):
            if _has_capitals(tokenizer):
                logger.warning("--do_lower_case is ignored: the model's vocabulary has capitals, so it can read them.")
            else:
                tokenizer = load_tokenizer(model_args, do_lower_case=True)
                _make_lower(tokenizer)
    give_padding(tokenizer, model)
    tokenizer.padding_side = "right"  # so that a token's place in its window is its place in the batch
    return tokenizer, model


def _family(model_type: str) -> str:
    """``deberta`` for deberta, deberta-v2 and DeBERTaV3: their versions differ in the folder's own configuration."""
    return re.sub(r"v\d+$", "", re.sub(r"[-_ ]", "", model_type.lower()))


def _lowers(tokenizer: Any) -> bool:
    normalizer = tokenizer.backend_tokenizer.normalizer
    return normalizer is not None and normalizer.normalize_str("A") == "a"


def _has_capitals(tokenizer: Any) -> bool:
    special = set(tokenizer.get_added_vocab()) | set(tokenizer.all_special_tokens)
    return any(re.search("[A-Z]", token) for token in tokenizer.get_vocab() if token not in special)


def _make_lower(tokenizer: Any) -> None:
    """Make a tokenizer lower the case whose class does not know ``do_lower_case``."""
    if not _lowers(tokenizer):
        backend = tokenizer.backend_tokenizer
        first = [] if backend.normalizer is None else [backend.normalizer]
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *first])


class SquadRun(TaskRun):
    """The steps of one run on SQuAD."""

    in_order = True  # the logits' rows are the windows'
    main_metric = "f1"

    def __init__(self, arguments: Arguments) -> None:
        super().__init__(arguments)
        assert isinstance(arguments.data, SquadArguments)  # as run_squad parses them
        data, training = arguments.data, arguments.training
        self.data = data
        if data.eval_all_checkpoints and arguments.pruners:
            raise HeadPruningError(
                "--eval_all_checkpoints scores whole models, but checkpoints of pruning hold all weights; give "
                "--eval_steps to score the pruned model on its way."
            )
        self.version: SquadVersion = VERSIONS["2.0" if data.version_2_with_negative else "1.1"]
        self.dataset = f"SQuAD v{self.version.number}"
        most = {"train": data.max_train_samples, "validation": data.max_eval_samples}
        with training.main_process_first(desc="reading"):
            rows = {split: first_examples(self._rows(split), most[split]) for split in SPLITS if split in self.splits}
        tokenizer, model = load_pieces(arguments.model, data, self.takes_new, self.fits)
        self.rows: Any = rows.get("validation")
        self.windows: Any = None
        train = None
        with training.main_process_first(desc="tokenising"):
            if "train" in rows:
                train = self._windows(rows["train"], tokenizer, "train")
            if self.rows is not None:
                self.windows = self._windows(self.rows, tokenizer, "validation")
        #: Ending of the names of the files that the next evaluation writes; None: the step, and without n-best lists.
        self._name: Optional[str] = None
        self.trainer = self.build_trainer(
            model=model,
            train_dataset=train,
            eval_dataset=self.windows and self.windows.remove_columns(TEXT_COLUMNS),
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if training.fp16 else None),
            compute_metrics=self._scores,
        )

    def _rows(self, split: str) -> Dataset:
        data = self.data
        i = SPLITS.index(split)
        name = (data.train_file, data.predict_file)[i]
        if name is None and data.data_dir is None:
            table = hub_table(self.version, split, cache_dir=self.arguments.model.cache_dir)
            return from_squad_hub(table, self.version, f"The hub's {self.version.repository} ({split})")
        inside = Path(data.data_dir or "") / (name or self.version.files[i])
        path = Path(name) if name and not inside.exists() and Path(name).exists() else inside
        return read_squad(path, self.version.unanswerable)

    def _windows(self, rows: Dataset, tokenizer: Any, split: str) -> Dataset:
        data = self.data
        return make_features(
            rows,
            tokenizer,
            max_seq_length=data.max_seq_length,
            doc_stride=data.doc_stride,
            max_query_length=data.max_query_length,
            with_text=split == "validation",
            cache_dir=self.arguments.model.cache_dir,
            overwrite_cache=data.overwrite_cache,
            name=split,
        )

    def _scores(self, outputs: EvalPrediction) -> dict[str, float]:
        """Answers and scores from a Trainer's outputs for all windows; writes the answers."""
        data = self.data
        if not np.array_equal(outputs.label_ids[0], self.windows["start_positions"][:]):
            raise HeadPruningError("The Trainer evaluated the windows in another order; leave out what reorders them.")
        answers = find_answers(
            self.rows,
            self.windows,
            *outputs.predictions[:2],
            n_best_size=data.n_best_size,
            max_answer_length=data.max_answer_length,
            version_2=self.version.unanswerable,
            null_score_diff_threshold=data.null_score_diff_threshold,
        )
        if self.trainer.is_world_process_zero():
            name = str(self.trainer.state.global_step) if self._name is None else self._name
            written = answers.write(self.out, name, with_nbest=self._name is not None)
            logger.info("answers are in %s", written)
        return squad_scores(
            answers.predictions,
            dict(zip(self.rows["id"], self.rows["answers"])),
            version_2=self.version.unanswerable,
            null_odds=answers.null_odds or None,
            answered=answers.answered or None,
        )

    def evaluate(self) -> None:
        """Score the model, and the checkpoints if asked for."""
        super().evaluate()
        if self.data.eval_all_checkpoints:
            self.report("eval", self._evaluate_checkpoints())

    def scores(self) -> dict[str, float]:
        return {**self._evaluate("", "eval"), "eval_samples": len(self.windows)}

    def _evaluate(self, name: str, prefix: str) -> dict[str, float]:
        self._name = name
        try:
            return self.trainer.evaluate(metric_key_prefix=prefix)
        finally:
            self._name = None

    def _evaluate_checkpoints(self) -> dict[str, float]:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        with quiet_saving(model):  # nothing is written
            final = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
        metrics: dict[str, float] = {}
        for found in reversed(list(whole_checkpoints(self.out))):
            with loading(str(found.folder)):
                stored, _ = load_model(AutoModelForQuestionAnswering, str(found.folder))
            model.load_state_dict(stored.state_dict())
            metrics |= self._evaluate(str(found.step), f"eval_{found.step}")
        model.load_state_dict(final)
        return metrics


def run(arguments: Arguments) -> dict[str, float]:
    """Do all that the arguments ask for; returns the metrics that ``all_results.json`` holds."""
    return start(SquadRun, arguments)
