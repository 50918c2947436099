"""GLUE's metrics, under the names of transformers' GLUE example."""

import logging
from typing import TYPE_CHECKING, Any, Callable

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef

from head_pruning import HeadPruningError

from .tasks import GlueTask

if TYPE_CHECKING:
    from transformers import EvalPrediction
from typing import Optional

logger = logging.getLogger(__name__)


def compute_metrics(task: GlueTask) -> "Callable[[EvalPrediction], dict[str, float]]":
    """The ``compute_metrics`` of a Trainer for ``task``.

    CoLA: ``matthews_correlation``. STS-B: ``pearson``, ``spearmanr`` and ``combined_score``, their mean. MRPC and QQP:
    ``accuracy``, ``f1`` (of the class written 1) and ``combined_score``, their mean. The others: ``accuracy``. Where a
    correlation is undefined, because all predictions or all labels are equal, it counts 0.

    The function raises HeadPruningError where predictions are not finite or do not fit the labels.
    """

    def compute(prediction: "EvalPrediction") -> dict[str, float]:
        return score(task, predicted(task, prediction.predictions), np.asarray(prediction.label_ids))

    return compute


def predicted(task: GlueTask, outputs: Any) -> np.ndarray:
    """What a model's outputs say.

    Args:
        task: the task.
        outputs: logits of shape (rows, ``task.num_labels``), or a tuple that begins with them; or what is returned.

    Returns:
        Of shape (rows,): class numbers (int64), or scores (float64) for a regression task.

    Raises:
        HeadPruningError: the shape or the numbers do not fit the task.
    """
    values = np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs)
    decided = values.ndim == 1
    if not decided and (values.ndim != 2 or values.shape[1] != task.num_labels):
        raise HeadPruningError(
            f"{task.folder} needs outputs of shape (rows, {task.num_labels}), but theirs is {values.shape}; "
            f"load the model with num_labels={task.num_labels}."
        )
    if not np.isfinite(values).all():
        raise HeadPruningError(f"The model's outputs for {task.folder} are not finite; lower the learning rate.")
    if task.regression:
        return values.reshape(-1).astype(np.float64)
    if not decided:
        return values.argmax(axis=1)
    numbers = values.astype(np.int64)
    if (numbers != values).any() or not np.isin(numbers, range(task.num_labels)).all():
        raise HeadPruningError(f"The predictions for {task.folder} are no class numbers below {task.num_labels}.")
    return numbers


def score(task: GlueTask, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The task's metrics for predictions and labels of shape (rows,); see :func:`compute_metrics`."""
    labels = labels.reshape(-1)
    if len(labels) != len(predictions) or not len(labels):
        raise HeadPruningError(
            f"{task.folder} has {len(predictions)} predictions for {len(labels)} labels; score a labelled split whole."
        )
    if "f1" in task.metrics and task.written is not None:
        positive = task.written.index("1")
        predictions, labels = predictions == positive, labels == positive
    results = {name: _METRICS[name](predictions, labels) for name in task.metrics if name in _METRICS}
    if "combined_score" in task.metrics:
        results["combined_score"] = sum(results.values()) / len(results)
    return results


def _accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    return float((predictions == labels).mean())


def _f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    return float(f1_score(labels, predictions, zero_division=0.0))


def _matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    # Undefined for constants; 0 is the usual convention, and scikit-learn warns of a single class.
    return 0.0 if _constant(predictions, labels) else float(matthews_corrcoef(labels, predictions))


def _pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    if _constant(predictions, labels):
        logger.warning("All predictions or all labels are equal, so their correlation is undefined; it counts 0.")
        return 0.0
    return float(pearsonr(predictions, labels).statistic)


def _spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    return 0.0 if _constant(predictions, labels) else float(spearmanr(predictions, labels).statistic)


def _constant(*arrays: np.ndarray) -> bool:
    return any(np.ptp(array) == 0 for array in arrays)


_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews_correlation": _matthews,
    "pearson": _pearson,
    "spearmanr": _spearman,
}

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
