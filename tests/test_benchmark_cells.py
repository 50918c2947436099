"""The runner of the benchmarks' cells."""

from types import SimpleNamespace

import pytest

from benchmarks.cells import run_cells


def test_cells_wait_for_what_they_start_from_and_failures_come_last():
    cells = [SimpleNamespace(name=name) for name in ("after", "broken", "first")]
    order, written = [], []

    def run(cell):
        order.append(cell.name)
        if cell.name == "broken":
            raise RuntimeError("it broke")
        return [{"heads": 4, "score": float(len(order)), "cell": cell.name}]

    with pytest.raises(SystemExit, match="1 cells failed"):
        run_cells(
            cells,
            run,
            jobs=1,
            ready=lambda cell: cell.name != "after" or "first" in order,
            score="score",
            write=lambda rows: written.append([row["cell"] for row in rows]),
        )
    assert order == ["broken", "first", "after"] and written[-1] == ["after", "first"]


def test_cells_that_can_never_start_are_named():
    with pytest.raises(SystemExit, match="error: lonely start from cells"):
        run_cells([SimpleNamespace(name="lonely")], list, jobs=1, ready=lambda _: False, score="s", write=print)
