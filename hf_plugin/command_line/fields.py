"""What the command lines of the scripts can say of models and data, as one dataclass per script."""

import math
from dataclasses import dataclass, field
from typing import Any, Optional

from head_pruning import HeadPruningError
from head_pruning.files import parse_json

from .published_distillation import complete_distillation

#: Flags of transformers that a method may have as an option: one flag, which a chosen method that has the option takes
#: for its own; the flag of the other name is always transformers'.
SHARED = {"warmup_steps": "optimizer_warmup_steps"}


@dataclass(frozen=True)
class ModelArguments:
    """The model to start from."""

    model_name_or_path: str = field(metadata={"help": "folder or hub name of the model to start from"})
    config_name: Optional[str] = field(
        default=None, metadata={"help": "folder or hub name of the configuration, if it is not the model's"}
    )
    tokenizer_name: Optional[str] = field(
        default=None, metadata={"help": "folder or hub name of the tokenizer, if it is not the model's"}
    )
    cache_dir: Optional[str] = field(
        default=None, metadata={"help": "folder for downloads and tokenised data, if not the usual ones"}
    )
    model_revision: str = field(default="main", metadata={"help": "branch, tag or commit of a model on the hub"})
    token: Optional[str] = field(default=None, metadata={"help": "token for the hub, if not that of the stored login"})

    def hub_options(self) -> dict[str, Any]:
        """What ``from_pretrained`` takes of this beside the name."""
        return {"cache_dir": self.cache_dir, "revision": self.model_revision, "token": self.token}


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """What every script says of its data, and of what it writes beside the model."""

    overwrite_cache: bool = field(default=False, metadata={"help": "tokenise again what is in the cache"})
    max_train_samples: Optional[int] = field(
        default=None, metadata={"help": "train on the first so many examples only"}
    )
    max_eval_samples: Optional[int] = field(
        default=None, metadata={"help": "evaluate on the first so many examples of each validation set only"}
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "start anew in an output_dir that is in use; without it a run is resumed from its last "
            "checkpoint, and a folder that holds a model is refused"
        },
    )
    intermediate_masks: bool = field(
        default=False, metadata={"help": "save the head mask every 1000 updates and at the end of training"}
    )


@dataclass(frozen=True, kw_only=True)
class GlueArguments(DataArguments):
    """A GLUE task."""

    task_name: str = field(
        metadata={"help": "GLUE task: CoLA, SST-2, MRPC, STS-B, QQP, MNLI, QNLI, RTE or WNLI, in any spelling"}
    )
    data_dir: Optional[str] = field(
        default=None, metadata={"help": "the task's folder in GLUE's TSV layout; without it the hub's copy is loaded"}
    )
    max_seq_length: int = field(
        default=128, metadata={"help": "cut examples to this many tokens (batches are padded to their longest)"}
    )


@dataclass(frozen=True, kw_only=True)
class SquadArguments(DataArguments):
    """Question answering on SQuAD."""

    model_type: Optional[str] = field(
        default=None, metadata={"help": "architecture that the model must have, such as bert or deberta"}
    )
    do_lower_case: bool = field(
        default=False,
        metadata={"help": "lower the case of the text; ignored when the model's vocabulary has capitals"},
    )
    data_dir: Optional[str] = field(
        default=None,
        metadata={
            "help": "folder with train-v1.1.json and dev-v1.1.json (or v2.0); without it and the two files below the "
            "hub's copy is loaded"
        },
    )
    train_file: Optional[str] = field(
        default=None, metadata={"help": "file to train on, in data_dir or elsewhere, if it has another name"}
    )
    predict_file: Optional[str] = field(
        default=None, metadata={"help": "file to evaluate on, in data_dir or elsewhere, if it has another name"}
    )
    version_2_with_negative: bool = field(
        default=False, metadata={"help": "SQuAD v2.0: some questions have no answer in their text"}
    )
    null_score_diff_threshold: float = field(
        default=0.0,
        metadata={"help": "v2.0: give no answer where its score beats the best answer's by more than this"},
    )
    max_seq_length: int = field(default=384, metadata={"help": "tokens of question and text together in one window"})
    doc_stride: int = field(
        default=128, metadata={"help": "longer texts are read in windows that start every so many tokens"}
    )
    max_query_length: int = field(default=64, metadata={"help": "cut questions to this many tokens"})
    n_best_size: int = field(
        default=20, metadata={"help": "starts and ends tried per window, and answers listed per question"}
    )
    max_answer_length: int = field(default=30, metadata={"help": "tokens of the longest answer"})
    eval_all_checkpoints: bool = field(
        default=False, metadata={"help": "evaluate every checkpoint in output_dir too, after training"}
    )

    #: The sizes among them.
    SIZES = ("max_seq_length", "doc_stride", "max_query_length", "n_best_size", "max_answer_length")


