"""Methods by name. A method registers itself with one call and touches no other file."""

import dataclasses
import importlib
import pkgutil
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Callable, Iterable, Mapping, Optional

import numpy as np

from .errors import HeadPruningError


@dataclass(frozen=True)
class Method:
    """One registered method.

    Args:
        name: what ``--pruner`` takes.
        config: dataclass of its options; every field has ``help`` in its metadata.
        pruner: class built as ``pruner(config)``.
        selected_by: tells from all options whether the user means this method without naming it.
        prunes: its kind, one of :data:`head_pruning.pruner.KINDS`.
    """

    name: str
    config: type
    pruner: type
    selected_by: Callable[[Any], bool]
    prunes: str = "heads"


_METHODS: dict[str, Method] = {}


def register_pruner(
    *,
    name: str,
    config: type,
    pruner: type,
    selected_by: Optional[Callable[[Any], bool]] = None,
    prunes: Optional[str] = None,
) -> None:
    """Register a method. Options that share a name with another method's must share type and default.

    ``prunes`` is the method's kind; default: that of its class.
    """
    prunes = prunes or pruner.kind
    if prunes != pruner.kind:
        raise HeadPruningError(
            f"The pruner {name} is registered as one that prunes {prunes}, but its class is of the kind "
            f"{pruner.kind}; correct one of them."
        )
    if name in _METHODS:
        raise HeadPruningError(f"The pruner {name} is registered twice; choose another name.")
    for field in dataclasses.fields(config):
        if not field.metadata.get("help"):
            raise HeadPruningError(f"The option {field.name} of the pruner {name} has no help text; add one.")
        for other in _METHODS.values():
            twin = {f.name: f for f in dataclasses.fields(other.config)}.get(field.name)
            if twin is not None and (twin.type, twin.default) != (field.type, field.default):
                raise HeadPruningError(
                    f"The option {field.name} of the pruner {name} differs from that of {other.name}; "
                    "inherit it from a common config."
                )
    _METHODS[name] = Method(name, config, pruner, selected_by or (lambda options: False), prunes)


def methods(prunes: str = "heads") -> Mapping[str, Method]:
    """The registered methods that prune ``heads`` or ``weights``, by name."""
    from . import gates, weights

    for package in (gates, weights):
        for module in pkgutil.iter_modules(package.__path__):  # each method registers itself when it is imported
            importlib.import_module(f"{package.__name__}.{module.name}")
    return {name: method for name, method in _METHODS.items() if method.prunes == prunes}


def option_fields(names: Optional[Iterable[str]] = None, prunes: str = "heads") -> dict[str, dataclasses.Field]:
    """The union of the options of the named (default: all) methods that prune ``heads`` or ``weights``, each once."""
    known = methods(prunes)
    return {
        field.name: field for name in (names or known) for field in dataclasses.fields(get_method(name, known).config)
    }


def get_method(name: str, known: Optional[Mapping[str, Method]] = None) -> Method:
    """The method called ``name`` in any case. Raises HeadPruningError with the list of names when there is none."""
    known = known or methods()
    name = str(name).lower()
    if name not in known:
        raise HeadPruningError(f"There is no pruner {name}; choose one of {', '.join(sorted(known))}.")
    return known[name]


def owners(option: str, prunes: str = "heads") -> list[str]:
    """The names of the methods that have ``option``."""
    return sorted(name for name in methods(prunes) if option in option_fields([name], prunes))


def implied_method(options: Any) -> Optional[Method]:
    """The method that the options imply; None when no pruning is asked for.

    Args:
        options: any object with options as attributes; absent ones count as unset.

    Raises:
        HeadPruningError: the options imply several methods.
    """
    # A host need not have every option of every method.
    known = SimpleNamespace(**{n: getattr(options, n, f.default) for n, f in option_fields().items()})
    chosen = [method for method in methods().values() if method.selected_by(known)]
    if len(chosen) > 1:
        raise HeadPruningError(
            f"The options fit several pruners ({', '.join(sorted(method.name for method in chosen))}); "
            "choose one with --pruner or drop the options of the others."
        )
    return chosen[0] if chosen else None


def choose_method(options: Any, pruner: Optional[str] = None) -> Optional[Method]:
    """The method that ``pruner`` names or that the options imply; None when no pruning is asked for.

    Raises:
        HeadPruningError: the options imply several methods, or one was set that belongs to others only.
    """
    method = get_method(pruner) if pruner else implied_method(options)
    _refuse_foreign_options(options, method)
    return method


def _refuse_foreign_options(options: Any, method: Optional[Method]) -> None:
    """Raise when an option was set that only methods other than the chosen one have."""
    mine = set(option_fields([method.name])) if method else set()
    for name, field in option_fields().items():
        if name not in mine and getattr(options, name, field.default) != field.default:
            raise HeadPruningError(
                f"--{name.replace('_', '-')} belongs to {', '.join(owners(name))}, but "
                + (
                    f"the pruner is {method.name}"
                    if method
                    else "no pruner is chosen (add --num-of-heads or --pruner)"
                )
                + "; drop the option or choose its pruner with --pruner."
            )


def build_pruner(method: Method, options: Any):
    """Build a pruner from any object that has the method's options as attributes; numpy's numbers become Python's."""
    values = {field.name: getattr(options, field.name, field.default) for field in dataclasses.fields(method.config)}
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}
    return method.pruner(method.config(**plain))
