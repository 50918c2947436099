"""The model card of a pruned model."""

from typing import Any, Mapping, Optional

from torch import nn

from head_pruning import HeadMask
from head_pruning.quantization.engine.linears import is_fake_quantized
from head_pruning.report.tables import head_table, markdown_table
from head_pruning.report.weights import DENSITY_PICTURE, WeightCount, sum_counts
from head_pruning.surgery.remaining import recipe_of
from head_pruning.weights.engine.targets import numbered

from ..compact.model_classes import auto_map


def model_card(
    model: nn.Module,
    mask: HeadMask,
    *,
    method: str,
    options: Mapping[str, Any],
    scores: Optional[Mapping[str, float]] = None,
    dataset: Optional[str] = None,
    parameters: Optional[tuple[int, int]] = None,
) -> str:
    """Markdown with the metadata header that the hub reads.

    Args:
        model: the pruned model.
        mask: the heads that stay.
        method: name of the pruning method.
        options: its options.
        scores: metric name to value.
        dataset: what they were measured on.
        parameters: of a model whose heads are cut out: how many the original had, and how many are left.
    """
    lines = _top(model, mask.words.replace(" heads", " attention heads"), "head-pruning", method)
    if is_adapted(model):
        lines[-1] += "This folder holds the adapter alone:"
        lines += ["which heads are removed is in its `masks.safetensors`, not in any weight.", ""]
        lines += _loading_adapter(model)
    elif parameters is not None:
        lines[-1] += "The removed heads are cut out of the weights."
        lines += ["", *_numbers(*parameters), "", "## Loading", "", *_loading(model)]
    elif recipe_of(model) is None:
        lines[-1] += "The weights of the removed heads are zero, so"
        lines += [f"the model loads with `from_pretrained` and needs {_packages(model)}.", ""]
    else:
        lines[-1] += "The weights of the removed heads are zero;"
        lines += ["others were cut out before.", "", "## Loading", "", *_loading(model)]
    lines += _results(scores, dataset)
    lines += ["## Heads that stay", "", "```", head_table(mask), "```", "", "![heads](head_mask.png)", ""]
    return "\n".join([*lines, *_options(options)])


def weight_card(
    model: nn.Module,
    counts: Mapping[str, WeightCount],
    *,
    method: str,
    options: Mapping[str, Any],
    left_dense: Mapping[str, int] = {},
    scores: Optional[Mapping[str, float]] = None,
    dataset: Optional[str] = None,
) -> str:
    """:func:`model_card` of a model of which only weights were pruned.

    Args:
        model: the pruned model.
        counts: of the pruned tensors by name, see :func:`head_pruning.report.weights.count_weights`.
        method: name of the pruning method.
        options: its options.
        left_dense: names and sizes of the matrices that were not pruned.
        scores: metric name to value.
        dataset: what they were measured on.
    """
    kept, total, _ = sum_counts(counts)
    lines = _top(model, f"{kept / total:.1%} of the weights of {len(counts)} tensors", "weight-pruning", method)
    lines[-1] += f"Of the {total:,} weights of these tensors {kept:,} stay;"
    if is_adapted(model):
        lines += ["the others are zero, in the adapter that this folder holds or in its base model, and load with", ""]
        lines += ["`PeftModel.from_pretrained`. Merged by `hf_plugin.merge_pruned` the base model's zeros stay.", ""]
    elif recipe_of(model) is None:
        needed = _packages(model)
        lines += [f"the others are zero, so the model loads with `from_pretrained` and needs {needed}.", ""]
    else:
        lines += ["the others are zero. Heads were cut out before.", "", "## Loading", "", *_loading(model)]
    lines += _results(scores, dataset)
    return "\n".join([*lines, *weight_section(counts, left_dense), *_options(options)])


