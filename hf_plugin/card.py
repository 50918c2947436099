"""The model card of a pruned model."""

from typing import Any, Mapping, Optional

from torch import nn

from head_pruning import HeadMask
from head_pruning.report.tables import head_table, markdown_table


def model_card(
    model: nn.Module,
    mask: HeadMask,
    *,
    method: str,
    options: Mapping[str, Any],
    scores: Optional[Mapping[str, float]] = None,
    dataset: Optional[str] = None,
) -> str:
    """Markdown with the metadata header that the hub reads.

    Args:
        model: the pruned model.
        mask: the heads that stay.
        method: name of the pruning method.
        options: its options.
        scores: metric name to value.
        dataset: what they were measured on.
    """
    name = type(model).__name__
    base = getattr(model.config, "_name_or_path", "") or "the model"
    shown = {key: value for key, value in options.items() if value is not None and value is not False}
    lines = ["---", "library_name: transformers", "tags:", "- head-pruning", f"- {method}", "---", ""]
    lines += [f"# {name} with {mask.kept} of {mask.keep.size} attention heads", ""]
    lines += [f"Made from `{base}` with the pruning method `{method}`. The weights of the removed heads are zero, so"]
    lines += ["the model loads with `from_pretrained` and needs no other package.", ""]
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
