"""Pruning configurations of Prune Once for All's package, read onto the pruners of weights that there are."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Sequence

from torch import nn

from head_pruning import HeadPruningError, Pruner
from head_pruning.compact.shapes import Either, Number, Whole, conform
from head_pruning.files import read_json
from head_pruning.schedules import count_of
from head_pruning.weights.engine.targets import is_protected, of_adapters

from ..command_line.defaults import pruner

_KWARGS = {
    "target_sparsity?": Number(0, 1),
    "initial_sparsity?": Number(0, 1),
    "threshold_decay?": Number(0, 1),
    "fast_threshold?": bool,  # without effect in the published code too: thresholds are exact
    "block_size?": Whole(1),
    "block_dims?": Either(Whole(1), (Whole(1), Whole(1))),
    "pooling_type?": str,
    "group?": str,
    "group_target_sparsity?": Number(0, 1),
    "group_initial_sparsity?": Number(0, 1),
    "group_threshold_decay?": Number(0, 1),
    "weight_mask_file?": str,
    "name?": str,
}
_COMMON = {
    "scheduler": str,
    "pruning_fn": str,
    "pruning_fn_default_kwargs?": _KWARGS,
    "prune_layer_types?": {str: _KWARGS},
    "not_to_prune?": [str],
    "weight_sparsity_map?": {str: _KWARGS},
    "explicit_prune?": {str: _KWARGS},
    "init_strategy?": str,
    "initial_step?": Whole(),  # never read in the published code
}
_STEPS = {
    "pruning_frequency?": Whole(1),
    "begin_pruning_step?": Whole(),
    "end_pruning_step?": Whole(-1),
    "policy_begin_step?": Whole(),
    "policy_end_step?": Whole(),
}
_LAYER_TYPES = {"Linear": {"name": "weight"}, "Conv2d": {"name": "weight"}}
_EACH = ("target_sparsity", "initial_sparsity", "threshold_decay", "fast_threshold")
_UNIFORM = ("target_sparsity", "initial_sparsity", "block_size")
_BLOCKS = (*_EACH, "block_dims", "pooling_type")
_GROUP = ("group_target_sparsity", "group_initial_sparsity", "group_threshold_decay", "group")


@dataclass(frozen=True)
class _Function:
    """A ``pruning_fn``: its pruner by scheduler, and the keywords that it takes."""

    pruners: Mapping[str, str]
    kwargs: Sequence[str] = ()


_MAGNITUDE = {"iterative": "gradual_magnitude", "one_shot": "one_shot_magnitude"}
_WIRING = {"iterative": "neural_wiring"}
_FUNCTIONS = {
    "unstructured_magnitude": _Function(_MAGNITUDE, _EACH),
    "uniform_magnitude": _Function(_MAGNITUDE, _UNIFORM),
    "block_structured_magnitude": _Function(_MAGNITUDE, _BLOCKS),
    "global_unstructured_magnitude": _Function(_MAGNITUDE, _GROUP),
    "grouped_unstructured_magnitude": _Function(_MAGNITUDE, _GROUP),
    "unstructured_neural_wiring": _Function(_WIRING, _EACH),
    "uniform_neural_wiring": _Function(_WIRING, _UNIFORM),
    "block_structured_neural_wiring": _Function(_WIRING, _BLOCKS),
    "pattern_lock": _Function({"one_shot": "lock"}),
    "custom_mask": _Function({"one_shot": "custom_mask"}, ("weight_mask_file",)),
}
#: The configurations that the recipe's scripts use, by the names of their files.
PUBLISHED: dict[str, dict[str, Any]] = {
    "lock_config.json": {
        "scheduler": "one_shot",
        "pruning_fn": "pattern_lock",
        "prune_layer_types": {"Linear": {"name": "weight"}, "QuantizedLinear": {"name": "weight"}},
        "not_to_prune": ["classifier", "qa_outputs", "teacher"],
    },
    **{
        f"{name}.json": {
            "scheduler": "iterative",
            "pruning_fn": "unstructured_magnitude",
            "pruning_fn_default_kwargs": {"target_sparsity": sparsity},
            "not_to_prune": kept,
            "pruning_frequency": every,
            "begin_pruning_step": first,
            "end_pruning_step": last,
            "policy_begin_step": first,
            "policy_end_step": target,
        }
        for name, sparsity, kept, every, first, target, last in (
            ("student_pruning_90_config", 0.9, ["cls", "teacher"], 1000, 0, 50000, 80000),
            ("student_pruning_85_config", 0.85, ["cls", "teacher"], 1000, 0, 50000, 80000),
            ("squad_85_config", 0.85, ["qa_outputs", "teacher"], 100, 1400, 10000, 12000),
            ("glue_85_config", 0.85, ["classifier", "teacher"], 100, 0, 800, 1200),
        )
    },
}


def read_config(config: "str | Path | Mapping[str, Any]", **overrides: Any) -> dict[str, Any]:
    """A configuration, checked.

    Args:
        config: a JSON file; a path without a file whose name is one of :data:`PUBLISHED` means that one; or the
            configuration itself.
        **overrides: keys that replace those of the configuration.

    Raises:
        HeadPruningError: there is no such file, it is damaged, or a key is unknown, missing or of another type.
    """
    where = "The pruning configuration"
    if isinstance(config, (str, Path)):
        where = str(config)
        known = PUBLISHED.get(Path(config).name)
        config = known if known is not None and not Path(config).exists() else read_json(config, dict)
    values = {**config, **overrides}
    _refuse_unknown(values, {**_COMMON, **_STEPS}, where)
    try:
        conform(values, {**_COMMON, **_STEPS}, where)
    except ValueError as error:
        raise HeadPruningError(f"{error}; correct it.") from error
    for place in ("pruning_fn_default_kwargs", "prune_layer_types", "weight_sparsity_map", "explicit_prune"):
        nested = values.get(place, {})
        for given in (nested,) if place == "pruning_fn_default_kwargs" else nested.values():
            _refuse_unknown(given, _KWARGS, f"{where}, {place},")
    if values["pruning_fn"] not in _FUNCTIONS:
        raise HeadPruningError(
            f"{where} has the pruning_fn {values['pruning_fn']!r}; choose one of {', '.join(_FUNCTIONS)}."
        )
    schedulers = _FUNCTIONS[values["pruning_fn"]].pruners
    if values["scheduler"] not in schedulers:
        raise HeadPruningError(
            f"{where} has the scheduler {values['scheduler']!r} with {values['pruning_fn']}, which goes with "
            f"{' or '.join(schedulers)}; correct it."
        )
    idle = [name.rstrip("?") for name in _STEPS if values["scheduler"] == "one_shot" and name.rstrip("?") in values]
    if idle:
        raise HeadPruningError(f"{where} has {idle[0]}, but the scheduler one_shot has no steps; drop it.")
    return values


def build_pruner(model: nn.Module, config: Mapping[str, Any]) -> Pruner:
    """The pruner of weights that a checked configuration describes, for this model.

    Raises:
        HeadPruningError: a pattern is no regular expression or fits several times or never, nothing is chosen, or
            keywords do not fit the method or differ between modules where they cannot.
    """
    chosen = _chosen(model, config)
    if not chosen:
        raise HeadPruningError("The pruning configuration chooses no weight of the model; correct prune_layer_types.")
    name, options = _meaning(config, chosen)
    names = [name for name, _ in model.named_parameters()]
    return pruner(name, **options, weights_include=_pattern(list(chosen), names))


def as_flags(config: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of our scripts that mean a checked configuration, whatever the model will be.

    Raises:
        HeadPruningError: it says something of single modules or types of layers; keywords do not fit the method.
    """
    types = config.get("prune_layer_types", _LAYER_TYPES)
    if types.get("Linear") != {"name": "weight"} or set(types) > {*_LAYER_TYPES, "QuantizedLinear"}:
        single = "prune_layer_types"
    else:
        single = next((key for key in ("weight_sparsity_map", "explicit_prune") if config.get(key)), "")
    if single:
        raise HeadPruningError(
            f"A script reads no {single} out of a pruning configuration, as it has no model yet; give "
            "--weights_include and --weight_sparsity_map, or use hf_plugin.pruning_scheduler_factory."
        )
    name, flags = _meaning(config, {"": config.get("pruning_fn_default_kwargs", {})})
    kept = [f"(?:{_compiled(text, 'not_to_prune').pattern})" for text in config.get("not_to_prune", [])]
    flags |= {"weights_exclude": "|".join(kept)} if kept else {}
    return {"pruner_name": name, **flags, "weights_include": r"\.weight$"}


