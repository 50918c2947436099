"""Reading the tree of a model's modules: which host layer holds a module, and which kind of attention it is."""

import re
from typing import Any, Iterator

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from head_pruning import HeadPruningError

CROSS = re.compile(r"cross|encoder_?att|enc_?dec", re.IGNORECASE)


def check_model(model: Any) -> None:
    """Raise HeadPruningError if ``model`` is no model, for example the name of one."""
    if not isinstance(model, nn.Module):
        raise HeadPruningError(f"{model!r} is no model; load it first (from_pretrained), and give the model itself.")


class Tree:
    """The modules of a model by their dotted names; a module used in several places has the first name."""

    def __init__(self, model: nn.Module) -> None:
        check_model(model)
        self.modules = dict(model.named_modules())
        self._names = {id(module): name for name, module in self.modules.items()}

    def name_of(self, module: nn.Module) -> str:
        """The first dotted name of a module."""
        return self._names[id(module)]

    def path(self, name: str) -> Iterator[tuple[str, nn.Module]]:
        """The modules from ``name`` outwards to the model itself."""
        while True:
            if name in self.modules:
                yield name, self.modules[name]
            if not name:
                return
            name = name.rpartition(".")[0]

    def config_of(self, name: str) -> Any:
        """The configuration nearest to a module, or None."""
        return next((module.config for _, module in self.path(name) if hasattr(module, "config")), None)

    def host_layer(self, name: str) -> str:
        """The host layer that holds ``name``: the nearest element of a list whose elements are of one class.

        T5 keeps the parts of a layer in a list too, a list of several classes. Where no list is uniform (hybrid
        models) it is the nearest element of any list; without a list, the parent.
        """
        elements = [inside for inside, _ in self.path(name) if inside.rpartition(".")[2].isdigit()]
        for element in elements:
            siblings = self.modules[element.rpartition(".")[0]]
            if len({type(sibling) for sibling in siblings.children()}) == 1:
                return element
        return elements[0] if elements else name.rpartition(".")[0]

    def kind(self, name: str, layer: str) -> str:
        """``decoder_cross``, ``decoder_self`` or ``encoder_self`` for the attention module ``name``."""
        inside = [module for inner, module in self.modules.items() if inner == name or inner.startswith(f"{name}.")]
        around = [module for outer, module in self.path(name) if outer != layer and len(outer) > len(layer)]
        below = name[len(layer.rpartition(".")[0].rpartition(".")[0]) :]
        if (
            CROSS.search(below)
            or any(re.search("cross_?attention", type(module).__name__, re.IGNORECASE) for module in around + inside)
            or any(getattr(module, "is_cross_attention", False) is True for module in around + inside)
        ):
            return "decoder_cross"
        causal = any(getattr(module, flag, False) is True for module in inside for flag in ("is_causal", "is_decoder"))
        return "decoder_self" if causal or self._in_decoder(name) else "encoder_self"

    def _in_decoder(self, name: str) -> bool:
        for component in name.split("."):
            if "decoder" in component and "encoder" not in component:
                return True
            if "encoder" in component and "decoder" not in component:
                return False
        config = self.config_of(name)
        family = getattr(config, "model_type", None)
        if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and family not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
            return True
        return getattr(config, "is_decoder", False) is True
