"""The published IWSLT'14 recipe for every method, for as many updates as fit into a time budget.

iwslt14.sh installs what is needed and calls this module; see the README beside it.
"""

import argparse
import concurrent.futures
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch

from head_pruning import HeadMask
from head_pruning.files import write_json
from head_pruning.report.tables import markdown_table

ROOT = Path(__file__).resolve().parents[2]
NAME = "gpu-iwslt14"
HEADS = 72  # transformer_iwslt_de_en: 6 encoder layers, 6 decoder layers with two attentions each, 4 heads
MANUAL_WARMUP = 4000
WARMUP_SHARE = 0.2  # of training, where the manual's warm-up would be longer
PIPELINED_SHARE = 0.15  # updates of pipelined pruning over those of the model it starts from
RESERVE = 0.08  # of the training time: the measured speed may be off by this much
MIN_UPDATES = 50


class BudgetError(Exception):
    """The cells do not fit into the time budget."""


@dataclass(frozen=True)
class Cell:
    """One row of the table."""

    method: str
    options: tuple[str, ...] = ()
    after: Optional[str] = None  # the cell whose checkpoint this one starts from


def cells(cooldown: float) -> dict[str, Cell]:
    """Every cell, with the manual's flags; ``cooldown`` is the fraction of training that the temperature falls in."""
    count = ("--num-of-heads", "4", "--pruning-lr", "0.2")
    anneal = ("--annealing", "--initial-temperature", "0.1", "--final-temperature", "1e-8")
    anneal = (*anneal, "--cooldown-steps", str(cooldown))
    return {
        "dense": Cell("dense"),
        "dsp-4": Cell("joint DSP", (*count, "--joint-pruning", *anneal)),
        "ste-4": Cell("STE", (*count, "--joint-pruning", "--use-ste")),
        "voita": Cell("Voita (penalty 200)", ("--l0-penalty", "200")),
        "random-4": Cell("K random heads", ("--pruner", "random", "--num-of-heads", "4")),
        "pipelined-4": Cell("pipelined DSP", (*count, *anneal), after="dense"),
    }


@dataclass
class Plan:
    """How long everything runs."""

    updates: int
    stop_seconds: float  # training of a full-length cell is stopped after this, whatever it has reached


def plan(left: float, full: int, short: int, jobs: int, overhead: float, speed: Optional[float],
         updates: Optional[int]) -> Plan:  # fmt: skip
    """The number of updates that fits.

    Args:
        left: seconds until the deadline.
        full: cells of full length.
        short: cells of ``PIPELINED_SHARE`` of it, which run after the others.
        jobs: cells at a time.
        overhead: seconds per cell beside training (start, checkpoint, decoding).
        speed: updates per second with ``jobs`` cells at a time; may be None when ``updates`` is given.
        updates: fixed number instead.

    Raises:
        BudgetError: fewer than ``MIN_UPDATES`` fit.
    """
    rounds = math.ceil(full / jobs), math.ceil(short / jobs)
    beside = overhead * sum(rounds)
    seconds = (left - beside) / max(rounds[0] + PIPELINED_SHARE * rounds[1], PIPELINED_SHARE)
    fit = updates or int((1 - RESERVE) * max(seconds, 0) * speed)
    if seconds <= 0:
        raise BudgetError(
            f"{left:.0f} s are left and the cells need {beside:.0f} s beside training; raise --budget or name "
            "fewer cells."
        )
    if not updates and fit < MIN_UPDATES:
        raise BudgetError(f"only {fit} updates per cell fit into {left:.0f} s; raise --budget or name fewer cells.")
    return Plan(fit, seconds)


