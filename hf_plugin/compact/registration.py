"""``import hf_plugin`` lets transformers load compact models, without loading what it loads for that.

Modules of ours change what modules of transformers do, once these have loaded: :mod:`hf_plugin.compact.quantizer` with
the table of quantizers, which every ``from_pretrained`` reads first, :mod:`hf_plugin.compact.auto_classes` with the
``AutoModel*`` classes.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Optional, Sequence

CHANGED_BY = {
    "transformers.quantizers.auto": "hf_plugin.compact.quantizer",
    "transformers.models.auto.modeling_auto": "hf_plugin.compact.auto_classes",
}


class _WhenLoaded:
    """Finds these modules as Python would, and has ours imported once they were executed."""

    def find_spec(
        self, name: str, path: Optional[Sequence[str]], target: Optional[ModuleType] = None
    ) -> Optional[ModuleSpec]:
        """See ``importlib.abc.MetaPathFinder``."""
        spec = PathFinder.find_spec(name, path, target) if name in CHANGED_BY else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_change(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(CHANGED_BY[name])

        spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec


def register_when_loaded() -> None:
    """Import ours now where transformers' are loaded, else when they will be."""
    for theirs, ours in CHANGED_BY.items():
        if theirs in sys.modules:
            importlib.import_module(ours)
    if not CHANGED_BY.keys() <= sys.modules.keys():
        sys.meta_path.insert(0, _WhenLoaded())
