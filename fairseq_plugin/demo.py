"""``make demo``: prune a small translation model with every method, on real text, on two CPU cores.

Trains a dense German-English model with ``fairseq-train``, prunes its heads with differentiable subset pruning and
with the baselines, decodes all of them with ``fairseq-generate``, and shows BLEU, the heads kept and their picture.
"""

import argparse
import concurrent.futures
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from tqdm import tqdm

from head_pruning import HeadMask, HeadPruningError
from head_pruning.files import MASKS_FILE, read_json, write_json
from head_pruning.inference.environment import CPU_ENVIRONMENT
from head_pruning.progress import bar_options
from head_pruning.report.plots import plot_head_masks
from head_pruning.report.tables import text_table

USER_DIR = Path(__file__).resolve().parent
HEADS = 36
MARGIN = 3.0  # BLEU that random heads must lose, else the comparison shows nothing
MODEL = (
    "--arch transformer_iwslt_de_en --share-all-embeddings --encoder-normalize-before --decoder-normalize-before "
    "--encoder-layers 3 --decoder-layers 3 --encoder-attention-heads 4 --decoder-attention-heads 4 "
    "--encoder-embed-dim 128 --decoder-embed-dim 128 --encoder-ffn-embed-dim 512 --decoder-ffn-embed-dim 512"
).split()
TRAINING = [
    *("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1", "--dropout", "0.1"),
    *("--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--clip-norm", "1.0", "--max-tokens", "1000"),
    *("--lr-scheduler", "polynomial_decay", "--seed", "1", "--num-workers", "0", "--no-epoch-checkpoints"),
    *("--no-save-optimizer-state", "--disable-validation", "--log-format", "simple", "--log-interval", "10"),
]
# Hotter and faster than the manual's (0.1 to 1e-8, 0.2), which has thousands of updates to choose in.
ANNEAL = (
    *("--annealing", "--initial-temperature", "1", "--final-temperature", "1e-4", "--cooldown-steps", "0.4"),
    *("--pruning-lr", "0.5"),
)
RANDOM_DRAWS = 3


@dataclass(frozen=True)
class Variant:
    """One pruned model, trained on from the dense one."""

    name: str
    title: str
    options: tuple[str, ...]


def variants(keep: int) -> list[Variant]:
    """The pruned models; K = ``keep`` heads where the method takes a number."""
    k = ("--num-of-heads", str(keep))
    joint = (*k, "--joint-pruning")
    return [
        Variant("sensitivity", "head sensitivity", joint),  # which a number of heads alone means
        Variant("dsp", "DSP", (*joint, *ANNEAL)),
        Variant("ste", "STE", (*joint, "--use-ste")),
        Variant("voita", "Voita", ("--l0-penalty", "100")),
        *(
            Variant(f"random{i}", "random heads", (*k, "--pruner", "random", "--random-heads-seed", str(i)))
            for i in range(1, RANDOM_DRAWS + 1)
        ),
    ]


def bleu_of(output: str) -> tuple[float, int]:
    """The BLEU that fairseq-generate printed last, and of how many sentences it is.

    Raises HeadPruningError when it printed none.
    """
    found, sentences = re.findall(r"BLEU4? = ([\d.]+)", output), re.findall(r"Translated ([\d,]+) sentences", output)
    if not found or not sentences:
        raise HeadPruningError("fairseq-generate printed no BLEU; its test set has no references.")
    return float(found[-1]), int(sentences[-1].replace(",", ""))


