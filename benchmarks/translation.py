"""Translation quality over heads kept: every method on one German-English corpus, resumable cell by cell.

    python -m benchmarks.translation CORPUS --work DIR [--updates 1000] [--jobs 2]

CORPUS holds BPE'd ``train``, ``valid`` and ``test`` files with the endings ``.de`` and ``.en``. A cell that has been
measured is never run again (its result lies in the work folder); the table and the plot are written anew after each.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from benchmarks.cells import add_options, run_bench
from fairseq_plugin.demo import bleu_of
from head_pruning import HeadMask
from head_pruning.files import atomic_path, write_json
from head_pruning.inference.environment import CPU_ENVIRONMENT
from head_pruning.report.plots import plot_head_masks, plot_scores
from head_pruning.report.tables import markdown_table

ROOT = Path(__file__).resolve().parent.parent
HEADS = 36
KEPT = (18, 9, 4, 2)
# What the published code reached with the same options, data and 2000 updates; one seed.
PUBLISHED = {"dense": 38.73, "dsp-9-noise": 36.52, "dsp-4-noise": 31.56}


@dataclass(frozen=True)
class Cell:
    """One row of the table."""

    name: str
    method: str
    options: tuple[str, ...] = ()
    after: Optional[str] = None  # the cell whose checkpoint this one starts from
    updates: Optional[int] = None  # fixed length, else the benchmark's


def cells(updates: int) -> list[Cell]:
    """All cells, most important first."""
    anneal = ("--annealing", "--initial-temperature", "0.1", "--final-temperature", "1e-8")
    short = max(10, round(0.13 * updates))

    def dsp(name: str, k: int, *more: str, method: str = "joint DSP") -> Cell:
        options = ("--num-of-heads", str(k), "--joint-pruning", *anneal, "--cooldown-steps", "0.5", *more)
        return Cell(name, method, options)

    def random(k: int) -> Cell:
        return Cell(f"random-{k}", "K random heads", ("--pruner", "random", "--num-of-heads", str(k)))

    def ste(k: int) -> Cell:
        return Cell(f"ste-{k}", "STE", ("--num-of-heads", str(k), "--joint-pruning", "--use-ste"))

    def sensitivity(k: int) -> Cell:
        options = ("--num-of-heads", str(k), "--joint-pruning", "--pruner", "head_sensitivity")
        spread = ("--count-schedule", "0:0.1", "--min-heads-per-kind", "1", "--site-discount", "2")
        return Cell(f"sensitivity-{k}", "head_sensitivity, early and spread", (*options, *spread))

    def pipelined(k: int) -> Cell:
        options = ("--num-of-heads", str(k), *anneal, "--cooldown-steps", str(round(short / 1.3)))
        return Cell(f"pipelined-{k}", "pipelined DSP", options, after="dense", updates=short)

    def voita(penalty: int) -> Cell:
        return Cell(f"voita-{penalty}", "Voita", ("--l0-penalty", str(penalty)))

    return [
        Cell("dense", "dense"),
        *(dsp("dsp-9", 9), dsp("dsp-4", 4), random(9), random(4)),
        *(pipelined(k) for k in KEPT),
        Cell("michel", "Michel (exact)", after="dense"),
        *(ste(9), ste(4), voita(100), dsp("dsp-2", 2), random(2), dsp("dsp-18", 18)),
        dsp("dsp-9-unclipped", 9, "--gate-clip-norm", "0", method="joint DSP, gates not clipped"),
        *(
            dsp(f"dsp-{k}-noise", k, "--noise-after-cooldown", method="joint DSP, noise to the end (as published)")
            for k in (9, 4)
        ),
        Cell(
            "dsp-4-hot",
            "joint DSP, temperature 1 to 1e-4",
            ("--num-of-heads", "4", "--joint-pruning", "--annealing", "--initial-temperature", "1")
            + ("--final-temperature", "1e-4", "--cooldown-steps", "0.5"),
        ),
        *(random(18), voita(30), voita(10), sensitivity(4), sensitivity(9)),
    ]


class Bench:
    """Runs cells in a work folder."""

    def __init__(self, corpus: Path, work: Path, updates: int, threads: int) -> None:
        self.corpus, self.work, self.updates, self.threads = corpus, work, updates, threads
        self.data = work / "data-bin"
        self.env = {**os.environ, **CPU_ENVIRONMENT, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}

    def prepare(self) -> None:
        """Binarise the corpus."""
        if (self.data / "preprocess.log").exists():
            return
        for split in ("train", "valid", "test"):
            for language in ("de", "en"):
                if not (self.corpus / f"{split}.{language}").is_file():
                    sys.exit(f"error: {self.corpus} has no {split}.{language}; give the folder with the BPE'd corpus.")
        prefixes = [f"--{split}pref={self.corpus / split}" for split in ("train", "valid", "test")]
        self.call("preprocess", ["-m", "fairseq_cli.preprocess", "--source-lang", "de", "--target-lang", "en",
                                 *prefixes, "--destdir", str(self.data)])  # fmt: skip

    def call(self, log: str, arguments: list[str]) -> str:
        """Run python with ``arguments``; the output goes to ``log`` and is returned."""
        path = self.work / "logs" / f"{log}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as stream:
            done = subprocess.run(
                [sys.executable, *arguments], cwd=ROOT, env=self.env, stdout=stream, stderr=subprocess.STDOUT
            )
        if done.returncode:
            raise RuntimeError(f"{log} failed with status {done.returncode}; see {path}")
        return path.read_text()

    def train_flags(self, updates: int) -> list[str]:
        """The setting of every row: that of the recorded runs of the published code, at any length."""
        return [
            *"--arch transformer_iwslt_de_en --share-decoder-input-output-embed".split(),
            *"--encoder-layers 3 --decoder-layers 3 --encoder-attention-heads 4 --decoder-attention-heads 4".split(),
            *"--encoder-embed-dim 128 --decoder-embed-dim 128".split(),
            *"--encoder-ffn-embed-dim 256 --decoder-ffn-embed-dim 256 --optimizer adam".split(),
            *["--adam-betas", "(0.9,0.98)", "--clip-norm", "0.0", "--lr", "3e-3", "--lr-scheduler", "inverse_sqrt"],
            *f"--warmup-updates {round(0.2 * self.updates)} --dropout 0.2 --weight-decay 0.0001".split(),
            *"--criterion label_smoothed_cross_entropy --label-smoothing 0.1 --max-tokens 4096 --seed 1".split(),
            *f"--max-update {updates} --no-epoch-checkpoints --disable-validation --log-interval 50".split(),
            *"--log-format simple --save-interval-updates 200 --keep-interval-updates 1".split(),
        ]

    def result(self, cell: "Cell | str") -> Path:
        """Where a measured cell lies."""
        return self.work / "results" / f"{cell if isinstance(cell, str) else cell.name}.json"

    def run(self, cell: Cell) -> list[dict]:
        """Measure a cell (or read what was measured): one result per row of the table."""
        result = self.result(cell)
        key = {"corpus": str(self.corpus), "updates": self.updates, "options": list(cell.options)}
        if result.exists():
            measured = json.loads(result.read_text())
            if measured["key"] != key:
                raise RuntimeError(f"{result} is of another corpus, length or options; choose another --work folder")
            return measured["rows"]
        rows = self.michel(cell) if cell.name == "michel" else [self.train(cell)]
        write_json(result, {"key": key, "rows": rows})
        return rows

    def train(self, cell: Cell) -> dict:
        """Train and decode."""
        save = self.work / "checkpoints" / cell.name
        task = ["--user-dir", "fairseq_plugin", "--task", "translation_head_pruning"]
        start = []
        if cell.after:
            dense = self.work / "checkpoints" / cell.after / "checkpoint_last.pt"
            start = ["--finetune-from-model", str(dense)]
        updates = cell.updates or self.updates
        flags = [*task, *self.train_flags(updates), *cell.options, *start, "--save-dir", str(save)]
        self.call(cell.name, ["-m", "fairseq_cli.train", str(self.data), *flags])
        checkpoint = save / "checkpoint_last.pt"
        output = self.call(f"{cell.name}.generate", ["-m", "fairseq_cli.generate", str(self.data), "--user-dir",
            "fairseq_plugin", "--path", str(checkpoint), "--batch-size", "64", "--beam", "5", "--remove-bpe",
            "--required-batch-size-multiple", "1", "--quiet"])  # fmt: skip
        bleu, sentences = bleu_of(output)
        mask = save / "masks.safetensors"
        kept = HeadMask.load(mask).kept if mask.exists() else HEADS
        return {"method": cell.method, "cell": cell.name, "heads": kept, "bleu": bleu, "sentences": sentences,
                "updates": updates, "mask": str(mask) if mask.exists() else None}  # fmt: skip

    def michel(self, cell: Cell) -> list[dict]:
        """Rounds scored greedily on a part of the test set, then the wanted head counts with beam search."""
        out = self.work / "michel"
        dense = self.work / "checkpoints" / "dense" / "checkpoint_last.pt"
        self.call("michel", ["-m", "fairseq_plugin.run_michel", str(self.data), "-s", "de", "-t", "en", "-a",
            "transformer_iwslt_de_en", "--restore-file", str(dense), "--optimizer", "adam", "--reset-optimizer",
            "--batch-size", "64", "--beam", "1", "--remove-bpe", "--num-of-heads", "1", "--exact-pruning",
            "--importance-sentences", "4000", "--score-sentences", "300", "--score-at", ",".join(map(str, KEPT)),
            "--score-beam", "5", "--max-tokens", "4096", "--save-dir", str(out)])  # fmt: skip
        rounds = json.loads((out / "michel_rounds.json").read_text())["rounds"]
        return [
            {
                "method": cell.method,
                "cell": f"michel-{r['heads']}",
                "heads": r["heads"],
                "bleu": r["final_score"],
                "sentences": r["final_sentences"],
                "updates": 0,
                "mask": None,
            }  # fmt: skip
            for r in rounds
            if "final_score" in r
        ]


def write_results(rows: list[dict], folder: Path, name: str, command: str) -> None:
    """Write the JSON, the table and the plots."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = [{key: value for key, value in row.items() if key != "mask"} for row in rows]
    write_json(folder / f"{name}.json", {"command": command, "rows": shown})
    header = ("method", "heads kept of 36", "test BLEU", "updates", "sentences")
    cells_of = [(r["method"], r["heads"], r["bleu"], r["updates"], r.get("sentences", "")) for r in rows]
    if any(r["updates"] == 2000 for r in rows):
        header += ("published code",)
        cells_of = [(*c, PUBLISHED.get(r["cell"], "") if r["updates"] == 2000 else "") for c, r in zip(cells_of, rows)]
    table = markdown_table(header, cells_of)
    with atomic_path(folder / f"{name}.md") as temporary:
        temporary.write_text(f"# Translation quality over heads kept\n\n`{command}`\n\n{table}\n")
    dense = next((r for r in rows if r["cell"] == "dense"), None)
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["cell"] != "dense":
            curves.setdefault(row["method"], []).append((row["heads"], row["bleu"]))
    if dense and curves:
        plot_scores(curves, folder / f"{name}.png", dense=("dense", dense["bleu"]), score="test BLEU", total=HEADS)
    masks = {row["cell"]: HeadMask.load(row["mask"]) for row in rows if row.get("mask") and Path(row["mask"]).exists()}
    if masks:
        plot_head_masks(masks, folder / f"{name}-heads.png")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="folder with the BPE'd corpus")
    add_options(parser)
    parser.add_argument("--updates", type=int, default=1000, help="updates per training (2000: the recorded setting)")
    parser.add_argument("--name", default="translation", help="file name of the table")
    options = parser.parse_args()

    bench = Bench(options.corpus.resolve(), options.work.resolve(), options.updates, options.threads)
    bench.prepare()
    command = f"python -m benchmarks.translation CORPUS --work DIR --updates {options.updates}"
    run_bench(
        cells(options.updates),
        bench,
        options,
        lambda rows: write_results(rows, options.results, options.name, command),
        score="bleu",
    )


if __name__ == "__main__":
    main()
