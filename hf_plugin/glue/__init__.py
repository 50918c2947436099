"""GLUE: its tasks, files and metrics, and the runs on them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .features import TaskData, load_task
    from .metrics import compute_metrics
    from .submission import write_predictions
    from .tasks import GlueTask, find_task

# Imported when first asked for: the metrics need neither datasets nor pyarrow.
_HOME = {
    "GlueTask": "tasks",
    "TaskData": "features",
    "compute_metrics": "metrics",
    "find_task": "tasks",
    "load_task": "features",
    "write_predictions": "submission",
}
__all__ = ["GlueTask", "TaskData", "compute_metrics", "find_task", "load_task", "write_predictions"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
