"""Classes of transformers models whose attention heads are removed, also where the package is not installed.

A copy of this file, with the modules of ``head_pruning.compact`` in front of it, travels with every compact checkpoint
as ``compact_heads.py``: it is what ``from_pretrained(..., trust_remote_code=True)`` runs. It
imports nothing else but torch and transformers. ``config.json`` holds the recipe of the removed heads as its
``quantization_config``, whose ``quant_method`` is ``head_pruning``, or, when the weights are also quantized, as
``removed_heads``.
"""

import contextlib
import copy
import re
import sys
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Optional

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto import auto_factory, modeling_auto

from head_pruning.compact import ATTRIBUTE, apply_recipe, check_recipe

METHOD = "head_pruning"
RECIPE = "removed_heads"
FILE = "compact_heads"  # this file's name in a checkpoint, without .py
CORE = (
    "shapes",
    "slices",
    "returned",
    "hooks",
    "no_heads",
    "checks",
    "recipe",
)  # of head_pruning.compact, each after what it needs
_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_NEVER_CONFIG = ("attn_implementation", "device_map", "dtype", "quantization_config", "torch_dtype")


_Model: Any = object  # the model's own class comes after the mixin


class CompactModel(_Model):
    """What a model class of transformers needs to save, load and push a model whose heads are removed.

    In memory the config is that of the original; the recipe lies on the model (:data:`ATTRIBUTE`).
    """

    dense_class: type  # the class of transformers

    def __init__(self, config: Any, *args: Any, **options: Any) -> None:
        recipe = take_recipe(config)
        super().__init__(config, *args, **options)
        if recipe is not None:
            remove(self, recipe)

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, config: Any = None, **options: Any) -> PreTrainedModel:
        """As the base class; with ``quantization_config=`` the compact weights are quantized while they load.

        A layer without heads has an output projection of width 0, which quantizers refuse: name it in the quantization
        config's ``modules_to_not_convert``.
        """
        if isinstance(config, transformers.PreTrainedConfig):
            config = copy.deepcopy(config)
        else:
            hub = {name: options.pop(name) for name in _HUB if name in options}
            other = {name: options.pop(name) for name in _NEVER_CONFIG if name in options}
            source = folder if config is None else config
            config, options = cls.config_class.from_pretrained(source, return_unused_kwargs=True, **hub, **options)
            options |= hub | other
        # Out of transformers' sight, which would look for a quantizer of that name.
        setattr(config, RECIPE, take_recipe(config))
        return super().from_pretrained(folder, *args, config=config, **options)

    def save_pretrained(self, folder: Any, is_main_process: bool = True, *args: Any, **options: Any) -> None:
        """As the base class; the recipe goes into the config, and the code into the folder."""
        with self._telling_config():
            super().save_pretrained(folder, is_main_process, *args, **options)
        if is_main_process and not getattr(self, "_hf_peft_config_loaded", False):
            self._write_code(folder)

    def _upload_modified_files(self, folder: Any, *args: Any, **options: Any) -> Any:
        self._write_code(folder)
        return super()._upload_modified_files(folder, *args, **options)

    def _write_code(self, folder: Any) -> None:
        if hasattr(self, ATTRIBUTE) and self._travels():
            Path(folder, f"{FILE}.py").write_text(travelling_code(), encoding="utf-8")

    @contextlib.contextmanager
    def _telling_config(self) -> Iterator[None]:
        """Inside the block the config tells which heads are removed and where the code lies."""
        recipe = getattr(self, ATTRIBUTE, None)
        values: Any = vars(self.config)
        if recipe is None:
            yield
            return
        before = {name: values[name] for name in ("quantization_config", "auto_map") if name in values}
        told = before.get("quantization_config")
        if isinstance(told, Mapping) and told.get("quant_method") == METHOD:
            pass  # by the class of another copy of this file, which is around this one
        elif told is None:
            self.config.quantization_config = {"quant_method": METHOD, "recipe": recipe}
        else:
            setattr(self.config, RECIPE, recipe)
        if self._travels():
            self.config.auto_map = {**(before.get("auto_map") or {}), **auto_map(self)}
        try:
            yield
        finally:
            for name in ("quantization_config", "auto_map", RECIPE):
                values.pop(name, None)
            values.update(before)

    def _travels(self) -> bool:
        """Whether a process without the package finds the model's class in transformers."""
        return getattr(transformers, self.dense_class.__name__, None) is self.dense_class


def compact_class(base: type) -> type:
    """The class of compact models that are otherwise of ``base``; of the same name."""
    if issubclass(base, CompactModel):
        return base
    if getattr(transformers, base.__name__, None) is not base:
        return type(base.__name__, (CompactModel, base), {"__module__": base.__module__, "dense_class": base})
    if base.__name__ not in globals():
        globals()[base.__name__] = type(
            base.__name__, (CompactModel, base), {"__module__": __name__, "dense_class": base}
        )
    return globals()[base.__name__]


