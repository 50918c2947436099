"""Modules that load when they are first used: torch takes seconds, and a help text needs none of it."""

import importlib
import importlib.util
import sys
import types
from typing import Any, Callable, Mapping


def exports(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package whose names are imported when they are first asked for.

    Args:
        package: its ``__name__``.
        homes: name to the module of the package that defines it. The package's modules are found too.
    """

    def find(name: str) -> Any:
        if name in homes:
            value = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
            setattr(sys.modules[package], name, value)
            return value
        if not name.startswith("_") and importlib.util.find_spec(f"{package}.{name}") is not None:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find


class _Later(types.ModuleType):
    """A module that is executed when one of its attributes is asked for.

    ``importlib.util.LazyLoader`` would do, but before Python 3.12 its modules are executed by a second ``import`` too.
    """

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        assert spec is not None and spec.loader is not None
        self.__class__ = types.ModuleType  # type: ignore[assignment]
        if spec.submodule_search_locations is not None:
            self.__path__ = spec.submodule_search_locations
        try:
            spec.loader.exec_module(self)
        except BaseException:
            sys.modules.pop(spec.name, None)
            raise
        return getattr(self, name)


def load_later(*names: str) -> None:
    """Have top-level modules executed when they are first used; those that are loaded or missing stay as they are."""
    for name in names:
        spec = None if name in sys.modules else importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            # Missing until then, so that the import of a submodule, which needs it, executes the module first.
            vars(module).pop("__path__", None)
            module.__class__ = _Later
            sys.modules[name] = module
