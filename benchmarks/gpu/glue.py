"""The GLUE grid on one GPU, cell by cell inside a time budget: every method at four numbers of heads, three seeds.

glue.sh checks what is needed and calls this module; see the README beside it.
"""

import argparse
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import re
import statistics
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Optional

from benchmarks.tables import STORED, by_share
from head_pruning.files import atomic_path, write_json

from .glue_grid import (
    BATCH,
    HEADS,
    KEPT,
    MICHEL_BATCH,
    MICHEL_EXAMPLES,
    MICHEL_ROUND,
    NAME,
    PLAN,
    TABLE,
    TASKS,
    Cell,
    cells,
    dense_folder,
)

RESULTS = STORED / "gpu-glue"
FINISH = 8  # seconds kept for tables and pictures
MOST_FAILURES = 5  # then something is wrong beyond one cell


class Results:
    """The rows of this call and of earlier ones with the same settings, by cell and number of heads.

    Args:
        settings: what rows of other calls must agree in.
        grid: the cells as they are asked for now; rows of others are left out.
    """

    def __init__(self, settings: dict, grid: list[Cell]) -> None:
        self.settings = settings
        self.options = {cell.name: list(cell.options) for cell in grid}
        self.order = {name: i for i, name in enumerate(self.options)}
        self.rows: dict[tuple[str, int], dict] = {}

    def read(self, folder: Path, *, strict: bool = False) -> None:
        """Take the rows of a folder. With ``strict`` a file of other settings ends the call, else it is left alone."""
        file = folder / f"{NAME}.json"
        if not file.exists():
            return
        data = json.loads(file.read_text())
        if data["settings"] == self.settings:
            self.add([row for row in data["rows"] if row["options"] == self.options.get(row["cell"])])
        elif strict:
            sys.exit(f"error: {file} is of another pack, device or --updates; choose another folder with OUT.")

    def add(self, rows: list[dict]) -> None:
        """Take new rows; of a cell measured twice the newest stay."""
        self.rows.update({(row["cell"], row["heads"]): row for row in rows})

    def has(self, cell: Cell) -> bool:
        """Whether the cell was measured."""
        return (cell.name, min(KEPT) if cell.michel else cell.keep or HEADS) in self.rows

    def sorted(self) -> list[dict]:
        """All rows in the order of the grid."""
        return sorted(self.rows.values(), key=lambda row: (self.order[row["cell"]], -row["heads"]))

    def write(self, folder: Path) -> None:
        """Write the JSON."""
        write_json(folder / f"{NAME}.json", {"settings": self.settings, "rows": self.sorted()})

    def seconds(self) -> dict[str, list[float]]:
        """Seconds of every cell by task."""
        single = {row["cell"]: row for row in self.rows.values()}
        found: dict[str, list[float]] = {}
        for row in single.values():
            found.setdefault(row["task"], []).append(row["seconds"])
        return found

    def write_table(self, folder: Path) -> None:
        """Write the Markdown."""
        rows = self.sorted()
        recipe = ", ".join(f"{task.name} {task.epochs:g}" for task in TASKS.values())
        took = ", ".join(f"{task} {statistics.median(each):.1f}" for task, each in self.seconds().items())
        devices = ", ".join(sorted({f"{row['device']} ({row['jobs']} cells at a time)" for row in rows}))
        shortened = f" At most {self.settings['updates']} updates per training." if self.settings["updates"] else ""
        text = [
            "# Score over heads kept on GLUE, on a GPU",
            "",
            f"`bash benchmarks/gpu/glue.sh`: {self.settings['model']}, {HEADS} heads; batch {BATCH}, learning rate "
            f"5e-5, warm-up 6 %, bf16 over float32 weights; epochs: {recipe}, the same for pipelined pruning, which "
            "starts from the dense model. Validation sets; of several seeds the mean (lowest to highest). Michel: "
            f"importance over at most {MICHEL_EXAMPLES} training examples, {MICHEL_ROUND} heads per round, no "
            f"training after it.{shortened}",
            "",
            f"{devices}; seconds per cell (median): {took}.",
            "",
            *self.tables(None),
        ]
        with atomic_path(folder / f"{NAME}.md") as temporary:
            temporary.write_text("\n".join(text).rstrip() + "\n")

    def tables(self, folder: Optional[Path]) -> list[str]:
        """A table for each task, and its picture in ``folder``."""
        rows = [
            {"task": r["task"], "method": r["method"], "heads_kept": str(r["heads"]), "score": str(r["score"] / 100)}
            for r in self.sorted()
        ]
        tasks = {name: f"{task.metric} x 100" for name, task in TASKS.items()}
        return by_share(NAME, {**TABLE, "tasks": tasks}, PLAN, rows, folder)

    def write_pictures(self, folder: Path) -> None:
        """Draw the pictures, where matplotlib is."""
        try:
            self.tables(folder)
        except ModuleNotFoundError as error:
            print(f"{error.name} is missing here: draw the pictures elsewhere with glue.sh --report", flush=True)