class Bench:
    """Trains and decodes cells in the work folder."""

    def __init__(self, work: Path, device: str, table: dict[str, Cell], jobs: int, deadline: float, extra: list[str]):
        self.work, self.device, self.table, self.jobs = work, device, table, jobs
        self.deadline, self.extra = deadline, extra
        self.data = work / "data-bin"
        self.env = {**os.environ, "OMP_NUM_THREADS": "2" if device == "cuda" else "1"}

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.time()

    def call(self, log: str, arguments: list[str]) -> str:
        """Run python with ``arguments`` until the deadline at most; the output goes to a log and is returned."""
        path = self.work / "logs" / f"{log}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as stream:
            try:
                done = subprocess.run(
                    [sys.executable, "-W", "ignore", *arguments],
                    cwd=ROOT,
                    env=self.env,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    timeout=max(1, self.left()),
                )
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"{log} was not done at the end of the time budget") from None
        text = path.read_text()
        if done.returncode:
            last = "\n    ".join(text.splitlines()[-15:])
            raise RuntimeError(f"{log} failed with status {done.returncode}; its last lines:\n    {last}")
        return text

    def train(self, name: str, log: str, updates: int, planned: int, *more: str) -> str:
        """fairseq-train of cell ``name``, with the learning rate of a training of ``planned`` updates."""
        cell = self.table[name]
        warmup = min(MANUAL_WARMUP, max(1, round(WARMUP_SHARE * planned)))
        flags = [
            *"--user-dir fairseq_plugin --task translation_head_pruning --arch transformer_iwslt_de_en".split(),
            *"--share-decoder-input-output-embed --optimizer adam --clip-norm 0.0 --lr 5e-4".split(),
            *["--adam-betas", "(0.9,0.98)", "--lr-scheduler", "inverse_sqrt", "--warmup-updates", str(warmup)],
            *"--dropout 0.3 --weight-decay 0.0001 --criterion label_smoothed_cross_entropy".split(),
            *f"--label-smoothing 0.1 --max-tokens 4096 --seed 1 --max-update {updates}".split(),
            *"--disable-validation --no-epoch-checkpoints --save-interval 1000000".split(),
            *"--no-save-optimizer-state --log-format json".split(),
            *(["--fp16"] if self.device == "cuda" else ["--cpu"]),
            *cell.options,
        ]
        if cell.after:
            flags += ["--finetune-from-model", str(self.checkpoint(cell.after))]
        return self.call(log, ["-m", "fairseq_cli.train", str(self.data), *flags, *more, *self.extra])

    def checkpoint(self, name: str) -> Path:
        """Where the trained model of a cell lies."""
        return self.work / "checkpoints" / name / "checkpoint_last.pt"

    def speed(self, names: list[str], updates: int) -> tuple[float, float]:
        """Updates per second of the slowest of ``names``, run at the same time, and seconds a start takes."""

        def one(name: str) -> tuple[float, float]:
            start = time.time()
            every = max(1, updates // 10)
            text = self.train(name, f"speed.{name}", updates, updates, "--no-save", "--log-interval", str(every))
            speeds = [float(ups) for ups in re.findall(r'"ups": "([\d.]+)"', text) if float(ups) > 0]
            if len(speeds) < 4:
                raise RuntimeError(f"the log of speed.{name} tells no speed")
            trained = float(re.findall(r"done training in ([\d.]+) seconds", text)[-1])
            # The first intervals hold what is done once: kernels chosen, memory taken.
            return statistics.median(speeds[len(speeds) // 2 :]), time.time() - start - trained

        with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
            measured = list(pool.map(one, names))
        return min(m[0] for m in measured), max(m[1] for m in measured)

    def run(self, name: str, length: Plan) -> dict:
        """Train and decode one cell: its row."""
        cell = self.table[name]
        share = PIPELINED_SHARE if cell.after else 1.0
        updates = max(1, round(share * length.updates))
        save = self.checkpoint(name).parent
        shutil.rmtree(save, ignore_errors=True)
        stop = f"{max(1.0, share * length.stop_seconds) / 3600:.6f}"
        text = self.train(name, name, updates, length.updates, "--save-dir", str(save), "--log-interval", "50",
                          "--stop-time-hours", stop)  # fmt: skip
        reached = int(re.findall(r"@ (\d+) updates", text)[-1])
        epochs = int(re.findall(r"epoch (\d+) @ \d+ updates", text)[-1])
        train_seconds = float(re.findall(r"done training in ([\d.]+) seconds", text)[-1])
        print(f"{name}: trained {reached} updates in {train_seconds:.0f} s", flush=True)
        start = time.time()
        half = ["--fp16", "--batch-size", "256"] if self.device == "cuda" else ["--cpu", "--batch-size", "32"]
        output = self.call(f"{name}.generate", ["-m", "fairseq_cli.generate", str(self.data), "--user-dir",
            "fairseq_plugin", "-s", "de", "-t", "en", "--path", str(self.checkpoint(name)), "--quiet", "--beam", "5",
            "--remove-bpe", "--max-len-a", "1.2", "--max-len-b", "10", "--required-batch-size-multiple", "1",
            *half])  # fmt: skip
        file = save / "masks.safetensors"
        mask = HeadMask.load(file) if file.exists() else None
        return {
            "cell": name,
            "method": cell.method,
            "heads": mask.kept if mask else HEADS,
            "of": HEADS,
            "bleu": float(re.findall(r"BLEU4? = ([\d.]+)", output)[-1]),
            "sentences": int(re.findall(r"Translated ([\d,]+) sentences", output)[-1].replace(",", "")),
            "updates": reached,
            "planned": updates,
            "epochs": epochs,
            "train_seconds": round(train_seconds, 1),
            "generate_seconds": round(time.time() - start, 1),
            "kept": {site: "".join("#" if k else "." for k in keep) for site, keep in mask.by_site().items()}
            if mask
            else None,
        }


def merge(folders: list[Path], rows: list[dict]) -> list[dict]:
    """Rows of earlier calls and of this one; the newest of a cell at one length on one device stays."""
    merged: dict[tuple, dict] = {}
    for folder in folders:
        file = folder / f"{NAME}.json"
        if file.exists():
            for row in json.loads(file.read_text())["rows"]:
                merged[row["cell"], row["planned"], row["device"], row["corpus"]] = row
    for row in rows:
        merged[row["cell"], row["planned"], row["device"], row["corpus"]] = row
    return list(merged.values())


def made(row: dict) -> str:
    """The updates of a row, and how many were planned where time ran out before."""
    return f"{row['updates']}" + (f" (of {row['planned']})" if row["updates"] < row["planned"] else "")


def write_results(folder: Path, rows: list[dict]) -> None:
    """Write the JSON and the table."""
    write_json(folder / f"{NAME}.json", {"rows": rows})
    header = (
        "method",
        "heads kept",
        "test BLEU",
        "updates",
        "epochs",
        "training s",
        "decoding s",
        "at a time",
        "device",
    )
    table = markdown_table(header, [
        (r["method"], f"{r['heads']} of {r['of']}", r["bleu"], made(r), r["epochs"], round(r["train_seconds"]),
         round(r["generate_seconds"]), r["jobs"], r["device"])
        for r in rows
    ])  # fmt: skip
    corpora = ", ".join(sorted({r["corpus"] for r in rows}))
    (folder / f"{NAME}.md").write_text(
        "# The IWSLT'14 recipe on a GPU\n\n"
        "`bash benchmarks/gpu/iwslt14.sh`: transformer_iwslt_de_en, --fp16, the flags of the published recipe; "
        f"corpus {corpora}; beam 5 on the whole test set. Updates: what fitted into the time given, the same for all "
        f"cells of a call ({PIPELINED_SHARE:.0%} of that for pipelined pruning).\n\n{table}\n"
    )


def arguments() -> argparse.Namespace:
    """The command line; what follows ``--`` goes to fairseq-train."""
    given, extra = sys.argv[1:], []
    if "--" in given:
        at = given.index("--")
        given, extra = given[:at], given[at + 1 :]
    parser = argparse.ArgumentParser(prog="iwslt14.sh", description=__doc__)
    parser.add_argument("cells", nargs="*", help="default: dense dsp-4; others: " + " ".join(list(cells(0.4))[2:]))
    parser.add_argument("--budget", type=float, default=540, help="seconds for the whole call")
    parser.add_argument("--jobs", type=int, help="cells at a time; default 4 on a GPU (one does not fill it), else 1")
    parser.add_argument("--updates", type=int, help="updates per training instead of what fits")
    parser.add_argument("--cooldown", type=float, default=0.4, help="fraction of training that DSP anneals in")
    parser.add_argument("--decoding", type=float, default=75, help="seconds kept for decoding a cell")
    parser.add_argument("--speed-updates", type=int, default=150, help="updates of the measurement of speed")
    options = parser.parse_args(given)
    options.extra = extra
    return options


def main() -> None:
    """Command line."""
    options = arguments()
    work, out, device = Path(os.environ["WORK"]), Path(os.environ["OUT"]), os.environ["DEVICE"]
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch sees no GPU here; set DEVICE=cpu to try the script without one.")
    table = cells(options.cooldown)
    wanted = options.cells or ["dense", "dsp-4"]
    unknown = [name for name in wanted if name not in table]
    if unknown:
        sys.exit(f"error: there is no cell {', '.join(unknown)}; there are {', '.join(table)}.")
    jobs = options.jobs or (4 if device == "cuda" else 1)
    started = float(os.environ.get("STARTED", time.time()))
    bench = Bench(work, device, table, jobs, started + options.budget, options.extra)
    for name in list(wanted):
        parent = table[name].after
        if parent and parent not in wanted and not bench.checkpoint(parent).exists():
            print(f"{name} starts from {parent}, which is not here: it is trained first", flush=True)
            wanted.insert(0, parent)
    wanted = [name for name in table if name in wanted]
    full = [name for name in wanted if not table[name].after]
    short = [name for name in wanted if table[name].after]
    jobs = bench.jobs = min(jobs, max(len(full), len(short)))
    named = torch.cuda.get_device_name(0) if device == "cuda" else "CPU"
    corpus = (bench.data / "corpus.txt").read_text().strip()
    print(f"{named}, torch {torch.__version__}, {corpus}: {', '.join(wanted)}, {jobs} at a time", flush=True)

    try:
        speed, start = None, 15.0
        if not options.updates:
            speed, start = bench.speed(full[:jobs] or [short[0]], options.speed_updates)
            print(f"speed: {speed:.2f} updates/s per cell, start {start:.0f} s; {bench.left():.0f} s left", flush=True)
        length = plan(bench.left(), len(full), len(short), jobs, start + options.decoding, speed, options.updates)
    except (BudgetError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    print(f"{length.updates} updates per training", flush=True)

    earlier = [ROOT / "benchmarks" / "results" / NAME, out]
    facts = {"jobs": jobs, "device": named, "corpus": corpus, "torch": torch.__version__, "extra": options.extra,
             "cooldown": options.cooldown}  # fmt: skip
    rows: list[dict] = []
    failed: list[str] = []
    for names in (full, short):
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            running = {pool.submit(bench.run, name, length): name for name in names}
            for future in concurrent.futures.as_completed(running):
                try:
                    rows.append({**future.result(), **facts})
                except RuntimeError as error:
                    failed.append(running[future])
                    print(f"error: {error}", flush=True)
                    continue
                row = rows[-1]
                print(f"{row['cell']}: {row['heads']} heads, BLEU {row['bleu']:.2f}", flush=True)
                order = {name: i for i, name in enumerate(table)}
                merged = merge(earlier, rows)
                write_results(out, sorted(merged, key=lambda r: (r["device"], r["corpus"], order[r["cell"]])))
    if rows:
        print((out / f"{NAME}.md").read_text())
    print(f"{time.time() - started:.0f} s in all")
    sys.exit(f"error: {', '.join(failed)} failed; the others were written." if failed else 0)


if __name__ == "__main__":
    main()