def __getattr__(name: str) -> type:
    base = None if name.startswith("_") else getattr(transformers, name, None)
    if isinstance(base, type) and issubclass(base, PreTrainedModel):
        return compact_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def auto_map(model: PreTrainedModel) -> dict[str, str]:
    """Each Auto class that has a class for models of this kind, and that class in the travelling file."""
    found = {}
    for name, kind in vars(modeling_auto).items():
        if not (isinstance(kind, type) and issubclass(kind, auto_factory._BaseAutoModelClass)):
            continue
        auto: Any = kind
        mapping = auto._model_mapping  # whose truth, and whose keys, import every model of transformers
        names = None if mapping is None else mapping._model_mapping.get(model.config.model_type)
        names = (names,) if isinstance(names, str) else tuple(names or ())
        if names:
            own = type(model).__name__
            found[name] = f"{FILE}.{own if own in names else names[0]}"
    return found


def take_recipe(config: Any) -> Optional[Mapping[str, Any]]:
    """Take what concerns removed heads out of a config: the recipe is returned, None when there is none."""
    quantization: Any = getattr(config, "quantization_config", None)
    method = (quantization or {}).get("quant_method") if isinstance(quantization, Mapping) else None
    recipe = getattr(config, RECIPE, None)
    if method == METHOD:
        recipe = quantization.get("recipe", {})
        del config.quantization_config
    if hasattr(config, RECIPE):
        delattr(config, RECIPE)
    references = getattr(config, "auto_map", None)
    if isinstance(references, Mapping):
        config.auto_map = {
            name: reference
            for name, reference in references.items()
            if not (isinstance(reference, str) and reference.rpartition("--")[2].startswith(f"{FILE}."))
        }
        if not config.auto_map:
            del config.auto_map
    return recipe


def remove(model: PreTrainedModel, recipe: Mapping[str, Any]) -> None:
    """Give a model of the original shape the shape that ``recipe`` says.

    Raises:
        ValueError: the recipe is damaged, or of another model.
    """
    try:
        here = fitted(model, check_recipe(recipe))
        if here["sites"]:  # else it is a part of the model of which nothing was cut
            with torch.device("cpu"):  # not "meta": the indices that are cut need values
                apply_recipe(model, here)
    except (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())[:600] or repr(error)  # a name in the file may be of any length
        raise ValueError(
            f"The recipe of removed heads in config.json is damaged or not made for {type(model).__name__} "
            f"({said}); take the config.json that was saved with these weights."
        ) from error


def fitted(model: PreTrainedModel, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe by the names that modules have in ``model``, which may have another task head, or less than all.

    Raises ValueError when a model of the class that was saved lacks a site.
    """
    modules, prefix = {name for name, _ in model.named_modules()}, f"{model.base_model_prefix}."
    known = [*recipe["sites"], *(site["name"] for site in recipe["unit_map"]["attention"])]
    holders = {block["name"]: block["out_proj"] for block in recipe["unit_map"]["feed_forward"]}
    here: list[str] = []
    for rename in (str, lambda name: prefix + name, lambda name: name.removeprefix(prefix)):
        here = [name for name in known if rename(holders.get(name, name)) in modules]
        if here:
            break
    there = {rename(name): site for name, site in recipe["sites"].items() if name in here}
    lacking = [name for name in recipe["sites"] if name not in here]
    if lacking and (not here or type(model).__name__ in (getattr(model.config, "architectures", None) or ())):
        raise ValueError(f"there is no module {lacking[0]}")
    sites = {name: _renamed_site(site, rename) for name, site in there.items()}
    units: dict[str, Any] = {}
    for kind, listed in recipe["unit_map"].items():
        if kind == "layers":
            units[kind] = [rename(name) for name in listed if rename(name) in modules]
        else:
            units[kind] = [
                _renamed_unit(unit, rename) for unit in listed if rename(unit.get("out_proj", unit["name"])) in modules
            ]
    return {**recipe, "sites": sites, "unit_map": units}


def _renamed_site(site: Mapping[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    lists = {name: [[rename(entry[0]), *entry[1:]] for entry in site[name]] for name in ("tensors", "counts")}
    hooks = [[kind, rename(name), options] for kind, name, options in site["hooks"]]
    empty = site["empty"] and [rename(site["empty"][0]), *site["empty"][1:]]
    return {**site, **lists, "hooks": hooks, "empty": empty}


def _renamed_unit(unit: Mapping[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    names: dict[str, Any] = {
        field: rename(unit[field]) for field in ("name", "layer", "in_proj", "out_proj") if field in unit
    }
    for several in ("projections", "gates", "weights", "biases"):
        if several in unit:
            names[several] = [rename(name) for name in unit[several]]
    return {**unit, **names}


def travelling_code() -> str:
    """The text of the file that travels."""
    own = Path(__file__).read_text(encoding="utf-8")
    if apply_recipe.__module__ == __name__:
        return own
    head, _, body = own.partition("\nfrom head_pruning.compact import ")
    folder = Path(str(sys.modules["head_pruning.compact"].__file__)).parent
    core = [(folder / f"{name}.py").read_text(encoding="utf-8") for name in CORE]
    # What one of these modules imports from another stands above it.
    alone = [
        re.sub(r"^from \.\w+ import (\(.*?\)|[^\n]*)\n", "", code, flags=re.DOTALL | re.MULTILINE) for code in core
    ]
    return "\n\n".join([head, *alone]) + f"\n{body.partition(chr(10))[2]}"
