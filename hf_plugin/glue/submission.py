"""Prediction files as the GLUE benchmark takes them."""

import logging
from pathlib import Path
from typing import Any, Optional, Sequence

from head_pruning import HeadPruningError
from head_pruning.files import atomic_path

from .metrics import predicted
from .reading import SCORES
from .tasks import GlueTask

logger = logging.getLogger(__name__)


def write_predictions(
    task: GlueTask, split: str, predictions: Any, folder: "str | Path", ids: Optional[Sequence[int]] = None
) -> Path:
    """Write the predictions for a test split, atomically, and return the file's path (``folder``/MNLI-m.tsv, ...).

    Lines are ``index<TAB>prediction`` under that header: classes as GLUE spells them (names for MNLI, QNLI and RTE,
    else 0 or 1), scores cut to 0..5 with three decimals.

    Args:
        task: the task the model learnt; its order of classes is the model's.
        split: the test split's name in ``TaskData.test``.
        predictions: logits of shape (rows, classes), or class numbers or scores of shape (rows,), in the file's order.
        folder: made if missing.
        ids: the index of each row, as ``TaskData.ids`` has them; None for 0, 1, 2, ...

    Raises:
        HeadPruningError: no such split, or the predictions do not fit the task or the indices.
    """
    chosen = next((test for test in task.test if test.key == split), None)
    if chosen is None or chosen.submission is None:
        known = ", ".join(test.key for test in task.test)
        raise HeadPruningError(f"{task.folder} has no test split {split!r}; choose one of {known}.")
    values = predicted(task, predictions)
    ids = range(len(values)) if ids is None else ids
    if len(ids) != len(values):
        raise HeadPruningError(
            f"There are {len(values)} predictions for {len(ids)} rows of {chosen.file}; give one for each row."
        )
    if len(values) != chosen.rows:
        logger.warning(
            "%s has %d rows, but there are %d predictions: GLUE takes whole files only.",
            chosen.file,
            chosen.rows,
            len(values),
        )
    if task.written is None:
        shown = [f"{value:.3f}" for value in values.clip(*SCORES)]
    else:
        shown = [task.written[value] for value in values]
    path = Path(folder) / chosen.submission
    with atomic_path(path) as temporary:
        lines = ["index\tprediction", *(f"{index}\t{value}" for index, value in zip(ids, shown))]
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