class Demo:
    """Runs the demo in an output folder; steps that are finished there are not repeated."""

    def __init__(self, out: Path, data: Path, keep: int, updates: int, more_updates: int) -> None:
        self.out, self.data, self.keep = out, data, keep
        self.updates, self.more_updates = updates, more_updates
        self.cores = os.cpu_count() or 1

    def command(self, name: str, arguments: list[str], threads: int, bar: Optional[tqdm] = None) -> str:
        """Run ``python arguments``; its output goes to a log, is returned, and moves ``bar``."""
        log = self.out / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join(filter(None, [str(USER_DIR.parent), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, **CPU_ENVIRONMENT, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
        lines = []
        with (
            log.open("w", encoding="utf-8") as stream,
            subprocess.Popen(
                [sys.executable, *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            ) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                stream.write(line)
                lines.append(line)
                found = re.search(r"train_inner .* loss=([\d.]+).* num_updates=(\d+)", line)
                if found and bar is not None:
                    bar.set_postfix_str(f"loss {found[1]}", refresh=False)
                    bar.update(int(found[2]) - bar.n)
        if process.returncode:
            raise HeadPruningError(f"{name} ended with status {process.returncode}; its log is {log}.")
        return "".join(lines)

    def train(self, name: str, updates: int, lr: str, options: list[str], threads: int, position: int = 0) -> Path:
        """Train and return the checkpoint."""
        save = self.out / name
        checkpoint = save / "checkpoint_last.pt"
        arguments = [
            *("-m", "fairseq_cli.train", str(self.data), "--user-dir", str(USER_DIR)),
            *("--task", "translation_head_pruning", *MODEL, *TRAINING, "--lr", lr, "--warmup-updates", "100"),
            *("--total-num-update", str(updates), "--max-update", str(updates), "--save-dir", str(save), *options),
        ]
        mark = save / "finished.json"
        if not mark.exists() or read_json(mark) != arguments:
            shutil.rmtree(save, ignore_errors=True)
            with tqdm(total=updates, desc=f"train {name}", position=position, leave=False, **bar_options()) as bar:
                self.command(name, arguments, threads, bar)
            write_json(mark, arguments)
        return checkpoint

    def bleu(self, name: str, checkpoint: Path, threads: int) -> dict:
        """``bleu`` of fairseq-generate on the test set (tokenised, lower-cased, beam 5), and of how many sentences."""
        output = self.command(
            f"{name}.generate",
            [
                *("-m", "fairseq_cli.generate", str(self.data), "--user-dir", str(USER_DIR)),
                *("--path", str(checkpoint), "--beam", "5", "--remove-bpe", "--batch-size", "100", "--quiet"),
                *("--max-len-a", "1.2", "--max-len-b", "10", "--num-workers", "0"),
                *("--required-batch-size-multiple", "1"),
            ],
            threads,
        )
        bleu, sentences = bleu_of(output)
        return {"bleu": bleu, "sentences": sentences}

    def dense(self) -> dict:
        """The model that all others start from."""
        checkpoint = self.train("dense", self.updates, "4e-3", [], self.cores)
        return {"name": "dense", "method": "dense", "heads": HEADS, **self.bleu("dense", checkpoint, self.cores)}

    def variant(self, variant: Variant, position: int) -> dict:
        """Prune while training on from the dense model."""
        start = ["--finetune-from-model", str(self.out / "dense" / "checkpoint_last.pt")]
        checkpoint = self.train(
            variant.name, self.more_updates, "2e-3", [*start, *variant.options], max(1, self.cores // 2), position
        )
        mask = HeadMask.load(self.out / variant.name / MASKS_FILE)
        bleu = self.bleu(variant.name, checkpoint, max(1, self.cores // 2))
        return {"name": variant.name, "method": variant.title, "heads": mask.kept, **bleu, "mask": mask}

    def michel(self) -> dict:
        """Cut the least important heads of the dense model, without training after it."""
        folder = self.out / "michel"
        shutil.rmtree(folder, ignore_errors=True)
        # Two rounds by the importance of the dense model: the wanted number of heads, then none.
        self.command(
            "michel",
            [
                *("-m", "fairseq_plugin.run_michel", str(self.data), "-s", "de", "-t", "en"),
                *("-a", "transformer_iwslt_de_en", "--optimizer", "adam", "--max-tokens", "4000", "--beam", "5"),
                *("--restore-file", str(self.out / "dense" / "checkpoint_last.pt"), "--remove-bpe"),
                *("--num-of-heads", str(HEADS - self.keep), "--score-sentences", "1", "--score-at", str(self.keep)),
                *("--max-len-a", "1.2", "--max-len-b", "10", "--num-workers", "0", "--save-dir", str(folder)),
            ],
            max(1, self.cores // 2),
        )
        rounds = read_json(folder / "michel_rounds.json")["rounds"]
        entry = next(r for r in rounds if r["heads"] == self.keep)
        mask = HeadMask.load(folder / "michel_masks" / f"heads{self.keep}.safetensors")
        return {
            "name": "michel",
            "method": "Michel (cut only)",
            "heads": mask.kept,
            "bleu": entry["final_score"],
            "sentences": entry["final_sentences"],
            "mask": mask,
        }

    def run(self) -> list[dict]:
        """All models, the dense one first."""
        rows = [self.dense()]
        jobs = [
            *(
                lambda variant=variant, i=i: self.variant(variant, i % 2)
                for i, variant in enumerate(variants(self.keep))
            ),
            self.michel,
        ]
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            rows += pool.map(lambda job: job(), jobs)
        return rows


def table(rows: list[dict]) -> list[tuple[str, str, str]]:
    """One line per method; of several draws the mean and the range."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        scores = [row["bleu"] for row in mine]
        score = f"{scores[0]:.2f}"
        if len(mine) > 1:
            score = f"{sum(scores) / len(scores):.2f} ({min(scores):.2f} to {max(scores):.2f})"
            method = f"{method}, {len(mine)} draws"
        lines.append((method, f"{mine[0]['heads']} of {HEADS}", score))
    return lines


def check(rows: list[dict]) -> None:
    """Raise when random heads are nearly as good as all: then the demo shows nothing."""
    dense = rows[0]["bleu"]
    best = max(row["bleu"] for row in rows if row["method"] == "random heads")
    if best > dense - MARGIN:
        raise HeadPruningError(
            f"Random heads reach BLEU {best:.2f}, within {MARGIN:g} of the dense model's {dense:.2f}: this data does "
            "not show that heads matter; keep fewer heads with --keep or train longer with --updates."
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="binarised de-en data to use instead of the demo's own")
    parser.add_argument("--keep", type=int, default=4, help="heads to keep of 36 (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=1500, help="updates of the dense model (default: %(default)s)")
    parser.add_argument("--more-updates", type=int, default=300, help="updates of each pruning (default: %(default)s)")
    options = parser.parse_args()
    logging.getLogger().setLevel(logging.WARNING)  # fairseq turns every library's messages on
    begin = time.monotonic()
    if options.data is None:
        prepare = [sys.executable, "-m", "prepare.demo_data", "--dest", str(options.output / "data")]
        if subprocess.run(prepare).returncode:
            sys.exit("error: the demo's text could not be prepared; see the message above.")
        options.data = options.output / "data" / "data-bin"
    try:
        rows = Demo(options.output, options.data, options.keep, options.updates, options.more_updates).run()
        picture = options.output / "heads.png"
        plot_head_masks({f"{row['name']}\nBLEU {row['bleu']:.1f}": row["mask"] for row in rows[1:]}, picture)
        sizes = "/".join(map(str, sorted({row["sentences"] for row in rows})))
        print(text_table(("model", "heads kept", f"BLEU of {sizes} sentences"), table(rows)))
        write_json(options.output / "results.json", [{k: v for k, v in row.items() if k != "mask"} for row in rows])
        print(f"The kept heads are drawn in {picture}. The demo took {(time.monotonic() - begin) / 60:.1f} minutes.")
        check(rows)
    except HeadPruningError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
