"""GLUE: its tasks, files and metrics, and the runs on them."""

from typing import TYPE_CHECKING

from head_pruning.lazy import exports

if TYPE_CHECKING:
    from .features import TaskData, load_task
    from .metrics import compute_metrics
    from .submission import write_predictions
    from .tasks import GlueTask, find_task

__all__ = ["GlueTask", "TaskData", "compute_metrics", "find_task", "load_task", "write_predictions"]
# Imported when first asked for: the metrics need neither datasets nor pyarrow.
__getattr__ = exports(
    __name__,
    {
        "GlueTask": "tasks",
        "TaskData": "features",
        "compute_metrics": "metrics",
        "find_task": "tasks",
        "load_task": "features",
        "write_predictions": "submission",
    },
)