@dataclass(frozen=True, kw_only=True)
class PretrainingArguments(DataArguments):
    """Masked words and next sentences on segment pairs."""

    data_dir: str = field(metadata={"help": "folder of segment pairs, as python -m prepare.wikipedia makes it"})
    mlm_probability: float = field(default=0.15, metadata={"help": "share of the words that are masked"})
    whole_word_mask: bool = field(
        default=False, metadata={"help": "mask whole words, not single tokens", "aliases": ["--use_wwm"]}
    )
    validation_split_percentage: float = field(
        default=5.0,
        metadata={"help": "share of the documents that is kept back for evaluation, as the pairs were made; 0: none"},
    )


def complete_config(given: dict[str, Any], notes: list[str]) -> None:
    """Write the flags that a configuration of Prune Once for All means; those that were set win."""
    do_prune, config, override = (given.pop(f, None) for f in ("do_prune", "pruning_config", "pruning_override"))
    if override and not config:
        raise HeadPruningError("--pruning_override replaces keys of --pruning_config, which is not given; give it.")
    if config:
        from ..training.pruning_config import as_flags, read_config

        try:
            changed = parse_json(override or "{}", dict)
        except ValueError as error:
            raise HeadPruningError(f"--pruning_override is no JSON object ({error}); correct it.") from error
        given.update({**as_flags(read_config(config, **changed)), **given})
    elif do_prune:
        given.setdefault("pruner_name", "gradual_magnitude")


def complete_pretraining(given: dict[str, Any], notes: list[str]) -> None:
    """Read the published script's flags: of a teacher, and its configurations of pruning."""
    complete_config(given, notes)
    complete_distillation(given, notes)


@dataclass(frozen=True, kw_only=True)
class TableArguments(DataArguments):
    """A task whose data are tables: a user's files, or a data set of the hub."""

    dataset_name: Optional[str] = field(
        default=None, metadata={"help": "data set on the hub, or a folder with one, for what no file is given"}
    )
    dataset_config_name: Optional[str] = field(default=None, metadata={"help": "its configuration"})
    train_file: Optional[str] = field(
        default=None, metadata={"help": "rows to train on: JSON lines, CSV or parquet (.json, .jsonl, .csv, .parquet)"}
    )
    validation_file: Optional[str] = field(default=None, metadata={"help": "rows to evaluate on, likewise"})
    max_seq_length: int = field(
        default=128, metadata={"help": "cut examples to this many tokens (batches are padded to their longest)"}
    )


@dataclass(frozen=True, kw_only=True)
class NerArguments(TableArguments):
    """Token classification."""

    test_file: Optional[str] = field(default=None, metadata={"help": "rows to predict, likewise; labels may lack"})
    task_name: str = field(
        default="ner", metadata={"help": "ner, pos or chunk: the labels are in the column TASK_tags"}
    )
    text_column_name: str = field(default="tokens", metadata={"help": "column of the lists of words"})
    label_column_name: Optional[str] = field(
        default=None, metadata={"help": "column of the lists of labels, if it has another name"}
    )
    label_all_tokens: bool = field(
        default=False, metadata={"help": "train on the label of a word at all of its tokens, not at the first alone"}
    )
    return_entity_level_metrics: bool = field(default=False, metadata={"help": "score each kind of entity, too"})


@dataclass(frozen=True, kw_only=True)
class SwagArguments(TableArguments):
    """Multiple choice."""


def complete_gpp(given: dict[str, Any], notes: list[str]) -> None:
    """Read the published script's flags of a teacher and of retraining's learning rate, and score every epoch."""
    distill, teacher = given.pop("do_distill", False), given.pop("teacher_model_path", None)
    named = [name.strip() for name in str(given.get("distill") or "").lower().split(",") if name.strip()]
    if distill and "dfd" not in named:
        given["distill"] = ",".join(["dfd", *named])
    elif teacher and not any(flag.startswith("distill") for flag in given):
        raise HeadPruningError("--teacher_model_path is read with --do_distill only; add --do_distill, or drop it.")
    rate = given.pop("retrain_learning_rate", None)
    if rate is not None:
        if not 0 < rate < math.inf:
            raise HeadPruningError(f"--retrain_learning_rate is {rate}; it must be a number above 0.")
        if given.get("retrain_lr_factor") is not None:
            raise HeadPruningError("--retrain_learning_rate and --retrain_lr_factor say the same; drop one of them.")
        if not given.get("learning_rate", 1.0) > 0:
            raise HeadPruningError(
                "--retrain_learning_rate is read as a factor on --learning_rate, which must be above 0; raise it."
            )
        given["retrain_lr_factor"] = rate / given.get("learning_rate", 5e-5)
    if "eval_strategy" not in given and given.get("do_eval"):
        given["eval_strategy"] = "epoch"
        notes.append("the model is scored after every epoch, unless --eval_strategy says otherwise.")


def complete_squad(given: dict[str, Any], notes: list[str]) -> None:
    """Write into the flags that were set what run_squad's say of transformers' own; each adds a line to ``notes``."""
    complete_config(given, notes)
    if given.get("eval_steps") and "eval_strategy" not in given:
        given["eval_strategy"] = "steps"
        notes.append("--eval_steps is read as --eval_strategy steps too.")
    if given.pop("do_predict", False):
        given["do_eval"] = True
        notes.append("--do_predict is read as --do_eval: the answers are written whenever the model is evaluated.")
