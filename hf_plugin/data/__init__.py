"""The data that the scripts train and evaluate on."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .glue import TaskData, load_task
    from .metrics import compute_metrics
    from .submission import write_predictions
    from .tasks import GlueTask, find_task

# Imported when first asked for: the metrics need neither datasets nor pyarrow.
_HOME = {
    "GlueTask": "tasks",
    "TaskData": "glue",
    "compute_metrics": "metrics",
    "find_task": "tasks",
    "load_task": "glue",
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
