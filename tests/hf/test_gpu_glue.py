"""The GLUE grid of the GPU machine, on the CPU with a tiny model: packed, measured, and not measured again."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.hf.script_runs import write_model, write_task

TASKS = ("CoLA", "MRPC", "RTE", "SST-2")
CELLS = "CoLA-(pipelined-DSP-18|Michel-one-shot)-s1"


@pytest.fixture
def bash(repo, tmp_path):
    """Runs one of the scripts; returns its output and its errors."""
    places = {"PACK": tmp_path / "pack", "WORK": tmp_path / "work", "OUT": tmp_path / "out"}
    env = {**os.environ, **{name: str(place) for name, place in places.items()}}
    env |= {"PYTHON": sys.executable, "DEVICE": "cpu", "OMP_NUM_THREADS": "1"}

    def call(script: str, *arguments: str) -> tuple[str, str]:
        done = subprocess.run(
            ["bash", f"benchmarks/gpu/{script}", *map(str, arguments)],
            cwd=repo, env=env, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        return done.stdout, done.stderr

    return call


@pytest.mark.slow
def test_cells_are_packed_measured_once_and_tabulated(bash, tmp_path):
    model = write_model(tmp_path / "model", num_hidden_layers=6)  # 72 heads
    for task in TASKS:
        write_task(tmp_path / "data", task)
    said, _ = bash("pack-glue.sh", model, tmp_path / "data", tmp_path / "pack")
    assert "of 64 MiB" in said
    with np.load(tmp_path / "pack" / "MRPC.npz") as arrays:
        assert arrays["train.ids"].dtype == np.uint16 and arrays["validation.lengths"].size == 24
        assert set(np.unique(arrays["train.types"])) == {0, 1}

    said, errors = bash("glue.sh", "--jobs", "1", "--only", CELLS)
    # The dense model is trained too, since both start from it.
    assert "3 to measure" in said and "3 cells in" in said, said + errors
    file = tmp_path / "out" / "glue-gpu.json"
    rows = json.loads(file.read_text())["rows"]
    heads = {
        method: [row["heads"] for row in rows if row["method"] == method] for method in ("dense", "pipelined DSP")
    }
    assert heads == {"dense": [72], "pipelined DSP": [18]}
    assert [row["heads"] for row in rows if row["method"] == "Michel, one-shot"] == [36, 18, 9, 6]
    for row in rows:
        assert -100 <= row["score"] <= 100 and row["seconds"] > 0
        assert (row["kept"] or "#" * 72).count("#") == row["heads"]
    table = (tmp_path / "out" / "glue-gpu.md").read_text()
    assert "| Michel, one-shot | " in table and "| pipelined DSP |  | " in table and "## CoLA" in table
    assert (tmp_path / "out" / "glue-gpu-CoLA.png").is_file()

    before = file.read_bytes()
    (tmp_path / "out" / "glue-gpu.md").unlink()
    said, errors = bash("glue.sh", "--jobs", "1", "--only", CELLS)
    assert "2 of 2 cells are there, 0 to measure" in said, said + errors
    assert file.read_bytes() == before
    assert (tmp_path / "out" / "glue-gpu.md").read_text() == table

    _, errors = bash("glue.sh", "--only", CELLS, "--updates", "1")
    assert errors.startswith("error: ") and errors.count("\n") == 1 and "OUT" in errors


def test_the_grid_is_complete_and_starts_with_what_matters_most():
    from benchmarks.gpu.glue_grid import TASKS as tasks
    from benchmarks.gpu.glue_grid import cells

    grid = cells()
    assert len({cell.name for cell in grid}) == len(grid) == len(tasks) * 3 * (1 + 2 + 4 * 6)
    position = {cell.name: i for i, cell in enumerate(grid)}
    assert all(position[cell.dense.name] < position[cell.name] for cell in grid if cell.after_dense)
    first = grid[: len(tasks) * (1 + 2 + 2 * 6)]
    assert {cell.seed for cell in first} == {1} and {cell.keep for cell in first} == {None, 18, 6}


def test_a_batch_holds_the_rows_and_masks_the_rest():
    from benchmarks.gpu.glue_pack import collate

    rows = [
        {"input_ids": np.array(ids, np.uint16), "token_type_ids": np.array(types, np.uint8), "label": np.uint8(label)}
        for ids, types, label in (([2, 60000, 3], [0, 0, 1], 1), ([7] * 9, [0] * 9, 0))
    ]
    batch = collate(rows)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        **dict.fromkeys(("input_ids", "token_type_ids", "attention_mask"), (2, 16)),
        "labels": (2,),
    }
    assert batch["input_ids"][0, :3].tolist() == [2, 60000, 3] and batch["token_type_ids"][0, 2] == 1
    assert batch["attention_mask"].sum(1).tolist() == [3, 9] and batch["labels"].tolist() == [1, 0]


def test_without_a_pack_one_sentence_says_what_to_run(bash):
    _, errors = bash("glue.sh")
    assert errors.startswith("error: ") and errors.count("\n") == 1 and "pack-glue.sh" in errors
