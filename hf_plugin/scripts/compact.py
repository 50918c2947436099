"""The compact model beside a run's own, and how large and how fast it is."""

import logging
from pathlib import Path

from head_pruning import HeadPruningError
from head_pruning.cli import build_parser
from head_pruning.commands.benchmark import measured, table
from head_pruning.files import write_json

from ..host import export_compact

FOLDER = "compact"
#: Sizes and speed of the dense and the compact model, as ``head-pruning benchmark --json`` prints them.
SPEED = "benchmark.json"

logger = logging.getLogger(__name__)


def leave_compact(folder: "str | Path") -> None:
    """Write what is left of a run's model into ``compact/`` in its folder, and print its size and its speed.

    A model that cannot be cut, such as one of 8-bit weights, stays as it is, and the log says why.
    """
    folder = Path(folder)
    try:
        print(export_compact(folder, folder / FOLDER))
    except HeadPruningError as error:
        logger.warning("%s/ is not written: %s", FOLDER, error)
        return
    found = measured(build_parser().parse_args(["benchmark", str(folder), "--batch", "8", "--rounds", "3"]))
    write_json(folder / FOLDER / SPEED, found)
    print(table(found))
