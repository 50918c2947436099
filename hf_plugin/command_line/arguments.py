"""The command lines of the scripts: one group of flags per purpose, and one per registered pruning method."""

import dataclasses
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Callable, Iterable, Mapping, Optional, Sequence

from transformers import TrainingArguments

from head_pruning import HeadPruningError, Pruner, methods
from head_pruning.registry import Method, build_pruner, get_method, implied_method, option_fields, owners

from ..training.optimizers import OPTIMIZERS
from ..training.weights import refuse_sharded_weights
from .defaults import complete_options
from .fields import DataArguments, GlueArguments, ModelArguments, SquadArguments, complete_squad
from .old_flags import MICHEL_SPELLINGS, SPELLINGS, SQUAD_SPELLINGS, Spelling, add_legacy_flags
from .parser import FlagParser, flag_group
from .presets import PRESETS, add_preset

# Options of pruners that are also flags of transformers: one flag, which a pruner that has the option takes for its
# own; the flag of the other name is always transformers'.
_SHARED = {"warmup_steps": "optimizer_warmup_steps"}


@dataclass(frozen=True)
class Arguments:
    """What a command line asks for.

    Args:
        model: the model to start from.
        data: the task, and what the script writes (GlueArguments or SquadArguments).
        training: transformers' own.
        method: the method that prunes heads; None for none.
        options: all its options, so that ``hf_plugin.command_line.defaults.pruner(method.name, **options)`` builds it.
        notes: one line for each old spelling that was used, to be logged.
        weight_method: the method that prunes weights; None for none.
        weight_options: all its options.
        optimizer: ``adamw`` (what ``training.optim`` says) or ``adamax``.
    """

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    method: Optional[Method]
    options: dict[str, Any]
    notes: list[str]
    weight_method: Optional[Method] = None
    weight_options: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "adamw"

    @property
    def chosen(self) -> list[tuple[Method, dict[str, Any]]]:
        """The methods with their options: that of heads, then that of weights; empty to train the dense model."""
        found = [(self.method, self.options), (self.weight_method, self.weight_options)]
        return [(method, options) for method, options in found if method is not None]

    def pruners(self) -> list[Pruner]:
        """New pruners, of all methods that were chosen."""
        return [build_pruner(method, SimpleNamespace(**options)) for method, options in self.chosen]


@dataclass(frozen=True)
class _Script:
    description: str
    methods: Optional[tuple[str, ...]]  # None: all
    needs: tuple[str, ...] = ("output_dir",)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    data: type[DataArguments] = GlueArguments
    sizes: tuple[str, ...] = ("max_seq_length",)
    training_defaults: Mapping[str, Any] = field(default_factory=dict)
    # What the script's flags say of transformers' own.
    complete: Callable[[dict[str, Any], list[str]], None] = lambda given, notes: None
    spellings: tuple[Spelling, ...] = SPELLINGS
    # Whether --warmup_steps is a pruner's even where the pruner has none.
    own_warmup: bool = False


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
    "run_squad": _Script(
        "Fine-tune on SQuAD: dense, or with the pruning method that --pruner_name names or the options imply.",
        None,
        data=SquadArguments,
        sizes=SquadArguments.SIZES,
        training_defaults={"per_device_train_batch_size": 16, "per_device_eval_batch_size": 64},
        complete=complete_squad,
        spellings=(*SPELLINGS, *SQUAD_SPELLINGS),
        own_warmup=True,
    ),
}


