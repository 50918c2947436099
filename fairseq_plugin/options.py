"""The flags of pruning, and the pruners that they ask for."""

from dataclasses import Field, field, make_dataclass
from types import SimpleNamespace
from typing import Any, List, Mapping, Optional

from omegaconf import II

from head_pruning import HeadPruningError, Pruner, build_pruner, choose_method
from head_pruning.registry import Method, get_method, methods, option_fields, owners

_PRUNER = "method that prunes heads, by its registered name"
_WEIGHT_PRUNER = "method that prunes weights, by its registered name; one of heads can run beside it"
# Flags that some optimizer or scheduler of fairseq has too. Under their short names they are the pruner's only where
# no component that is in use wants them.
_PREFIX = "pruner_"
_SHARED = ("warmup_steps", "beta1", "beta2")
_ALIASES = {"deltaT": "--delta-t"}
# A file may have moved: what counts is the mask in it, which the checkpoint has too.
_BY_CONTENT = ("head_mask_file",)


def pruning_config(base: type, name: str, module: str) -> type:
    """``base`` (a task's dataclass) plus the options of every registered method and what they read of the run.

    Options of weight pruners are called as in the registry, but for ``pruner_warmup_steps``, ``pruner_beta1`` and
    ``pruner_beta2``, which have the names in the registry as second flags, and for what is on by default, which
    ``no_...`` switches off.
    """
    host = [
        ("pruner", Optional[str], field(default=None, metadata={"help": _PRUNER})),
        ("weight_pruner", Optional[str], field(default=None, metadata={"help": _WEIGHT_PRUNER})),
        ("seed", int, II("common.seed")),
        ("max_update", int, II("optimization.max_update")),
        ("max_epoch", int, II("optimization.max_epoch")),
        ("update_freq", List[int], II("optimization.update_freq")),
        ("use_bmuf", bool, II("optimization.use_bmuf")),
        ("ddp_backend", str, II("distributed_training.ddp_backend")),
        ("reset_optimizer", bool, II("checkpoint.reset_optimizer")),
        ("finetune_from_model", Optional[str], II("checkpoint.finetune_from_model")),
        ("save_dir", str, II("checkpoint.save_dir")),
        ("train_subset", str, II("dataset.train_subset")),
    ]
    taken = set(base.__dataclass_fields__)
    own = [entry for entry in host if entry[0] not in taken]
    own += [(f.name, f.type, field(default=f.default, metadata=dict(f.metadata))) for f in option_fields().values()]
    own += [_weight_flag(option) for option in option_fields(prunes="weights").values()]
    return make_dataclass(name, own, bases=(base,), namespace={"__module__": module})


def second_flags() -> dict[str, str]:
    """The short flags of what fairseq has too, which may give way to it, and where they lead."""
    return {f"--{name.replace('_', '-')}": _PREFIX + name for name in _SHARED}


def refuse_other_options(file: str, stored: Mapping[str, Any], options: Any) -> None:
    """Raise HeadPruningError if a checkpoint was pruned with other options than those of the run that resumes it.

    Args:
        file: the checkpoint, for the message.
        stored: the options of its task; older ones lack some, which are taken to be the same.
        options: those of this run's task.
    """
    mine = {pruner.name: vars(pruner.config) for pruner in build_pruners(options)}
    names = ["pruner", "weight_pruner", *option_fields(), *map(_name, option_fields(prunes="weights").values())]
    known = {name: stored.get(name, getattr(options, name, None)) for name in names}
    theirs = {pruner.name: vars(pruner.config) for pruner in build_pruners(SimpleNamespace(**known))}
    for pruner in mine.keys() & theirs.keys():
        for name, value in mine[pruner].items():
            if name not in _BY_CONTENT and theirs[pruner][name] != value:
                flag = _ALIASES.get(name, f"--{name.replace('_', '-')}")
                raise HeadPruningError(
                    f"{file} was pruned with {flag} {theirs[pruner][name]}, this run has {flag} {value}; go on with "
                    "the same options, choose another --save-dir, or add --reset-optimizer to start anew from its "
                    "weights."
                )


def build_pruners(options: Any) -> list[Pruner]:
    """The pruners that a task's options ask for: that of heads, then that of weights; empty for none.

    Raises:
        HeadPruningError: an unknown method, or an option that belongs to others only.
    """
    weights = methods("weights")
    if options.pruner and options.pruner.lower() in weights:
        raise HeadPruningError(f"{options.pruner} prunes weights; choose it with --weight-pruner.")
    of_heads = choose_method(options, options.pruner)
    of_weights = get_method(options.weight_pruner, weights) if options.weight_pruner else None
    values = {name: _value(options, option) for name, option in option_fields(prunes="weights").items()}
    _refuse_foreign(values, of_weights)
    found = [build_pruner(of_heads, options)] if of_heads else []
    return [*found, *([build_pruner(of_weights, SimpleNamespace(**values))] if of_weights else [])]


def _weight_flag(option: Field) -> tuple:
    name = _name(option)
    known = f"{option.metadata['help']} (weight pruners: {', '.join(owners(option.name, 'weights'))})"
    metadata = {"help": f"do not: {known}" if option.default is True else known}
    alias = f"--{option.name.replace('_', '-')}" if option.name in _SHARED else _ALIASES.get(option.name)
    if alias:
        metadata["argparse_alias"] = alias
    return name, option.type, field(default=False if option.default is True else option.default, metadata=metadata)


def _name(option: Field) -> str:
    """What the task's dataclass calls an option: fairseq's flags of what is true by default switch it off."""
    if option.default is True:
        return f"no_{option.name}"
    return _PREFIX + option.name if option.name in _SHARED else option.name


def _value(options: Any, option: Field) -> Any:
    if option.default is True:
        return not getattr(options, _name(option), False)
    return getattr(options, _name(option), option.default)


def _refuse_foreign(values: dict[str, Any], method: Optional[Method]) -> None:
    """Raise when an option was set that only weight pruners other than the chosen one have."""
    mine = option_fields([method.name], "weights") if method else {}
    for name, option in option_fields(prunes="weights").items():
        if name not in mine and values[name] != option.default:
            theirs = owners(name, "weights")
            chosen = f"the pruner of weights is {method.name}" if method else "no pruner of weights is chosen"
            raise HeadPruningError(
                f"--{_name(option).replace('_', '-')} belongs to {', '.join(theirs)}, but {chosen}; drop the option "
                f"or choose its pruner, such as --weight-pruner {theirs[0]}."
            )
