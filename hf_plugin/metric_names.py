"""Metrics of GLUE tasks, also under the names that transformers 3 had for them."""

from typing import Optional

from head_pruning import HeadPruningError

from .data.tasks import GlueTask

# What transformers 3 called the metrics of some tasks; the others had their names of today.
_PUBLISHED = {"accuracy": "acc", "matthews_correlation": "mcc"}


def published_names(task: GlueTask) -> dict[str, str]:
    """The names of transformers 3 for metrics of ``task``, by the metrics of today."""
    names = {**_PUBLISHED, "combined_score": "corr" if task.regression else "acc_and_f1"}
    return {metric: names[metric] for metric in task.metrics if metric in names}


def find_metric(name: Optional[str], task: GlueTask) -> tuple[str, str]:
    """The validation set and the metric of ``task`` that ``name`` means.

    Args:
        name: ``accuracy``, ``acc`` as the published scripts have it, or with a validation set in front of it
            (``mnli-mm/acc``); None for the main metric of the first set.
        task: the task.

    Returns:
        The set's key in ``TaskData.validation``, and the metric's key in the results.

    Raises:
        HeadPruningError: the task has no such metric, or no such validation set.
    """
    sets = [split.key for split in task.validation]
    where, _, metric = (name or task.main_metric).rpartition("/")
    published = published_names(task)
    metric = {old: new for new, old in published.items()}.get(metric, metric)
    if metric not in task.metrics or where and where not in sets:
        known = ", ".join(f"{m} ({published[m]})" if m in published else m for m in task.metrics)
        first = f", with {' or '.join(f'{key}/' for key in sets)} before it for one of the sets" if sets[1:] else ""
        raise HeadPruningError(f"{task.folder} has no metric {name}; give --metric_name one of {known}{first}.")
    return where or sets[0], metric
