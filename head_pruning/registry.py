"""Methods by name. A method registers itself with one call and touches no other file."""

import dataclasses
import functools
import importlib
import importlib.util
import pkgutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable, Iterable, Mapping, Optional, get_type_hints

import numpy as np

from .errors import HeadPruningError

if TYPE_CHECKING:
    from .pruner import Pruner

#: The folders of the package whose modules are imported so that their methods register themselves.
METHOD_FOLDERS = ("gates", "weights", "distillation", "quantization")


@dataclass(frozen=True)
class Kind:
    """What the methods of one kind do.

    Args:
        flag: the option of a command line that names one of them.
        noun: what messages call such a method.
        does: what it does, after "methods that".
        several: whether a run may have more than one.
    """

    flag: str
    noun: str
    does: str
    several: bool = False

    @property
    def plural(self) -> str:
        """What messages call several of them."""
        first, *rest = self.noun.split(" ")
        return " ".join([f"{first}s", *rest])


#: By name, in the order in which their methods take part in an update.
KINDS: dict[str, Kind] = {
    "heads": Kind("pruner", "pruner", "prune heads"),
    "units": Kind("unit_pruner", "pruner of units", "prune feed-forward units"),
    "weights": Kind("weight_pruner", "pruner of weights", "prune weights"),
    "distils": Kind("distill", "distiller", "learn from a teacher", several=True),
    "quantizes": Kind("quantizer", "quantizer", "quantize"),
}


@dataclass(frozen=True)
class Method:
    """One registered method.

    Args:
        name: what a command line calls it, in lower case.
        config: dataclass of its options; every field has ``help`` in its metadata.
        pruner: class built as ``pruner(config)``.
        kind: one of :data:`KINDS`.
        selected_by: tells from all options whether the user means this method without naming it.
        recommended: whether a message names it first of several methods.
        example: options of a short run that shows what it does.
    """

    name: str
    config: type
    pruner: "type[Pruner]"
    kind: str
    selected_by: Callable[[Any], bool]
    recommended: bool = False
    example: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def options(self) -> dict[str, dataclasses.Field]:
        """The fields of :attr:`config` by name."""
        return {field.name: field for field in dataclasses.fields(self.config)}

    @property
    def summary(self) -> str:
        """The first line of its documentation."""
        return (self.pruner.__doc__ or "").strip().partition("\n")[0]


_METHODS: dict[str, Method] = {}


def register_pruner(
    *,
    name: str,
    config: type,
    pruner: "type[Pruner]",
    selected_by: Optional[Callable[[Any], bool]] = None,
    prunes: Optional[str] = None,
    recommended: bool = False,
    example: Optional[Mapping[str, Any]] = None,
) -> None:
    """Register a method. Options that share a name with another method's must share type and default.

    Args:
        name: what a command line calls it.
        config: dataclass of its options; every field has ``help`` and a default. Further metadata: ``by_content``
            (truth value): the option names a file, and what counts is what is in it, not where it lies;
            ``once_unset``: what earlier versions stored where the option was not set.
        pruner: the :class:`~head_pruning.Pruner`'s class.
        selected_by: tells from all options, which it gets as attributes, whether the user means this method without
            naming it; ``options.were_set("one", "two")``: whether one of these was set. Default: never.
        prunes: its kind, one of :data:`KINDS`; default: ``pruner.kind``.
        recommended: whether a message names it first of several methods that would do.
        example: options of a short run that shows what the method does, step counts as fractions of training: those
            that are required, and those whose defaults are for long runs.

    Raises:
        HeadPruningError: the name is taken, there is no such kind, an option has no help or another meaning elsewhere,
            or the example sets one that the method has not.
    """
    kind = prunes or pruner.kind
    if name in _METHODS:
        raise HeadPruningError(f"The pruner {name} is registered twice; choose another name.")
    if kind not in KINDS or kind != pruner.kind:
        raise HeadPruningError(
            f"The pruner {name} is registered for {kind} and its class says {pruner.kind}; give both the same of "
            f"{', '.join(KINDS)}."
        )
    method = Method(name, config, pruner, kind, selected_by or (lambda options: False), recommended, example or {})
    odd = set(method.example) - set(method.options)
    if odd:
        raise HeadPruningError(f"The example of the pruner {name} sets {odd.pop()}, which is none of its options.")
    types = get_type_hints(config)
    for option, field in method.options.items():
        field.type = types[option]  # not its text, which is only understood where the dataclass stands
        if not field.metadata.get("help"):
            raise HeadPruningError(f"The option {option} of the pruner {name} has no help text; add one.")
        for other in _METHODS.values():
            twin = other.options.get(option)
            if twin is not None and (twin.type, twin.default) != (field.type, field.default):
                raise HeadPruningError(
                    f"The option {option} of the pruner {name} differs from that of {other.name}; "
                    "inherit it from a common config."
                )
    _METHODS[name] = method


@functools.cache
def _import_methods() -> None:
    for folder in METHOD_FOLDERS:
        if importlib.util.find_spec(f"{__package__}.{folder}") is None:
            continue
        package = importlib.import_module(f"{__package__}.{folder}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")


def methods(kind: Optional[str] = "heads") -> Mapping[str, Method]:
    """The registered methods of a kind of :data:`KINDS`, sorted by name; None: of all kinds, one after the other."""
    _import_methods()
    wanted = KINDS if kind is None else (kind,)
    return {name: method for each in wanted for name, method in sorted(_METHODS.items()) if method.kind == each}


def option_fields(names: Optional[Iterable[str]] = None, kind: Optional[str] = None) -> dict[str, dataclasses.Field]:
    """The union of the options of the named (default: all) methods of a kind (default: all), each once."""
    known = methods(kind)
    chosen = known.values() if names is None else [get_method(name, known) for name in names]
    return {option: field for method in chosen for option, field in method.options.items()}


def get_method(name: str, known: Optional[Mapping[str, Method]] = None) -> Method:
    """The method called ``name`` in any case. Raises HeadPruningError with the list of names when there is none."""
    known = methods(None) if known is None else known
    name = str(name).lower()
    if name not in known:
        raise HeadPruningError(f"There is no pruner {name}; choose one of {', '.join(sorted(known))}.")
    return known[name]


def owners(option: str) -> list[str]:
    """The names of the methods that have ``option``, sorted."""
    return sorted(name for name, method in methods(None).items() if option in method.options)


def build_pruner(method: Method, options: Any) -> "Pruner":
    """Build a pruner from any object that has the method's options as attributes; numpy's numbers become Python's."""
    values = {name: getattr(options, name, field.default) for name, field in method.options.items()}
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}
    return method.pruner(method.config(**plain))
