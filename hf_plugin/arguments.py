"""The command lines of the GLUE scripts: one group of flags per purpose, and one per registered pruning method."""

import dataclasses
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Iterable, Mapping, Optional, Sequence

from transformers import TrainingArguments

from head_pruning import HeadPruningError, methods
from head_pruning.registry import Method, get_method, implied_method, option_fields, owners

from .defaults import complete_options
from .flags import FlagParser, flag_group
from .legacy import MICHEL_SPELLINGS, add_legacy_flags


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


@dataclass(frozen=True)
class DataArguments:
    """The task, and what the script writes beside the model."""

    task_name: str = field(
        metadata={"help": "GLUE task: CoLA, SST-2, MRPC, STS-B, QQP, MNLI, QNLI, RTE or WNLI, in any spelling"}
    )
    data_dir: Optional[str] = field(
        default=None, metadata={"help": "the task's folder in GLUE's TSV layout; without it the hub's copy is loaded"}
    )
    max_seq_length: int = field(
        default=128, metadata={"help": "cut examples to this many tokens (batches are padded to their longest)"}
    )
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


@dataclass(frozen=True)
class Arguments:
    """What a command line asks for.

    Args:
        model: the model to start from.
        data: the task, and what the script writes.
        training: transformers' own.
        method: the pruning method; None to train the dense model.
        options: all options of the method, so that ``hf_plugin.defaults.pruner(method.name, **options)`` builds it.
        notes: one line for each old spelling that was used, to be logged.
    """

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    method: Optional[Method]
    options: dict[str, Any]
    notes: list[str]


@dataclass(frozen=True)
class _Script:
    description: str
    methods: Optional[tuple[str, ...]]  # None: all
    needs: tuple[str, ...] = ("output_dir",)
    defaults: Mapping[str, Any] = field(default_factory=dict)


_SCRIPTS = {
    "run_dsp": _Script(
        "Prune heads on a GLUE task with DSP (Li et al. 2021), or with its straight-through variant (--use_ste).",
        ("dsp", "ste"),
        needs=("output_dir", "num_of_heads"),
    ),
    "run_voita": _Script(
        "Prune heads on a GLUE task with the L0 gates of Voita et al. 2019.", ("voita",), defaults={"l0_penalty": 0.5}
    ),
    "run_glue": _Script(
        "Fine-tune on a GLUE task: dense, or with the pruning method that --pruner names or the options imply.", None
    ),
}


def parse(argv: Sequence[str], script: str) -> Arguments:
    """Read a command line; ``argv`` may start with a JSON or YAML file of flags' names and values.

    Args:
        argv: the words after the script's name.
        script: ``run_dsp`` (DSP or STE), ``run_voita`` or ``run_glue`` (any method, or none).

    Raises:
        HeadPruningError: a flag is missing, unknown, has an impossible value, or belongs to another method.
        SystemExit: ``--help``.
    """
    notes: list[str] = []
    parser = _parser(script)
    add_legacy_flags(parser, notes)
    given = parser.parse_set(argv)
    if given.get("debug") == []:
        del given["debug"]
        notes.append("--debug without a value is ignored: it printed figures of TPUs.")
    _require_positive(given, "max_seq_length", "max_train_samples", "max_eval_samples")
    method = _method(given, script)
    options = {}
    if method is not None:
        mine = _subset(given, dataclasses.fields(method.config))
        options = complete_options(method.name, {**_SCRIPTS[script].defaults, **mine})
    return Arguments(
        model=ModelArguments(**_subset(given, dataclasses.fields(ModelArguments))),
        data=DataArguments(**_subset(given, dataclasses.fields(DataArguments))),
        training=_training_arguments(_subset(given, dataclasses.fields(TrainingArguments))),
        method=method,
        options=options,
        notes=notes,
    )


def _subset(given: Mapping[str, Any], fields: Iterable[dataclasses.Field]) -> dict[str, Any]:
    return {f.name: given[f.name] for f in fields if f.name in given}


