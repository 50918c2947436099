"""Which methods a command line asks for, of every kind, and whose options it sets."""

from dataclasses import Field, dataclass, field
from types import SimpleNamespace
from typing import Any, Callable, Mapping, Optional, Sequence

from .errors import HeadPruningError
from .options import dashed
from .registry import KINDS, Method, methods, option_fields


@dataclass(frozen=True)
class CommandLine:
    """How a host spells what :func:`choose_methods` reads and tells of.

    Args:
        flag: turns an option into the flag that a user types.
        choosers: the options that name methods, each with the kinds that it takes, its own first.
        only: the methods that a command is bound to; it takes one of them, the first unless the options imply
            another. Empty: all.
        elsewhere: the command that has the others, for a command that is bound.
    """

    flag: Callable[[str], str] = dashed
    choosers: Mapping[str, Sequence[str]] = field(
        default_factory=lambda: {kind.flag: (name,) for name, kind in KINDS.items()}
    )
    only: Sequence[str] = ()
    elsewhere: str = ""

    def chooser(self, kind: str) -> str:
        """The flag that names methods of the kind."""
        return self.flag(next((o for o, kinds in self.choosers.items() if kinds[0] == kind), KINDS[kind].flag))


class _Options(SimpleNamespace):
    """All options of the registry as attributes; it knows which of them were set, whatever their values are.

    Args:
        given: those that were set.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        known = option_fields()
        super().__init__(**{**{name: field.default for name, field in known.items()}, **given})
        self._set = {name for name in known if name in given and not _is_off(known[name], given[name])}

    def were_set(self, *names: str) -> bool:
        """Whether one of the options was set."""
        return not self._set.isdisjoint(names)


def choose_methods(
    options: Mapping[str, Any], kinds: Sequence[str] = tuple(KINDS), line: CommandLine = CommandLine()
) -> list[Method]:
    """The methods that a user asks for, by name or by their options, in the order of :data:`KINDS`.

    Args:
        options: the options that were set, by their names in the registry, and what names methods: one name, or
            several with commas between them. What is None, or False where that is the default, counts as unset.
        kinds: those that the host has.
        line: how the host spells them.

    Returns:
        One method of a kind, several of the kinds that may have them; empty when no pruning is asked for.

    Raises:
        HeadPruningError: there is no such method, two of a kind were chosen, the options imply several methods, or
            one was set that belongs only to methods that were not chosen.
    """
    known = {name: method for kind in kinds for name, method in methods(kind).items()}
    own = {name: known[name] for name in line.only}
    chosen: dict[str, list[Method]] = {}
    if own:
        first = known[line.only[0]]
        chosen[first.kind] = _implied(options, own, line) or [first]
    for option, takes in line.choosers.items():
        for name in filter(None, str(options.get(option) or "").lower().split(",")):
            _add(chosen, option, _named(name.strip(), takes, known, line), line)
    for kind in kinds:
        if kind not in chosen:
            chosen[kind] = _implied(options, methods(kind), line)
    found = [method for kind in kinds for method in chosen[kind]]
    refuse_foreign(options, found, known, line)
    return found


def choose_method(options: Any, pruner: Optional[str] = None) -> Optional[Method]:
    """The method of heads that ``pruner`` names or that the options imply; None when no pruning is asked for.

    Args:
        options: any object with options as attributes; those that are absent or at their defaults count as unset.
        pruner: a registered name.

    Raises:
        HeadPruningError: as :func:`choose_methods`.
    """
    values = {name: getattr(options, name, known.default) for name, known in option_fields(kind="heads").items()}
    given = {name: value for name, value in values.items() if value != option_fields()[name].default}
    return next(iter(choose_methods({**given, KINDS["heads"].flag: pruner}, ("heads",))), None)


def refuse_foreign(
    options: Mapping[str, Any], chosen: Sequence[Method], known: Mapping[str, Method], line: CommandLine
) -> None:
    """Raise HeadPruningError if an option was set that belongs only to methods that were not chosen.

    Args:
        options: those that were set.
        chosen: the methods of the run.
        known: all methods that could be chosen, by name.
        line: how the host spells them.
    """
    for option, value in options.items():
        theirs = sorted((method for method in known.values() if option in method.options), key=lambda m: m.name)
        if not theirs or any(option in method.options for method in chosen):
            continue
        if _is_off(theirs[0].options[option], value):
            continue  # what is switched off may stand in a file of options
        taken = {method.kind for method in chosen}  # an option may be of methods of several kinds
        best = min(theirs, key=lambda method: (method.kind not in taken, not method.recommended))
        rivals, noun = [method for method in chosen if method.kind == best.kind], KINDS[best.kind].noun
        says = f"the {noun} is {' and '.join(method.name for method in rivals)}" if rivals else f"no {noun} is chosen"
        raise HeadPruningError(
            f"{line.flag(option)} belongs to {', '.join(method.name for method in theirs)}, but {says}; drop it or "
            f"{_cure(options, best, rivals, line)}."
        )


def _is_off(option: Field, value: Any) -> bool:
    """Whether a value that was given counts as unset."""
    return value is None or value is False and option.default is False


def _cure(options: Mapping[str, Any], best: Method, rivals: Sequence[Method], line: CommandLine) -> str:
    """How to choose the method ``best`` instead of ``rivals``."""
    if not rivals:
        return f"add {line.chooser(best.kind)} {best.name}"
    if best.name in line.only:
        against = [o for o in options if o not in best.options and any(o in rival.options for rival in rivals)]
        return f"leave out {' and '.join(map(line.flag, against))}"
    command = f"{line.elsewhere} " if any(rival.name in line.only for rival in rivals) else ""
    return f"choose {command}{line.chooser(best.kind)} {best.name}"


def _implied(options: Mapping[str, Any], known: Mapping[str, Method], line: CommandLine) -> list[Method]:
    """The methods of one kind that the options imply."""
    everything = _Options(options)
    found = [method for method in known.values() if method.selected_by(everything)]
    if len(found) > 1 and not KINDS[found[0].kind].several:
        raise HeadPruningError(
            f"The options fit several pruners ({', '.join(sorted(method.name for method in found))}); choose one with "
            f"{line.chooser(found[0].kind)} or drop the options of the others."
        )
    return found


def _named(name: str, takes: Sequence[str], known: Mapping[str, Method], line: CommandLine) -> Method:
    """The method that a chooser of the kinds ``takes`` names."""
    method = known.get(name)
    if method is not None and method.kind in takes:
        return method
    offered = sorted(found for found, other in known.items() if other.kind in takes)
    if method is not None:
        does = " or ".join(KINDS[kind].does for kind in takes)
        alike = next((found for found in offered if name in found.split("_")), None)
        raise HeadPruningError(
            f"{name} is none of the methods that {does}; choose it with {line.chooser(method.kind)} {name}"
            f"{f', or take {alike}, which is one' if alike else ''}."
        )
    noun = KINDS[takes[0]].noun if len(takes) == 1 else "pruner"
    raise HeadPruningError(f"There is no {noun} {name}; choose one of {', '.join(offered)}.")


def _add(chosen: dict[str, list[Method]], option: str, method: Method, line: CommandLine) -> None:
    taken, kind = chosen.setdefault(method.kind, []), KINDS[method.kind]
    if method in taken:
        return
    if taken and not kind.several:
        raise HeadPruningError(
            f"{line.flag(option)} {method.name} and {taken[0].name} both {kind.does}, of which a run takes one; "
            "choose one of them."
        )
    taken.append(method)
