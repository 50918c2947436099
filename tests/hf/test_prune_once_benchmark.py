"""The benchmark of Prune Once for All: what waits for what, and three of its cells on a tiny model."""

import dataclasses
import json

import pytest

from benchmarks.prune_once import PAGE, PRETRAINING, OnceBench, cells
from benchmarks.spd_glue import write_results
from tests.hf.script_runs import write_task
from tests.hf.squad_files import write_bert, write_squad


def test_each_cell_comes_after_the_one_that_it_starts_from():
    found = cells()
    assert len({cell.name for cell in found}) == len(found) == PAGE.cells
    for number, cell in enumerate(found):
        assert cell.after is None or cell.after in found[:number], cell.name
        assert cell.start is None or (cell.start.keep or cell.keep) == cell.keep, cell.name


@pytest.mark.slow
def test_a_teacher_a_student_and_its_transfer(tmp_path):
    pytest.importorskip("sentencex")
    write_task(tmp_path / "glue", "SST-2")
    data = (write_bert(tmp_path / "model"), tmp_path / "glue", write_squad(tmp_path / "squad", train=200))
    bench, rows = OnceBench(*data, tmp_path / "work", threads=1), []
    teacher, student, transfer, *_ = cells()
    short = ("--max_steps", "8")
    for cell in (teacher, student):
        rows += bench.run(dataclasses.replace(cell, options=(*cell.options, *short)))
    rows += bench.run(transfer)
    assert [row["task"] for row in rows] == [PRETRAINING, PRETRAINING, "SST-2"] and rows[0]["density"] == 1.0
    matrices = json.loads((tmp_path / "work/runs" / student.name / "pruning.json").read_text())["weights"]
    assert all(kept == n - int(0.85 * n) for kept, n in matrices["kept_by_tensor"].values())
    assert rows[1]["density"] == matrices["weights_kept"] / matrices["weights_total"]
    assert 0 <= rows[1]["density"] - rows[2]["density"] < 1e-3
    assert not list(tmp_path.glob("work/runs/*/checkpoint-*"))
    told = json.loads((tmp_path / "work/runs" / teacher.name / "all_results.json").read_text())
    assert rows[0]["score"] == told["eval_perplexity"]
    write_results(PAGE, rows, tmp_path / "results")
    text = (tmp_path / "results" / "prune_once.md").read_text()
    assert "pretraining, perplexity of masked words; teacher" in text and "3 of 75 trainings" in text
    assert bench.run(transfer) == rows[2:]