def _training_arguments(values: Mapping[str, Any]) -> TrainingArguments:
    try:
        return TrainingArguments(**values)
    except (ValueError, TypeError, ImportError, NotImplementedError, OSError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise HeadPruningError(f"The training flags do not fit: {reason}.") from error


def _require_positive(given: Mapping[str, Any], *names: str) -> None:
    for name in names:
        if given.get(name, 1) < 1:
            raise HeadPruningError(f"--{name} is {given[name]}; it must be 1 or more.")


def _method(given: Mapping[str, Any], script: str) -> Optional[Method]:
    """The method asked for. Raises HeadPruningError when a flag was set that is not its."""
    if script == "run_glue":
        pruner = given.get("pruner")
        method = get_method(pruner) if pruner else implied_method(SimpleNamespace(**given))
    else:
        names = _SCRIPTS[script].methods
        method = get_method("ste" if "ste" in names and given.get("use_ste") else names[0])
    mine = set(option_fields([method.name])) if method else set()
    for name in option_fields():
        # What was switched off may stand in a file of arguments.
        if name in given and name not in mine and given[name] not in (False, None):
            raise HeadPruningError(_foreign(name, method, script))
    if method is None and given.get("intermediate_masks"):
        raise HeadPruningError("--intermediate_masks saves head masks, but no pruner is chosen; drop it or prune.")
    return method


def _foreign(option: str, method: Optional[Method], script: str) -> str:
    theirs = owners(option)
    if method is None:
        chosen, cure = "no pruner is chosen", f"add --pruner {theirs[0]}"
    else:
        chosen = f"the pruner is {method.name}"
        if script == "run_dsp" and "dsp" in theirs:
            cure = "leave out --use_ste"
        else:
            cure = f"choose {'--pruner' if script == 'run_glue' else 'run_glue.py --pruner'} {theirs[0]}"
    return f"--{option} belongs to {', '.join(theirs)}, but {chosen}; drop it or {cure}."


def _parser(script: str) -> FlagParser:
    names = _SCRIPTS[script].methods or tuple(sorted(methods()))
    run = [f for f in dataclasses.fields(DataArguments) if f.name in ("overwrite_output_dir", "intermediate_masks")]
    data = [f for f in dataclasses.fields(DataArguments) if f not in run]
    if script == "run_glue":
        run = [*dataclasses.fields(_Pruner), *run]
    training = type("Training", (TrainingArguments,), {"_argument_group_name": "training"})
    host = [
        flag_group("model", dataclasses.fields(ModelArguments)),
        flag_group("data", data),
        flag_group("run", run),
        training,
    ]
    _refuse_clashes({f.name for group in host for f in dataclasses.fields(group)})
    parser = FlagParser(
        script,
        [*host, *_method_groups(names)],
        _SCRIPTS[script].description,
        needs=_SCRIPTS[script].needs,
        defaults=_shown_defaults(script, names),
    )
    for option in option_fields():
        if not set(owners(option)) & set(names):
            parser.hide(option)
    return parser


@dataclass(frozen=True)
class _Pruner:
    pruner: Optional[str] = field(
        default=None, metadata={"help": "pruning method by its registered name; default: the one that the flags imply"}
    )


def _refuse_clashes(taken: set[str]) -> None:
    for option in option_fields():
        if option in taken:
            raise HeadPruningError(
                f"The option {option} of the pruner {owners(option)[0]} is also a flag of the script; rename it."
            )


def _method_groups(names: Sequence[str]) -> list[type]:
    """One group per method, and one for what several have; also of methods beyond ``names``, to be refused by name."""
    several = []
    for option, found in option_fields().items():
        here = [owner for owner in owners(option) if owner in names]
        if len(owners(option)) > 1:
            several.append(_field(found, f" [{', '.join(here)}]"))
    groups = [flag_group("options of several pruners", several)]
    for name, method in sorted(methods().items()):
        own = [_field(found) for found in dataclasses.fields(method.config) if owners(found.name) == [name]]
        summary = (method.pruner.__doc__ or "").strip().partition("\n")[0].rstrip(".")
        groups.append(flag_group(f"pruner {name}" + (f" ({summary})" if summary else ""), own))
    return groups


def _field(found: dataclasses.Field, more: str = "") -> dataclasses.Field:
    copy = dataclasses.field(
        default=found.default, metadata={"help": found.metadata["help"].replace("%", "%%") + more}
    )
    copy.name, copy.type = found.name, found.type
    return copy


def _shown_defaults(script: str, names: Sequence[str]) -> dict[str, Any]:
    """Each option's default in this script; where methods differ, the text that says so."""
    values: dict[str, dict[str, list[str]]] = {}
    for name in names:
        completed = complete_options(name, _SCRIPTS[script].defaults)
        for option, value in completed.items():
            values.setdefault(option, {}).setdefault(value, []).append(name)
    return {
        option: next(iter(found)) if len(found) == 1 else ", ".join(f"{v} ({', '.join(o)})" for v, o in found.items())
        for option, found in values.items()
    }


@dataclass(frozen=True, kw_only=True)
class MichelArguments(ModelArguments):
    """What a command line of ``run_michel`` asks for."""

    task_name: str = field(metadata={"help": "GLUE task: CoLA, MRPC, MNLI, ... in any spelling"})
    data_dir: Optional[str] = field(
        default=None, metadata={"help": "the task's folder in GLUE's TSV layout; without it the hub's copy is loaded"}
    )
    output_dir: str = field(metadata={"help": "folder for the rounds and their masks"})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "start anew; without it a run goes on after its last finished round"}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "tokenise again what is in the cache"})
    max_seq_length: int = field(default=128, metadata={"help": "cut examples to this many tokens"})
    batch_size: int = field(default=32, metadata={"help": "examples per batch, for importance and for scores"})
    data_subset: int = field(
        default=-1, metadata={"help": "score rounds on the first so many validation examples only; -1: all"}
    )
    metric_name: Optional[str] = field(
        default=None, metadata={"help": "metric that scores a round; default: the task's main one"}
    )
    seed: int = field(default=42, metadata={"help": "seed"})
    no_cuda: bool = field(default=False, metadata={"help": "run on the CPU", "aliases": ["--use_cpu"]})
    num_of_heads: int = field(default=12, metadata={"help": "heads to remove per round"})
    exact_pruning: bool = field(default=False, metadata={"help": "measure the importance anew after every round"})
    dont_normalize_importance_by_layer: bool = field(
        default=False, metadata={"help": "do not divide a layer's importance by its L2 norm"}
    )
    dont_normalize_global_importance: bool = field(
        default=False, metadata={"help": "do not scale importance to 0..1 (the ranking is the same)"}
    )
    per_example: bool = field(
        default=False,
        metadata={
            "help": "sum the absolute derivatives of single examples, as in the paper; without it those of batches, "
            "as the published code does"
        },
    )
    notes: list[str] = field(default_factory=list)