def _meaning(config: Mapping[str, Any], chosen: Mapping[str, Mapping[str, Any]]) -> tuple[str, dict[str, Any]]:
    """The name of the pruner, and its options but for the patterns of names.

    Args:
        config: the configuration.
        chosen: the parameters to prune, and the keywords of each.
    """
    function, one_shot = _FUNCTIONS[config["pruning_fn"]], config["scheduler"] == "one_shot"
    foreign = sorted({key for kwargs in chosen.values() for key in kwargs} - {"name", *function.kwargs})
    if foreign:
        raise HeadPruningError(
            f"{config['pruning_fn']} has no keyword {foreign[0]}; it has {', '.join(function.kwargs) or 'none'}."
        )
    # One shot prunes initial_sparsity: the target would be reached by a schedule that it has not.
    ratio = "initial_sparsity" if one_shot else "target_sparsity"
    group = "group_" if "group" in function.kwargs else ""
    ratios = {name: kwargs.get(group + ratio, 0.0) for name, kwargs in chosen.items()}
    _refuse_uneven(config["pruning_fn"], chosen, "" if group else ratio)
    common = next(iter(chosen.values()))
    options = _options({key: value for key, value in common.items() if group or key != ratio}, group)
    uneven = config.get("init_strategy", "uniform") != "uniform"
    if uneven and (group or "target_sparsity" not in function.kwargs):
        why = "one ratio of all modules, none" if group else "no ratios"
        raise HeadPruningError(f"{config['pruning_fn']} has {why} for an init_strategy to allot; drop it.")
    if "target_sparsity" in function.kwargs or group:
        size = common.get("block_size", 1)
        options |= _sparsities(ratios, size)
        if one_shot and not any(ratios.values()):
            raise HeadPruningError(
                "The scheduler one_shot prunes initial_sparsity at once, which is 0; give it, or choose iterative."
            )
        if one_shot:
            options.pop("initial_sparsity", None)
        if size > 1:
            options["weight_selection"] = _neighbours(options["target_sparsity"], size)
        if uneven:
            options["init_strategy"] = config["init_strategy"]
    if not one_shot:
        options |= {name: config[name] for key in _STEPS if (name := key.rstrip("?")) in config}
    return function.pruners[config["scheduler"]], {**options, "prune_biases": False}


