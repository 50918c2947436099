"""The compact model beside a run's own, and how large and how fast it is."""

from pathlib import Path

from head_pruning.cli import main

from ..host import export_compact

FOLDER = "compact"


def leave_compact(folder: "str | Path") -> None:
    """Write what is left of a run's model into ``compact/`` in its folder, and print its size and its speed."""
    folder = Path(folder)
    print(export_compact(folder, folder / FOLDER))
    main(["benchmark", str(folder), "--batch", "8", "--rounds", "3"])