def parse_michel(argv: Sequence[str]) -> MichelArguments:
    """Read a command line of ``run_michel``; ``argv`` may start with a JSON or YAML file.

    Raises:
        HeadPruningError: a flag is missing, unknown, or has an impossible value.
        SystemExit: ``--help``.
    """
    notes: list[str] = []
    fields = {f.name: f for f in dataclasses.fields(MichelArguments) if f.name != "notes"}
    model = [f.name for f in dataclasses.fields(ModelArguments)]
    pruning = ["num_of_heads", *list(fields)[list(fields).index("exact_pruning") :]]
    groups = {
        "model": model,
        "data and run": [name for name in fields if name not in (*model, *pruning)],
        "pruning": pruning,
    }
    parser = FlagParser(
        "run_michel",
        [flag_group(title, [fields[name] for name in names]) for title, names in groups.items()],
        "Prune the heads of a fine-tuned model by their importance (Michel et al. 2019), without training.",
    )
    add_legacy_flags(parser, notes, MICHEL_SPELLINGS)
    given = parser.parse_set(argv)
    _require_positive(given, "max_seq_length", "batch_size", "num_of_heads")
    if given.get("data_subset", -1) != -1:
        _require_positive(given, "data_subset")
    return MichelArguments(**_subset(given, fields.values()), notes=notes)
