"""The model card of a pruned model."""

from typing import Any, Mapping, Optional

from torch import nn

from head_pruning import HeadMask
from head_pruning.report.tables import head_table, markdown_table
from head_pruning.surgery import recipe_of

from .compact_heads import auto_map


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
    name = type(model).__name__
    base = getattr(model.config, "_name_or_path", "") or "the model"
    shown = {key: value for key, value in options.items() if value is not None and value is not False}
    lines = ["---", "library_name: transformers", "tags:", "- head-pruning", f"- {method}", "---", ""]
    lines += [f"# {name} with {mask.kept} of {mask.keep.size} attention heads", ""]
    lines += [f"Made from `{base}` with the pruning method `{method}`. "]
    if parameters is not None:
        lines[-1] += "The removed heads are cut out of the weights."
        lines += ["", *_numbers(*parameters), "", "## Loading", "", *_loading(model)]
    elif recipe_of(model) is None:
        lines[-1] += "The weights of the removed heads are zero, so"
        lines += ["the model loads with `from_pretrained` and needs no other package.", ""]
    else:
        lines[-1] += "The weights of the removed heads are zero;"
        lines += ["others were cut out before.", "", "## Loading", "", *_loading(model)]
    if scores:
        rows = [(key, f"{value:.4f}" if isinstance(value, float) else value) for key, value in scores.items()]
        lines += [
            f"## Results{' on ' + dataset if dataset else ''}",
            "",
            markdown_table(("metric", "value"), rows),
            "",
        ]
    lines += ["## Heads that stay", "", "```", head_table(mask), "```", "", "![heads](head_mask.png)", ""]
    lines += ["## Options", "", markdown_table(("option", "value"), list(shown.items())), ""]
    return "\n".join(lines)


def _numbers(before: int, after: int) -> list[str]:
    rows = [("before", f"{before:,}"), ("after", f"{after:,} ({after / before:.1%})")]
    return markdown_table(("parameters", ""), rows).splitlines()


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
