"""The flags of a script in groups: one per purpose, and one per registered method."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Optional

from transformers import TrainingArguments

from head_pruning import HeadPruningError
from head_pruning.registry import KINDS, Method, methods, option_fields, owners

from ..training.optimizers import OPTIMIZERS
from .defaults import complete_options
from .fields import SHARED, ModelArguments
from .michel import michel_only
from .parser import FlagParser, flag_group
from .presets import PRESETS
from .scripts import Script, choosers

# Of a task's arguments, what is said of the run.
_RUN = ("overwrite_output_dir", "intermediate_masks")


@dataclass(frozen=True)
class _Run:
    pruner: Optional[str] = field(
        default=None,
        metadata={"help": "method that prunes heads, by its registered name; default: the one that the flags imply"},
    )
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


def build_parser(script: Script) -> FlagParser:
    """The parser of a script's command line, without old spellings.

    Raises:
        HeadPruningError: a method has an option that is also a flag of the script.
    """
    shown = {name for name, method in methods(None).items() if _takes(script, method)}
    data = dataclasses.fields(script.data)
    host = [
        flag_group("model", dataclasses.fields(ModelArguments)),
        flag_group("data", [f for f in data if f.name not in _RUN]),
        flag_group("run", [*_choosers(script), *(f for f in data if f.name in _RUN)]),
        type("Training", (TrainingArguments,), {"_argument_group_name": "training"}),
    ]
    _refuse_clashes({f.name for group in host for f in dataclasses.fields(group)})
    parser = FlagParser(
        script.name,
        [*host, *_method_groups(shown)],
        script.description,
        needs=script.needs,
        defaults={**_shown_defaults(script, shown), **script.training_defaults},
    )
    for option in option_fields():
        if not shown.intersection(owners(option)):
            parser.hide(option)
    for option, ours in SHARED.items():
        found = _field(option_fields()[option], f" [{', '.join(owners(option))}]")
        other = "" if script.own_warmup else f"; without such a pruner the same as --{ours}"
        parser.known(option).help = f"{found.metadata['help']} (default: {found.default}){other}"
    for flag, value in script.bare.items():
        action = parser.known(flag)
        action.nargs, action.const = "?", value
    parser.elsewhere = {name: "it belongs to run_michel.py" for name in michel_only() if parser.action(name) is None}
    if parser.action("pruner") is None:
        parser.elsewhere["pruner"] = f"its methods are {', '.join(script.methods)}; choose run_glue.py --pruner {{}}"
    return parser


def _takes(script: Script, method: Method) -> bool:
    """Whether the script can run the method."""
    bound = {methods(None)[name].kind for name in script.methods}
    return method.kind not in bound or method.name in script.methods


def _choosers(script: Script) -> list[dataclasses.Field]:
    """The flags that name methods, and those that go with them."""
    own = [f for f in dataclasses.fields(_Run) if f.name != "pruner" or not script.methods]
    names = {f.name for f in dataclasses.fields(_Run)}
    for option, (kind, *_) in choosers().items():
        if option not in names:
            several = "; several with commas between them" if KINDS[kind].several else ""
            text = f"methods that {KINDS[kind].does}, by registered name{several}: {', '.join(sorted(methods(kind)))}"
            own.append(_new_field(option, Optional[str], None, text))
    return own


def _refuse_clashes(taken: set[str]) -> None:
    for option in option_fields():
        if option in taken and option not in SHARED:
            raise HeadPruningError(
                f"The option {option} of the pruner {owners(option)[0]} is also a flag of the script; rename it."
            )


def _method_groups(shown: set[str]) -> list[type]:
    """One group per method, and one for what several have; those not ``shown`` are there to be refused by name."""
    groups, placed = [], set(SHARED)
    for kind, about in KINDS.items():
        mine = {option: found for option, found in option_fields(kind=kind).items() if option not in placed}
        placed |= set(mine)
        several = [
            _field(found, f" [{', '.join(name for name in owners(option) if name in shown)}]")
            for option, found in mine.items()
            if len(owners(option)) > 1
        ]
        groups.append(flag_group(f"options of several {about.plural}", several))
        for name, method in sorted(methods(kind).items()):
            own = [_field(found) for option, found in method.options.items() if owners(option) == [name]]
            summary = f" ({method.summary.rstrip('.')})" if method.summary else ""
            groups.append(flag_group(f"{about.noun.split()[0]} {name}{summary}", own))
    return groups


def _field(found: dataclasses.Field, more: str = "") -> dataclasses.Field:
    return _new_field(found.name, found.type, found.default, found.metadata["help"].replace("%", "%%") + more)


def _new_field(name: str, kind: Any, default: Any, text: str) -> dataclasses.Field:
    new: Any = field(default=default, metadata={"help": text})  # declared to be the default
    new.name, new.type = name, kind
    return new


def _shown_defaults(script: Script, shown: set[str]) -> dict[str, Any]:
    """Each option's default in this script; where methods differ, the text that says so."""
    values: dict[str, dict[str, list[str]]] = {}
    for name in sorted(shown):
        own = script.defaults if name in script.methods else {}
        for option, value in complete_options(name, own).items():
            values.setdefault(option, {}).setdefault(value, []).append(name)
    return {
        option: next(iter(found)) if len(found) == 1 else ", ".join(f"{v} ({', '.join(o)})" for v, o in found.items())
        for option, found in values.items()
    }
