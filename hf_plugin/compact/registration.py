"""``import hf_plugin`` lets ``from_pretrained`` load compact models, without loading what transformers loads for it.

:mod:`hf_plugin.compact.quantizer` makes our quantizer known when transformers' table of quantizers has loaded, which
every ``from_pretrained`` does first.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Optional, Sequence

TABLE = "transformers.quantizers.auto"


class _WhenLoaded:
    """Finds the table's module as Python would, and has the quantizer imported once it was executed."""

    def find_spec(
        self, name: str, path: Optional[Sequence[str]], target: Optional[ModuleType] = None
    ) -> Optional[ModuleSpec]:
        """See ``importlib.abc.MetaPathFinder``."""
        spec = PathFinder.find_spec(name, path, target) if name == TABLE else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    importlib.import_module("hf_plugin.compact.quantizer")


def register_when_loaded() -> None:
    """Register the quantizer now if transformers' table is loaded, else when it will be."""
    if TABLE in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _WhenLoaded())
