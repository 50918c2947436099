"""The data that the scripts train and evaluate on."""

from .glue import TaskData, load_task
from .metrics import compute_metrics
from .submission import write_predictions
from .tasks import GlueTask, find_task

__all__ = ["GlueTask", "TaskData", "compute_metrics", "find_task", "load_task", "write_predictions"]