class Estimates:
    """How long a cell will take, from those measured."""

    def __init__(self, results: Results, examples: dict[str, dict[str, int]]) -> None:
        self.results, self.examples = results, examples

    def passes(self, cell: Cell) -> int:
        """Forward and backward passes of a cell."""
        rows, most = self.examples[cell.task]["train"], self.results.settings["updates"]
        if cell.michel:
            batches = math.ceil(min(rows, MICHEL_EXAMPLES) / MICHEL_BATCH)
            rounds = (HEADS - min(KEPT)) // MICHEL_ROUND if "--exact_pruning" in cell.options else 1
            return min(batches, most or batches) * rounds
        updates = math.ceil(TASKS[cell.task].epochs * math.ceil(rows / BATCH))
        return min(updates, most or updates)

    def seconds(self, cell: Cell) -> float:
        """The longest of the same task and method, else by the number of passes; 0 while nothing is known."""
        cells = {row["cell"]: row for row in self.results.rows.values()}.values()
        same = [row["seconds"] for row in cells if (row["task"], row["method"]) == (cell.task, cell.method)]
        if same:
            return max(same)
        rates = [row["seconds"] / row["passes"] for row in cells]
        return statistics.median(rates) * self.passes(cell) if rates else 0.0


@dataclass
class Worker:
    """A process that measures one cell after another."""

    process: multiprocessing.Process
    connection: Connection
    log: Path
    cell: Optional[Cell] = None


class Pool:
    """So many workers; each pays for its imports once."""

    def __init__(self, count: int, logs: Path, *bench: object) -> None:
        self.context = multiprocessing.get_context("spawn")
        self.logs, self.bench = logs, bench
        logs.mkdir(parents=True, exist_ok=True)
        self.workers = [self._start(logs / f"worker{i}.log") for i in range(count)]

    def _start(self, log: Path) -> Worker:
        here, there = self.context.Pipe()
        process = self.context.Process(target=_work, args=(log, there, *self.bench), daemon=True)
        process.start()
        there.close()
        return Worker(process, here, log)

    @property
    def busy(self) -> list[Worker]:
        """The workers that have a cell."""
        return [worker for worker in self.workers if worker.cell]

    def give(self, worker: Worker, cell: Cell) -> None:
        """Have an idle worker measure a cell."""
        worker.cell = cell
        with contextlib.suppress(BrokenPipeError):  # it died: collect() tells
            worker.connection.send(cell)

    def collect(self, seconds: float) -> list[tuple[Cell, "list[dict] | str"]]:
        """What is done within so many seconds: rows, or the text of an error. A worker that failed is replaced."""
        ready = wait([worker.connection for worker in self.busy], timeout=max(0.0, seconds))
        done = []
        for worker in [worker for worker in self.busy if worker.connection in ready]:
            try:
                outcome = worker.connection.recv()
            except (EOFError, ConnectionError):
                lines = worker.log.read_text(errors="replace").split("\n") if worker.log.exists() else []
                outcome = f"its process died ({next((line for line in reversed(lines) if line), 'without a word')})"
            done.append((worker.cell, outcome))
            worker.cell = None
            if isinstance(outcome, str):
                done[-1] = (done[-1][0], f"{outcome}; see {worker.log}")
                self._end(worker)
                self.workers[self.workers.index(worker)] = self._start(worker.log)
        return done

    def _end(self, worker: Worker) -> None:
        worker.connection.close()
        worker.process.terminate()
        worker.process.join(timeout=10)

    def stop(self) -> None:
        """End all workers, whatever they are at."""
        for worker in self.workers:
            self._end(worker)


def _work(log: Path, connection: Connection, *bench: object) -> None:
    """Main function of a worker; all it prints goes to a log."""
    stream = log.open("a", buffering=1)
    for descriptor in (1, 2):
        os.dup2(stream.fileno(), descriptor)
    from .glue_cells import serve

    serve(connection, *bench)