def dense_card(model: nn.Module, scores: Optional[Mapping[str, float]], dataset: Optional[str]) -> str:
    """The README.md of a model of which nothing was pruned.

    Args:
        model: the model.
        scores: metric name to value.
        dataset: what they were measured on, and the model trained.
    """
    base = getattr(model.config, "_name_or_path", "") or "the model"
    lines = ["---", "library_name: transformers", "---", "", f"# {type(model).__name__}", ""]
    lines += [f"Made from `{base}`{f' by fine-tuning on {dataset}' if dataset else ''}; nothing was pruned.", ""]
    if is_fake_quantized(model):
        lines += [f"The model loads with `from_pretrained` and needs {_packages(model)}.", ""]
    return "\n".join([*lines, *_results(scores, dataset)])


def weight_section(counts: Mapping[str, WeightCount], left_dense: Mapping[str, int] = {}) -> list[str]:
    """The lines of a card that show the densities of pruned weights. Arguments are those of :func:`weight_card`."""
    lines = ["## Weights that stay", ""]
    total = sum_counts(counts)
    if total.dense != total.left:
        lines += [f"Weights of removed heads do not count: {total} stay.", ""]
    if left_dense:
        number, matrices = sum(left_dense.values()), "matrices" if len(left_dense) > 1 else "matrix"
        lines += [f"Not pruned: {number:,} weights of {len(left_dense)} {matrices}, {numbered(left_dense)}.", ""]
    return [*lines, f"![densities]({DENSITY_PICTURE})", ""]


def _packages(model: nn.Module) -> str:
    """What a model that is saved needs beside transformers."""
    return "torchao, as its linear layers hold 8-bit integers" if is_fake_quantized(model) else "no other package"


def _top(model: nn.Module, left: str, tag: str, method: str) -> list[str]:
    named = getattr(model.config, "_name_or_path", "")
    base, library = named or "the model", "peft" if is_adapted(model) else "transformers"
    lines = ["---", f"library_name: {library}", *([f"base_model: {named}"] if named and is_adapted(model) else [])]
    lines += ["tags:", f"- {tag}", f"- {method}", "---", ""]
    lines += [f"# {type(model).__name__} with {left}", ""]
    return [*lines, f"Made from `{base}` with the pruning method `{method}`. "]


def _results(scores: Optional[Mapping[str, float]], dataset: Optional[str]) -> list[str]:
    if not scores:
        return []
    rows = [(key, f"{value:.4f}" if isinstance(value, float) else value) for key, value in scores.items()]
    return [f"## Results{' on ' + dataset if dataset else ''}", "", markdown_table(("metric", "value"), rows), ""]


def _options(options: Mapping[str, Any]) -> list[str]:
    shown = {
        key: f"{value:g}" if isinstance(value, float) else value
        for key, value in options.items()
        if value is not None and value is not False
    }
    return ["## Options", "", markdown_table(("option", "value"), list(shown.items())), ""]


def _numbers(before: int, after: int) -> list[str]:
    rows = [("before", f"{before:,}"), ("after", f"{after:,} ({after / before:.1%})")]
    return markdown_table(("parameters", ""), rows).splitlines()


def is_adapted(model: nn.Module) -> bool:
    """Whether PEFT's adapters are on the model: then they alone are saved."""
    return hasattr(model, "peft_config")


def _loading_adapter(model: nn.Module) -> list[str]:
    base = "" if getattr(model.config, "_name_or_path", "") else ", base_model"
    return [
        "## Loading",
        "",
        "```python",
        "import hf_plugin",
        "",
        f'model = hf_plugin.load_pruned_peft("FOLDER"{base})  # the adapter, and its heads masked',
        'hf_plugin.merge_and_cut(model, "COMPACT")  # or: merged, and the heads cut out',
        "```",
        "",
        "`PeftModel.from_pretrained` alone loads the adapter with all heads of the base model.",
        "",
    ]


def _loading(model: nn.Module) -> list[str]:
    name = type(model).__name__
    autos = [auto for auto, reference in auto_map(model).items() if reference.endswith(f".{name}")]
    auto = autos[0] if autos else name
    return [
        "```python",
        f"from transformers import {auto}",
        "",
        f'model = {auto}.from_pretrained("FOLDER", trust_remote_code=True)  # runs compact_heads.py of this folder',
        "```",
        "",
        "With the package head-pruning installed, `import hf_plugin` takes the place of `trust_remote_code=True`.",
        "",
    ]
