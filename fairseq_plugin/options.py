"""The flags of pruning, and the pruners that they ask for."""

import argparse
import dataclasses
import functools
import re
from dataclasses import Field, field, fields, is_dataclass, make_dataclass
from types import SimpleNamespace
from typing import Any, List, Mapping, Optional, Sequence

from fairseq.dataclass import FairseqDataclass
from fairseq.dataclass.configs import FairseqConfig
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.registry import REGISTRIES
from omegaconf import II

from head_pruning import HeadPruningError, Pruner, build_pruner, choose_methods
from head_pruning.choosing import CommandLine
from head_pruning.options import dashed, is_same
from head_pruning.registry import KINDS, methods, option_fields, owners

#: What a task's name ends in that prunes.
TASK_SUFFIX = "_head_pruning"
_PREFIX = "pruner_"


def pruning_config(base: type, name: str, module: str) -> type:
    """``base`` (a task's dataclass) plus the options of every registered method and what they read of the run.

    Options are called as in the registry, but for those that an optimizer or scheduler of fairseq has too
    (``pruner_warmup_steps``), which have the name in the registry as second flag, and for what is on by default,
    which ``no_...`` switches off. They are None until they are set, switches False.
    """
    run = [
        ("seed", int, II("common.seed")),
        ("max_update", int, II("optimization.max_update")),
        ("max_epoch", int, II("optimization.max_epoch")),
        ("update_freq", List[int], II("optimization.update_freq")),
        ("skip_remainder_batch", Optional[bool], II("optimization.skip_remainder_batch")),
        ("use_bmuf", bool, II("optimization.use_bmuf")),
        ("ddp_backend", str, II("distributed_training.ddp_backend")),
        ("reset_optimizer", bool, II("checkpoint.reset_optimizer")),
        ("finetune_from_model", Optional[str], II("checkpoint.finetune_from_model")),
        ("save_dir", str, II("checkpoint.save_dir")),
        ("train_subset", str, II("dataset.train_subset")),
    ]
    run = [entry for entry in run if entry[0] not in {field.name for field in fields(base)}]
    return make_dataclass(name, [*run, *_own()], bases=(base,), namespace={"__module__": module})


def add_options(parser: Any) -> None:
    """Add the same options to the parser of a task of fairseq's old kind, which has no dataclass."""
    gen_parser_from_dataclass(parser, make_dataclass("Options", _own(), bases=(FairseqDataclass,))())


@functools.cache
def _own() -> tuple:
    return (*(_chooser(kind) for kind in KINDS if methods(kind)), *map(_option, option_fields().values()))


def all_flags() -> set[str]:
    """Every flag of pruning, in every spelling."""
    return {flag for name, _, told in _own() for flag in (dashed(name), told.metadata.get("argparse_alias"))}


def second_flags() -> dict[str, str]:
    """The short flags of what fairseq has too, which may give way to it, and where they lead."""
    return {dashed(name): _PREFIX + name for name in option_fields() if _shared(name)}


def build_pruners(options: Any) -> list[Pruner]:
    """The pruners that a task's options ask for, in the order of their kinds; empty for none.

    Raises:
        HeadPruningError: as :func:`head_pruning.choose_methods`.
    """
    chosen = choose_methods(_given(options), line=CommandLine(_flag))
    values = {name: _value(options, option) for name, option in option_fields().items()}
    return [build_pruner(method, SimpleNamespace(**values)) for method in chosen]


def _given(options: Any) -> dict[str, Any]:
    """The options of the registry, and those that name methods, that were set."""
    given = {name: _value(options, option) for name, option in option_fields().items() if _is_set(options, option)}
    named = {kind.flag: getattr(options, kind.flag, None) for kind in KINDS.values()}
    return {**given, **{name: value for name, value in named.items() if value is not None}}


def pruners_to_decode(options: Any) -> list[Pruner]:
    """The pruners under which a command that does not train runs a stored model; empty where none is asked for.

    Raises:
        HeadPruningError: an option was set that takes a training.
    """
    given = _given(options)
    try:
        pruners = build_pruners(options)
    except HeadPruningError:  # half of what a method needs
        pruners = []
    if given and (not pruners or any(pruner.needs_training for pruner in pruners)):
        raise HeadPruningError(
            f"{' and '.join(map(_flag, given))} takes a training, and this command runs a stored model, with the mask "
            "that is in its checkpoint; leave it out, or give the mask of a dense model with --head-mask-file."
        )
    for pruner in pruners:
        pruner.check_options()
    return pruners