def parse(argv: Sequence[str], script: str) -> Arguments:
    """Read a command line; ``argv`` may start with a JSON or YAML file of flags' names and values.

    Args:
        argv: the words after the script's name.
        script: ``run_dsp`` (DSP or STE), ``run_voita``, ``run_glue`` or ``run_squad`` (any method, or none).

    Raises:
        HeadPruningError: a flag is missing, unknown, has an impossible value, belongs to another method or contradicts
            another flag.
        SystemExit: ``--help``.
    """
    about, notes = _SCRIPTS[script], []
    parser = _parser(script)
    add_legacy_flags(parser, notes, about.spellings)
    given = parser.parse_set(argv)
    add_preset(given, notes)
    if given.get("debug") == []:
        del given["debug"]
        notes.append("--debug without a value is ignored: it printed figures of TPUs.")
    _require_positive(given, *about.sizes, "max_train_samples", "max_eval_samples")
    about.complete(given, notes)
    method, weight_method = _methods(given, script)
    optimizer = _optimizer(given)
    if weight_method is not None:
        refuse_sharded_weights(given.get("fsdp"), given.get("deepspeed"))
    training = {**about.training_defaults, **_subset(given, dataclasses.fields(TrainingArguments))}
    training["warmup_steps"] = _warmup(given, weight_method, script)
    training.pop("warmup_ratio", None)  # a field of transformers 5.0 too
    options, weight_options = {}, {}
    if method is not None:
        mine = _subset(given, dataclasses.fields(method.config))
        options = complete_options(method.name, {**about.defaults, **mine})
    if weight_method is not None:
        fields = dataclasses.fields(weight_method.config)
        weight_options = {f.name: f.default for f in fields} | _subset(given, fields)
        for shared, ours in _SHARED.items():
            if shared in weight_options:
                notes.append(
                    f"--{shared} ({weight_options[shared]:g}) is that of the pruner {weight_method.name}; the "
                    f"learning rate's is --{ours} ({training[shared]:g})."
                )
    arguments = Arguments(
        model=ModelArguments(**_subset(given, dataclasses.fields(ModelArguments))),
        data=about.data(**_subset(given, dataclasses.fields(about.data))),
        training=_training_arguments(training),
        method=method,
        options=options,
        notes=notes,
        weight_method=weight_method,
        weight_options=weight_options,
        optimizer=optimizer,
    )
    for pruner in arguments.pruners():
        pruner.check_options()
    return arguments


def _optimizer(given: Mapping[str, Any]) -> str:
    name = given.get("optimizer", OPTIMIZERS[0])
    if name != OPTIMIZERS[0] and given.get("optim") is not None:
        raise HeadPruningError(
            f"--optimizer {name} and --optim {given['optim']} are two optimizers; drop one of them."
        )
    return name


def _warmup(given: dict[str, Any], method: Optional[Method], script: str) -> float:
    """The learning rate's warm-up. ``warmup_steps`` stays in ``given`` if it is the weight pruner's."""
    steps = given.get("optimizer_warmup_steps")
    if method is None or "warmup_steps" not in _names(method):
        first = given.pop("warmup_steps", None)
        if first and _SCRIPTS[script].own_warmup:
            reason = f"{method.name} has none" if method else "no pruner of weights is chosen"
            raise HeadPruningError(
                f"--warmup_steps is the weight pruner's warm-up in {script}.py, but {reason}; give the learning "
                f"rate's as --optimizer_warmup_steps."
            )
        if first and steps not in (None, first):
            raise HeadPruningError(
                f"--warmup_steps {first:g} and --optimizer_warmup_steps {steps:g} are both the learning rate's "
                f"warm-up, as the pruner has none; drop one of them."
            )
        steps = steps or first
    return steps or given.get("warmup_ratio") or 0  # steps win, as they did


def _subset(given: Mapping[str, Any], fields: Iterable[dataclasses.Field]) -> dict[str, Any]:
    return {f.name: given[f.name] for f in fields if f.name in given}