def _refuse_uneven(function: str, chosen: Mapping[str, Mapping[str, Any]], ratio: str) -> None:
    """Raise HeadPruningError where modules differ in what one pruner has once.

    Args:
        function: the ``pruning_fn``.
        chosen: the parameters to prune, and the keywords of each.
        ratio: the keyword that may differ; empty where there is one threshold for all.
    """
    first, keys = next(iter(chosen.values())), {key for kwargs in chosen.values() for key in kwargs}
    uneven = [key for key in keys if any(kwargs.get(key) != first.get(key) for kwargs in chosen.values())]
    uneven = sorted({*uneven} - {"name", ratio})
    if uneven:
        may = f"between them only {ratio} may differ" if ratio else f"{function} has one threshold for all; give one"
        raise HeadPruningError(f"The pruning configuration gives modules different {', '.join(uneven)}; {may}.")


def _chosen(model: nn.Module, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The parameters to prune, and the keywords of each."""
    types = config.get("prune_layer_types", _LAYER_TYPES)
    default = config.get("pruning_fn_default_kwargs", {})
    left = [_compiled(text, "not_to_prune") for text in config.get("not_to_prune", [])]
    mapped = {_compiled(t, "weight_sparsity_map"): k for t, k in config.get("weight_sparsity_map", {}).items()}
    explicit = {_compiled(t, "explicit_prune"): k for t, k in config.get("explicit_prune", {}).items()}
    parameters, adapters = dict(model.named_parameters()), of_adapters(model)
    idle = {pattern: "weight_sparsity_map" for pattern in mapped} | dict.fromkeys(explicit, "explicit_prune")
    found: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        # Layers that learn to be quantized have a longer name in torchao.
        own = types.get(kind, types.get("QuantizedLinear") if kind.endswith("QuantizedLinear") else None)
        asked = _only(explicit, name, "explicit_prune")
        if asked is None and (own is None or any(pattern.search(name) for pattern in left)):
            continue
        more = _only(mapped, name, "weight_sparsity_map") or {}
        kwargs = {**default, **(own or {}), **more, **(asked or {})}
        weight = f"{name}.{kwargs.get('name', 'weight')}".lstrip(".")
        if is_protected(module):
            if asked is not None:
                raise HeadPruningError(
                    f"explicit_prune asks for {weight}, which is never pruned: embeddings and norms stay; drop it."
                )
        elif weight in parameters and id(parameters[weight]) not in adapters:
            found[weight] = kwargs
            idle = {pattern: where for pattern, where in idle.items() if not pattern.search(name)}
        elif asked is not None:
            raise HeadPruningError(f"explicit_prune asks for {weight}, which the model has not; correct its name.")
    for pattern, where in idle.items():
        raise HeadPruningError(f"{pattern.pattern!r} of {where} fits no pruned module; correct it or drop it.")
    return found


def _only(patterns: Mapping[re.Pattern, dict], name: str, where: str) -> "dict[str, Any] | None":
    fits = [pattern for pattern in patterns if pattern.search(name)]
    if len(fits) > 1:
        raise HeadPruningError(f"{name} fits {fits[0].pattern!r} and {fits[1].pattern!r} of {where}; let one fit.")
    return patterns[fits[0]] if fits else None


def _options(kwargs: Mapping[str, Any], group: str) -> dict[str, Any]:
    """The options that keywords mean, without the ratios."""
    options = {name: kwargs[name] for name in ("weight_mask_file",) if name in kwargs}
    for name in ("initial_sparsity", "threshold_decay"):
        if group + name in kwargs:
            options[name] = kwargs[group + name]
    if group:
        options["weight_selection"] = "global"
    if "block_dims" in kwargs:
        dims = kwargs["block_dims"]
        inputs, outputs = (dims, dims) if isinstance(dims, int) else dims
        if (inputs, outputs) != (1, 1):
            options["weight_selection"] = f"{outputs}x{inputs}"
    if "pooling_type" in kwargs:
        options["block_pooling"] = kwargs["pooling_type"]
    return options


def _neighbours(sparsity: float, size: int) -> str:
    """The selection that removes as many of ``size`` neighbours as ``sparsity`` says, rounded down."""
    removed = count_of(sparsity, size)
    if not 0 < removed < size:
        raise HeadPruningError(
            f"{sparsity:g} of each block of {size} are {removed} weights, rounded down; choose another block_size."
        )
    return f"{size - removed}:{size}"


def _sparsities(ratios: Mapping[str, float], size: int) -> dict[str, Any]:
    """The options that say what each tensor loses; of neighbours the most common ratio that takes some of ``size``."""
    values = list(ratios.values())
    some = [value for value in values if 0 < count_of(value, size) < size] if size > 1 else []
    common = max(set(some or values), key=values.count)
    others = {value for value in values if value != common}
    names = list(ratios)
    each = {_pattern([n for n in names if ratios[n] == value], names): value for value in sorted(others)}
    return {"target_sparsity": common, **({"weight_sparsity_map": json.dumps(each)} if each else {})}


def _pattern(wanted: Sequence[str], names: Sequence[str]) -> str:
    """A regular expression that fits ``wanted`` alone of ``names``; it counts no layers where all are wanted."""
    exact = [re.escape(name) for name in wanted]
    for parts in (dict.fromkeys(re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", part) for part in exact), exact):
        pattern = f"^(?:{'|'.join(parts)})$"
        if {name for name in names if re.search(pattern, name)} == set(wanted):
            break
    return pattern


def _compiled(text: str, where: str) -> re.Pattern:
    try:
        return re.compile(text)
    except re.error as error:
        raise HeadPruningError(f"{text!r} in {where} is no regular expression ({error}); correct it.") from error


def _refuse_unknown(values: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    names = [name.rstrip("?") for name in known]
    odd = sorted(set(values) - set(names))
    if odd:
        raise HeadPruningError(f"{where} has the unknown key {odd[0]!r:.80}; it takes {', '.join(names)}.")