def refuse_other_options(file: str, names: Sequence[str], stored: Mapping[str, Any], options: Any) -> None:
    """Raise HeadPruningError if a checkpoint was pruned with other options than those of the run that resumes it.

    What counts of an option that names a file is what is in the file, which the checkpoint has too.

    Args:
        file: the checkpoint, for the message.
        names: of the pruners that it says it was trained with.
        stored: the options of its task; older ones lack some, which are taken to be the same.
        options: those of this run's task.
    """
    mine = {pruner.name: vars(pruner.config) for pruner in build_pruners(options)}
    spelled = map(_name, option_fields().values())
    known = SimpleNamespace(**{name: stored.get(name, getattr(options, name, None)) for name in spelled})
    values = SimpleNamespace(**{name: _value(known, option) for name, option in option_fields().items()})
    registered = {name: method for kind in KINDS for name, method in methods(kind).items()}
    same = [name for name in names if name in mine and name in registered]
    # Not by what its options imply: the defaults of methods that it did not use may have changed since.
    theirs = {name: vars(build_pruner(registered[name], values).config) for name in same}
    for pruner in theirs:
        for name, value in mine[pruner].items():
            option = option_fields()[name]
            if not is_same(option, theirs[pruner][name], value) and not option.metadata.get("by_content"):
                flag = dashed(name) if option.default is True else _flag(name)
                raise HeadPruningError(
                    f"{file} was pruned with {flag} {theirs[pruner][name]}, this run has {flag} {value}; go on with "
                    "the same options, choose another --save-dir, or add --reset-optimizer to start anew from its "
                    "weights."
                )


def _chooser(kind: str) -> tuple:
    several = "; several with commas between them" if KINDS[kind].several else ""
    text = f"methods that {KINDS[kind].does}, by registered name{several}: {', '.join(methods(kind))}"
    return KINDS[kind].flag, Optional[str], field(default=None, metadata={"help": text})


def _option(option: Field) -> tuple:
    text = f"{option.metadata['help']} ({', '.join(owners(option.name))})"
    metadata = {"help": f"do not: {text}" if option.default is True else text}
    second = dashed(option.name) if _shared(option.name) else _flag(option.name)
    if second != dashed(_name(option)):
        metadata["argparse_alias"] = second
    if isinstance(option.default, bool):
        return _name(option), bool, field(default=False, metadata=metadata)
    if _has_fairseq(option.name):
        return _name(option), option.type, field(default=option.default, metadata=metadata)
    # Without a value what was set is told from what was not, in checkpoints and in files of options too.
    return _name(option), Optional[option.type], field(default=None, metadata=metadata)


@functools.cache
def _has_fairseq(name: str) -> bool:
    """Whether fairseq's own configuration has the option too (``temperature``), so that it always has a value."""
    groups = [found.type for found in fields(FairseqConfig) if isinstance(found.type, type)]
    return any(name == found.name for group in groups if is_dataclass(group) for found in fields(group))


@functools.cache
def _stems() -> frozenset[str]:
    """What fairseq's optimizers, schedulers, ... call their options, without numbers at the end."""
    names: set[str] = set()
    for component in (found for each in REGISTRIES.values() for found in each["registry"].values()):
        config = getattr(component, "__dataclass", None)
        if config is not None:
            names |= {known.name for known in dataclasses.fields(config)}
        elif hasattr(component, "add_args"):
            parser = argparse.ArgumentParser(add_help=False)
            component.add_args(parser)
            names |= {action.dest for action in parser._actions}
    return frozenset(map(_stem, names))


def _stem(name: str) -> str:
    return name.rstrip("0123456789")


def _shared(name: str) -> bool:
    """Whether a component of fairseq has the option too, or another of its numbers: beta2 goes with beta1.

    Under its short name it is the pruner's only where no component that is in use wants it.
    """
    return _stem(name) in _stems()


def _name(option: Field) -> str:
    """What the task's dataclass calls an option: fairseq's flags of what is true by default switch it off."""
    if option.default is True:
        return f"no_{option.name}"
    return _PREFIX + option.name if _shared(option.name) else option.name


def _flag(name: str) -> str:
    """An option of the registry, or what names a method, as fairseq's users type it: deltaT is --delta-t."""
    known = option_fields().get(name)
    typed = dashed(name if known is None else _name(known))
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", typed).lower()


def _value(options: Any, option: Field) -> Any:
    value = getattr(options, _name(option), None)
    if option.default is True:
        return not value
    return option.default if value is None else value


def _is_set(options: Any, option: Field) -> bool:
    """Whether the option was set, to whatever value."""
    value = getattr(options, _name(option), None)
    if _has_fairseq(option.name):
        return value is not None and value != option.default
    return value is not None and value is not False