def _training_arguments(values: Mapping[str, Any]) -> TrainingArguments:
    try:
        training = TrainingArguments(**values)
    except (ValueError, TypeError, ImportError, NotImplementedError, OSError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise HeadPruningError(f"The training flags do not fit: {reason}.") from error
    if training.fsdp and not training.fsdp_config.get("xla") and training.world_size <= 1:
        raise HeadPruningError(
            "--fsdp splits the model over processes, but there is one; start several with torchrun, or drop it."
        )
    return training


def _require_positive(given: Mapping[str, Any], *names: str) -> None:
    for name in names:
        if given.get(name, 1) < 1:
            raise HeadPruningError(f"--{name} is {given[name]}; it must be 1 or more.")


def _names(method: Method) -> set[str]:
    return {found.name for found in dataclasses.fields(method.config)}


def _all_options() -> dict[str, dataclasses.Field]:
    return {**option_fields(), **option_fields(prunes="weights")}


def _methods(given: Mapping[str, Any], script: str) -> tuple[Optional[Method], Optional[Method]]:
    """The methods of heads and of weights. Raises HeadPruningError when a flag was set that is not theirs."""
    known = {**methods(), **methods("weights")}
    found: dict[str, Method] = {}
    own = _SCRIPTS[script].methods
    if own is not None:
        found["heads"] = known["ste" if "ste" in own and given.get("use_ste") else own[0]]
    for flag in ("pruner", "pruner_name"):
        if given.get(flag):
            named = get_method(given[flag], known)
            other = found.setdefault(named.prunes, named)
            if other is not named:
                raise HeadPruningError(
                    f"--{flag} {named.name} and {other.name} both prune {named.prunes}, of which a run prunes in one "
                    f"way; choose one of them."
                )
    if "heads" not in found:
        implied = implied_method(SimpleNamespace(**given))
        found |= {"heads": implied} if implied else {}
    mine = set(_SHARED).union(*map(_names, found.values()))
    for name in _all_options():
        # What was switched off may stand in a file of arguments.
        if name in given and name not in mine and given[name] not in (False, None):
            raise HeadPruningError(_foreign(name, found, script))
    if not found.get("heads") and given.get("intermediate_masks"):
        raise HeadPruningError("--intermediate_masks saves head masks, but no pruner is chosen; drop it or prune.")
    return found.get("heads"), found.get("weights")


def _foreign(option: str, found: Mapping[str, Method], script: str) -> str:
    kind = "heads" if owners(option) else "weights"
    theirs, method = owners(option, kind), found.get(kind)
    what, flag = ("pruner", "--pruner") if kind == "heads" else ("pruner of weights", "--pruner_name")
    if method is None:
        # PLATON is what the others of its schedule are compared with.
        first = "platon" if "platon" in theirs else theirs[0]
        chosen, cure = f"no {what} is chosen", f"add {flag} {first}"
    else:
        chosen = f"the {what} is {method.name}"
        if script == "run_dsp" and "dsp" in theirs:
            cure = "leave out --use_ste"
        else:
            elsewhere = "run_glue.py " if kind == "heads" and _SCRIPTS[script].methods else ""
            cure = f"choose {elsewhere}{flag} {theirs[0]}"
    return f"--{option} belongs to {', '.join(theirs)}, but {chosen}; drop it or {cure}."


def _parser(script: str) -> FlagParser:
    about = _SCRIPTS[script]
    names = about.methods or tuple(sorted(methods()))
    run = [f for f in dataclasses.fields(about.data) if f.name in ("overwrite_output_dir", "intermediate_masks")]
    data = [f for f in dataclasses.fields(about.data) if f not in run]
    if about.methods is None:
        run = [*dataclasses.fields(_Pruner), *run]
    training = type("Training", (TrainingArguments,), {"_argument_group_name": "training"})
    host = [
        flag_group("model", dataclasses.fields(ModelArguments)),
        flag_group("data", data),
        flag_group("run", [*dataclasses.fields(_WeightPruner), *run]),
        training,
    ]
    _refuse_clashes({f.name for group in host for f in dataclasses.fields(group)})
    parser = FlagParser(
        script,
        [*host, *_method_groups(names, "heads"), *_method_groups(tuple(methods("weights")), "weights")],
        about.description,
        needs=about.needs,
        defaults={**_shown_defaults(script, names), **about.training_defaults},
    )
    for option in option_fields():
        if not set(owners(option)) & set(names):
            parser.hide(option)
    for option, ours in _SHARED.items():
        theirs = owners(option, "weights")
        found = _field(option_fields(theirs, "weights")[option], f" [{', '.join(theirs)}]").metadata["help"]
        other = "" if about.own_warmup else f"; without such a pruner the same as --{ours}"
        parser.action(option).help = f"{found} (default: {option_fields(theirs, 'weights')[option].default}){other}"
    parser.elsewhere = {name: "run_michel" for name in _michel_only() if parser.action(name) is None}
    return parser


def _michel_only() -> set[str]:
    """The flags that no other script has; without --batch_size, by which others mean one of transformers' own."""
    shared = {f.name for kind in (ModelArguments, GlueArguments) for f in dataclasses.fields(kind)}
    return {f.name for f in dataclasses.fields(MichelArguments)} - shared - {"batch_size", "notes"}


@dataclass(frozen=True)
class _Pruner:
    pruner: Optional[str] = field(
        default=None,
        metadata={"help": "method that prunes heads, by its registered name; default: the one that the flags imply"},
    )


@dataclass(frozen=True)
class _WeightPruner:
    pruner_name: Optional[str] = field(
        default=None,
        metadata={
            "help": "method that prunes weights, such as PLATON, or heads, by its registered name; beside one of the "
            "other kind too",
            "aliases": ["--weight_pruner"],
        },
    )
    preset: Optional[str] = field(
        default=None,
        metadata={"help": f"a published recipe, whose flags are added unless they are set: {', '.join(PRESETS)}"},
    )
    optimizer: str = field(
        default=OPTIMIZERS[0],
        metadata={
            "help": "adamw, or the optimizer that --optim names; adamax, as in PLATON's recipes for GLUE",
            "choices": list(OPTIMIZERS),
        },
    )
    optimizer_warmup_steps: Optional[float] = field(
        default=None, metadata={"help": "updates in which the learning rate rises; below 1: a share of training"}
    )


def _refuse_clashes(taken: set[str]) -> None:
    for option in _all_options():
        if option in taken and option not in _SHARED:
            owner = [*owners(option), *owners(option, "weights")][0]
            raise HeadPruningError(
                f"The option {option} of the pruner {owner} is also a flag of the script; rename it."
            )


def _method_groups(names: Sequence[str], kind: str) -> list[type]:
    """One group per method, and one for what several have; also of methods beyond ``names``, to be refused by name."""
    known = methods(kind)
    theirs: dict[str, list[str]] = {}
    for name in sorted(known):
        for option in sorted(_names(known[name])):
            theirs.setdefault(option, []).append(name)
    several = [
        _field(found, f" [{', '.join(owner for owner in theirs[option] if owner in names)}]")
        for option, found in option_fields(prunes=kind).items()
        if len(theirs[option]) > 1 and option not in _SHARED
    ]
    groups = [flag_group(f"options of several pruners{' of weights' if kind == 'weights' else ''}", several)]
    for name, method in sorted(known.items()):
        own = [
            _field(found)
            for found in dataclasses.fields(method.config)
            if theirs[found.name] == [name] and found.name not in _SHARED
        ]
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
    output_dir: str = field(metadata={"help": "folder for the rounds, their masks and the pruned model"})
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "start anew and remove what an earlier run left in output_dir; without it a run of the same "
            "settings goes on after its last finished round, and a folder of other rounds or of a model is refused"
        },
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "tokenise again what is in the cache"})
    max_seq_length: int = field(default=128, metadata={"help": "cut examples to this many tokens"})
    batch_size: int = field(default=32, metadata={"help": "examples per batch, for importance and for scores"})
    data_subset: int = field(
        default=-1, metadata={"help": "score rounds on the first so many validation examples only; -1: all"}
    )
    max_train_samples: Optional[int] = field(
        default=None, metadata={"help": "measure importance on the first so many training examples only"}
    )
    metric_name: Optional[str] = field(
        default=None,
        metadata={"help": "metric that scores a round, such as f1, acc or mnli-mm/acc; default: the task's main one"},
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
    _require_positive(given, "max_seq_length", "batch_size", "num_of_heads", "max_train_samples")
    if given.get("data_subset", -1) != -1:
        _require_positive(given, "data_subset")
    return MichelArguments(**_subset(given, fields.values()), notes=notes)