class Grid:
    """Measures what is missing until it is done or the time is over.

    Args:
        wanted: cells, most important first.
        results: what is measured.
        estimates: how long cells take.
        work: the folder of the dense models.
        deadline: time at which everything stops.
    """

    def __init__(
        self, wanted: list[Cell], results: Results, estimates: Estimates, work: Path, deadline: float
    ) -> None:
        self.results, self.estimates, self.work, self.deadline = results, estimates, work, deadline
        missing = [cell for cell in wanted if not results.has(cell)]
        starts = dict.fromkeys(cell.dense for cell in missing if cell.after_dense and not self.ready(cell))
        self.waiting = [*(cell for cell in starts if cell not in missing), *missing]
        self.failed: list[str] = []

    def ready(self, cell: Cell) -> bool:
        """Whether what the cell starts from is there."""
        return not cell.after_dense or dense_folder(self.work, cell.dense).exists()

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.time()

    def next(self) -> Optional[Cell]:
        """Take the first cell that can start now and should be done in time."""
        for cell in self.waiting:
            if self.ready(cell) and self.estimates.seconds(cell) < self.left():
                self.waiting.remove(cell)
                return cell
        return None

    def run(self, pool: Pool, out: Path) -> int:
        """Measure; returns how many cells were."""
        measured = 0
        while True:
            for worker in pool.workers:
                cell = None if worker.cell else self.next()
                if cell:
                    pool.give(worker, cell)
            if not pool.busy or self.left() <= 0 or len(self.failed) >= MOST_FAILURES:
                break
            for cell, outcome in pool.collect(self.left()):
                if isinstance(outcome, str):
                    self.failed.append(cell.name)
                    print(f"error: {cell.name}: {outcome}", flush=True)
                    continue
                measured += 1
                passes = self.estimates.passes(cell)
                self.results.add([{**row, "passes": passes, "jobs": len(pool.workers)} for row in outcome])
                for folder in (self.work, out):
                    self.results.write(folder)
                self.results.write_table(out)
                told = ", ".join(f"{row['heads']} heads {row['score']:.2f}" for row in outcome)
                seconds = outcome[0]["seconds"]
                print(f"{cell.name}: {told} ({seconds:.1f} s, {passes / seconds:.0f} passes/s)", flush=True)
        unfinished = [worker.cell for worker in pool.busy]
        if unfinished:
            print(f"stopped: {', '.join(cell.name for cell in unfinished)}", flush=True)
        self.waiting += unfinished
        return measured


def settings_of(pack: Path, device: str, updates: Optional[int]) -> tuple[dict, dict[str, dict[str, int]]]:
    """What all rows of a table must agree in, and the numbers of examples."""
    data = json.loads((pack / "pack.json").read_text())
    return {"model": data["model"], "pack": data["digest"], "device": device, "updates": updates}, data["rows"]


def report(out: Path) -> None:
    """Write table and pictures anew from a folder's rows."""
    file = out / f"{NAME}.json"
    if not file.exists():
        sys.exit(f"error: there is no {file}; measure first, or name its folder with OUT.")
    results = Results(json.loads(file.read_text())["settings"], cells())
    results.read(out)
    results.write_table(out)
    results.write_pictures(out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="glue.sh", description=__doc__)
    parser.add_argument("--budget", type=float, default=540, help="seconds for the whole call")
    parser.add_argument("--jobs", type=int, default=8, help="cells at a time")
    parser.add_argument("--only", help="regular expression on the names of cells")
    parser.add_argument("--updates", type=int, help="at most so many updates per training, to try things")
    parser.add_argument("--list", action="store_true", help="print the names of the cells, most important first")
    parser.add_argument("--report", action="store_true", help="only write table and pictures of what OUT holds")
    options = parser.parse_args()
    out, device = Path(os.environ["OUT"]), os.environ["DEVICE"]
    wanted = [cell for cell in cells() if not options.only or re.search(options.only, cell.name)]
    if options.list:
        print("\n".join(cell.name for cell in wanted))
        return
    if options.report:
        report(out)
        return
    if not wanted:
        sys.exit(f"error: no cell's name matches {options.only}; --list shows them.")
    started = float(os.environ.get("STARTED", time.time()))
    pack = Path(os.environ["PACK"])
    settings, examples = settings_of(pack, device, options.updates)
    # Models and rows of other settings lie in other folders.
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    work = Path(os.environ["WORK"]) / digest
    results = Results(settings, cells())
    for folder in (RESULTS, work, out):
        results.read(folder, strict=folder == out)
    grid = Grid(wanted, results, Estimates(results, examples), work, started + options.budget - FINISH)
    here = sum(results.has(cell) for cell in wanted)
    print(f"{here} of {len(wanted)} cells are there, {len(grid.waiting)} to measure", flush=True)
    begin, measured = time.time(), 0
    if grid.waiting:
        jobs = min(options.jobs, len(grid.waiting))
        pool = Pool(jobs, work / "logs", pack, work, device, options.updates)
        try:
            measured = grid.run(pool, out)
        finally:
            pool.stop()
    out.mkdir(parents=True, exist_ok=True)
    if results.rows:
        results.write(out)
        results.write_table(out)
        results.write_pictures(out)
        print((out / f"{NAME}.md").read_text())
    if measured:
        seconds = time.time() - begin
        rest = sum(grid.estimates.seconds(cell) for cell in grid.waiting) / options.jobs
        print(
            f"{measured} cells in {seconds:.0f} s with {jobs} at a time: {seconds * jobs / measured:.1f} s per cell, "
            f"{60 * measured / seconds:.1f} cells per minute; {len(grid.waiting)} are left, about {rest:.0f} s"
        )
    print(f"{time.time() - started:.0f} s in all")
    sys.exit(f"error: {', '.join(grid.failed)} failed; the others were written." if grid.failed else 0)


if __name__ == "__main__":
    main()
