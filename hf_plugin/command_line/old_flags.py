"""Spellings of transformers 3 and 4 that version 5 no longer has, and of the published scripts: read as today's."""

import argparse
import os
from dataclasses import dataclass
from typing import Any, Callable, Optional, Sequence

from transformers.hf_argparser import string_to_bool

from head_pruning import HeadPruningError
from head_pruning.files import parse_json

from .parser import FlagParser
from .published_distillation import NAMES, PRESET, PRESETS, TYPED, preset_name


@dataclass(frozen=True)
class Spelling:
    """One old flag.

    Args:
        name: the old name.
        read_as: the note's words for what it means today, or why it is ignored.
        target: the flag that it needs today; None for flags that are ignored.
        apply: writes its value into the flags that were set, by their names of today.
        kind: turns the word into the value; default: as the target does.
        only_on: nothing is written, nor noted, when it is switched off.
        several: it takes several words, which ``apply`` is given as a list.
    """

    name: str
    read_as: str
    target: Optional[str] = None
    apply: Optional[Callable[[dict[str, Any], Any], None]] = None
    kind: Optional[Callable[[str], Any]] = None
    only_on: bool = False
    several: bool = False


def _renamed(name: str, target: str) -> Spelling:
    return Spelling(name, f"--{target}", target, lambda given, value: given.update({target: value}))


def _switch(name: str, target: str, value: Any) -> Spelling:
    def apply(given: dict[str, Any], on: bool) -> None:
        given[target] = value if isinstance(value, str) else list(value)

    words = value if isinstance(value, str) else " ".join(value)
    return Spelling(name, f"--{target} {words}", target, apply, string_to_bool, only_on=True)


def _distillation(name: str, writes: str) -> Spelling:
    """A flag of the published distillation, which brings the defaults of the others along."""

    def apply(given: dict[str, Any], value: Any) -> None:
        given[writes] = value
        given[TYPED] = {**given.get(TYPED, {}), name: writes}

    if name == PRESET:
        return Spelling(name, f"what {' or '.join(PRESETS)} adds to --distill logits", "distill", apply, preset_name)
    return Spelling(name, f"--{writes}", writes, apply)


def _entry(name: str, target: str, kind: Callable[[str], Any], key: Optional[str] = None) -> Spelling:
    """An entry of a mapping that is one flag today."""
    key = key or name

    def apply(given: dict[str, Any], value: Any) -> None:
        held = given.get(target) or {}
        try:
            held = parse_json(held, dict) if isinstance(held, str) else held
        except ValueError:
            raise HeadPruningError(f"--{name} is an entry of --{target} {held}; write it into that file.") from None
        given[target] = {**held, key: value}

    return Spelling(name, f"the entry {key} of --{target}", target, apply, kind)


def _evaluate_during_training(given: dict[str, Any], on: bool) -> None:
    given["eval_strategy"] = "steps"
    given.setdefault("eval_steps", 1000)


def _warmup_ratio(given: dict[str, Any], ratio: float) -> None:
    given["warmup_ratio"] = ratio


def _logging_dir(given: dict[str, Any], folder: str) -> None:
    os.environ["TENSORBOARD_LOGGING_DIR"] = folder


def _ratio(word: str) -> float:
    try:
        if 0 <= float(word) < 1:
            return float(word)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{word} is not a share of training (from 0 to below 1)")


_APEX = "mixed precision is torch's own (--fp16, --bf16)"
_TPU = "TPUs are found by themselves"
_SHARDED = "use --fsdp or --deepspeed"
_IGNORED = {
    "fp16_opt_level": _APEX,
    "fp16_backend": _APEX,
    "half_precision_backend": _APEX,
    "tpu_num_cores": _TPU,
    "tpu_metrics_debug": _TPU,
    "use_mps_device": "the device is found by itself",
    "use_ipex": "torch has its own optimisations for CPUs",
    "jit_mode_eval": "use --torch_compile",
    "xpu_backend": "the backend follows the device, or --ddp_backend",
    "past_index": "the models of these tasks do not read their own past",
    "model_parallel": _SHARDED,
    "mp_parameters": _SHARDED,
    "sharded_ddp": _SHARDED,
    "tp_size": _SHARDED,
    "use_legacy_prediction_loop": "there is one prediction loop",
    "push_to_hub_organization": "give --hub_model_id ORGANIZATION/NAME",
    "save_safetensors": "models are always saved as safetensors",
    "ray_scope": "hyperparameter search is not part of this script",
    "include_tokens_per_second": "see --include_num_input_tokens_seen",
    "use_fast_tokenizer": "every model has one tokenizer",
    "use_auth_token": "the stored login is used, or --token",
    "pad_to_max_length": "batches are padded to their longest sentence, with the same results",
}
_DEBUGGER = {name: "no debugger is waited for" for name in ("server_ip", "server_port")}

SPELLINGS = (
    _renamed("per_gpu_train_batch_size", "per_device_train_batch_size"),
    _renamed("per_gpu_eval_batch_size", "per_device_eval_batch_size"),
    _renamed("evaluation_strategy", "eval_strategy"),
    _renamed("no_cuda", "use_cpu"),
    _renamed("gradient_checkpointing", "activation_checkpointing"),
    _renamed("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
    _renamed("torchdynamo", "torch_compile_backend"),
    _renamed("push_to_hub_model_id", "hub_model_id"),
    _renamed("push_to_hub_token", "hub_token"),
    _switch("adafactor", "optim", "adafactor"),
    _switch("group_by_length", "train_sampling_strategy", "group_by_length"),
    _switch("include_inputs_for_metrics", "include_for_metrics", ["inputs"]),
    _entry("split_batches", "accelerator_config", string_to_bool),
    _entry("dispatch_batches", "accelerator_config", string_to_bool),
    _entry("fsdp_min_num_params", "fsdp_config", int, "min_num_params"),
    _entry("fsdp_transformer_layer_cls_to_wrap", "fsdp_config", lambda word: [word], "transformer_layer_cls_to_wrap"),
    Spelling(
        "evaluate_during_training",
        "--eval_strategy steps, with --eval_steps 1000 unless given",
        "eval_strategy",
        _evaluate_during_training,
        string_to_bool,
        only_on=True,
    ),
    Spelling("warmup_ratio", "--optimizer_warmup_steps", "optimizer_warmup_steps", _warmup_ratio, _ratio),
    Spelling("logging_dir", "the variable TENSORBOARD_LOGGING_DIR", "report_to", _logging_dir, str),
    *(Spelling(name, why) for name, why in {**_IGNORED, **_DEBUGGER}.items()),
)
GLUE_SPELLINGS = (
    Spelling("do_lower_case", "the tokenizer that lies with the model knows"),
    Spelling("model_type", "the model's configuration says what it is"),
    Spelling("eval_all_checkpoints", "see --eval_strategy, which scores each of them in time"),
    _renamed("eval_step", "logging_steps"),
)
SQUAD_SPELLINGS = (
    Spelling("output_root_folder", "everything is written into --output_dir"),
    Spelling("verbose_logging", "answers are cut out of the text by their place in it, so no search can go wrong"),
    Spelling("lang_id", "only XLM has languages, and it is not answered with"),
    Spelling("threads", "the tokenizer uses all cores"),
)
TABLE_SPELLINGS = (
    Spelling("preprocessing_num_workers", "the tokenizer uses all cores"),
    Spelling("keep_in_memory", "tokenised data are read from the cache's file as they are needed"),
)
GPP_SPELLINGS = (
    Spelling(
        "do_distill",
        "--distill dfd, beside others that are named",
        "distill",
        lambda given, on: given.update(do_distill=on),
        string_to_bool,
        only_on=True,
    ),
    Spelling(
        "teacher_model_path",
        "--teacher_path",
        "teacher_path",
        lambda given, path: given.update(teacher_path=path, teacher_model_path=path),
    ),
    Spelling(
        "retrain_learning_rate",
        "--retrain_lr_factor, that rate over --learning_rate",
        "retrain_lr_factor",
        lambda given, rate: given.update(retrain_learning_rate=rate),
        float,
    ),
    Spelling("do_finetune", "the trained model is evaluated anyway (--do_eval)"),
)
#: Flags of Prune Once for All's scripts that say what is pruned, see :func:`.fields.complete_config`.
CONFIG_SPELLINGS = (
    Spelling(
        "do_prune",
        "--pruner_name gradual_magnitude, unless another is named",
        "pruner_name",
        lambda given, on: given.update(do_prune=on),
        string_to_bool,
        only_on=True,
    ),
    Spelling(
        "pruning_config",
        "the flags that this file, or the published one of this name, means",
        "pruner_name",
        lambda given, text: given.update(pruning_config=text),
        str,
    ),
    Spelling(
        "pruning_override",
        "what replaces keys of --pruning_config, as JSON",
        "pruner_name",
        lambda given, words: given.update(pruning_override=" ".join(words)),
        str,
        several=True,
    ),
)
_PREPARED = "python -m prepare.wikipedia has made the pairs, see its --help"
PRETRAINING_SPELLINGS = (
    *(_distillation(name, target) for name, target in {**NAMES, PRESET: PRESET}.items()),
    *(
        _renamed(f"dataset_cache_{ending}", "data_dir")  # an abbreviation, in the published scripts
        for ending in ("directory", "dir")
    ),
    *(
        Spelling(name, _PREPARED)
        for name in (
            *("dataset_name", "dataset_config_name", "data_process_type", "dataset_seed"),
            *("short_seq_probability", "nsp_probability", "keep_in_memory", "preprocessing_num_workers"),
            *("max_seq_length", "train_file", "validation_file"),
        )
    ),
    Spelling("datasets_name_config", _PREPARED, several=True),
    *CONFIG_SPELLINGS,
    Spelling("model_type", "the model's configuration says what it is"),
)
#: Names of models as a manual spells them.
MISSPELT = {"bert-unbase-cased": "bert-base-uncased"}
MICHEL_SPELLINGS = (
    Spelling("local_rank", "importance is measured by one process"),
    *(Spelling(name, why) for name, why in _DEBUGGER.items()),
)


def mend_names(given: dict[str, Any], notes: list[str]) -> None:
    """Write the right name of a model that manuals misspell, unless a folder is called so; a note tells of it."""
    named = given.get("model_name_or_path")
    if isinstance(named, (list, dict)):  # out of a file
        raise HeadPruningError(f"model_name_or_path is a {type(named).__name__}; give one name.")
    if named in MISSPELT and not os.path.isdir(named):
        given["model_name_or_path"] = MISSPELT[named]
        notes.append(f"--model_name_or_path {named} is read as {MISSPELT[named]}: there is no model of that name.")


def add_legacy_flags(parser: FlagParser, notes: list[str], spellings: Sequence[Spelling] = SPELLINGS) -> None:
    """Let ``parser`` accept old spellings; each that is used adds one line to ``notes``.

    A spelling whose flag of today this version of transformers does not have yet is left to transformers.
    """
    group = parser.add_argument_group("old spellings")
    for spelling in spellings:
        target = parser.action(spelling.target) if spelling.target else None
        if spelling.target and target is None:
            continue
        if parser.action(spelling.name):
            parser.drop(spelling.name)
        kind = spelling.kind or (target.type if target else str)
        ignored = spelling.apply is None
        group.add_argument(
            *dict.fromkeys((f"--{spelling.name}", f"--{spelling.name.replace('_', '-')}")),
            action=_Apply,
            spelling=spelling,
            notes=notes,
            type=kind,
            nargs="+" if spelling.several else "?" if ignored or kind is string_to_bool else None,
            const=True,
            choices=target.choices if target and spelling.kind is None else None,
            default=argparse.SUPPRESS,
            metavar="True|False" if kind is string_to_bool else "VALUE",
            help=f"ignored: {spelling.read_as}" if ignored else f"read as {spelling.read_as}",
        ).option_strings[1:] = []  # dashes are read but not shown
    debug = parser.action("debug")
    if debug is not None:  # once a flag without a value, which printed figures of TPUs
        debug.nargs = "*"


class _Apply(argparse.Action):
    """Writes an old flag's value under the names of today."""

    def __init__(self, *args: Any, spelling: Spelling, notes: list[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.spelling, self.notes = spelling, notes

    def __call__(self, parser, namespace, value, option_string=None) -> None:
        spelling = self.spelling
        if spelling.apply is None:
            self.notes.append(f"--{spelling.name} is ignored: {spelling.read_as}.")
            return
        if value or not spelling.only_on:
            spelling.apply(vars(namespace), value)
            self.notes.append(f"--{spelling.name} is read as {spelling.read_as}.")
