"""``make demo-hf``: a pretrained encoder learns to tell praise from blame, then loses three quarters of its heads.

Each command is one that a user would type; their output goes to ``logs/`` in the output folder. Finished steps
are not repeated.
"""

import argparse
import concurrent.futures
import os
import subprocess
import sys
import time
from pathlib import Path

from head_pruning import HeadMask, HeadPruningError
from head_pruning.files import MASKS_FILE, atomic_path, read_json, write_json
from head_pruning.importance.rounds import MASKS_FOLDER, ROUNDS_FILE
from head_pruning.inference.environment import CPU_ENVIRONMENT
from head_pruning.report.plots import plot_head_masks
from head_pruning.report.tables import text_table

ROOT = Path(__file__).resolve().parent.parent
ANNEAL = (
    *("--annealing", "--initial_temperature", "1", "--final_temperature", "1e-4", "--cooldown_steps", "0.6"),
    *("--pruning_lr", "0.1"),
)


class Demo:
    """Runs the demo in an output folder."""

    def __init__(self, out: Path, data: Path, keep: int, epochs: float, more_epochs: float) -> None:
        self.out, self.data, self.keep = out, data, keep
        self.epochs, self.more_epochs = epochs, more_epochs
        self.cores = os.cpu_count() or 1
        config = read_json(data / "model" / "config.json")
        self.heads = config["num_hidden_layers"] * config["num_attention_heads"]

    def command(self, name: str, arguments: list[str], threads: int, result: str) -> Path:
        """Run ``python arguments --output_dir OUT/name`` unless it has left ``result`` there."""
        folder = self.out / name.replace(" ", "-")
        mark = folder / "finished.json"
        if mark.exists() and read_json(mark) == arguments:
            return folder / result
        log = self.out / "logs" / f"{name.replace(' ', '-')}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, **CPU_ENVIRONMENT, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
        begin = time.monotonic()
        print(f"{name}: {' '.join(arguments[1:2])} ... (log: {log})", flush=True)
        with log.open("w", encoding="utf-8") as stream:
            done = subprocess.run(
                [sys.executable, *arguments, "--output_dir", str(folder), "--overwrite_output_dir"],
                env=env,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
        if done.returncode:
            raise HeadPruningError(f"{name} ended with status {done.returncode}; its log is {log}.")
        print(f"{name}: done in {time.monotonic() - begin:.0f} s", flush=True)
        write_json(mark, arguments)
        return folder / result

    def train(self, name: str, script: str, model: Path, epochs: float, options: list[str], threads: int) -> dict:
        """A training: its accuracy in percent and the heads it kept."""
        arguments = [
            *("-m", f"hf_plugin.{script}", "--model_name_or_path", str(model), "--task_name", "SST-2"),
            *("--data_dir", str(self.data / "SST-2"), "--do_train", "--do_eval", "--max_seq_length", "48"),
            *("--per_device_train_batch_size", "32", "--per_device_eval_batch_size", "64", "--seed", "1"),
            *("--learning_rate", "1e-4", "--num_train_epochs", str(epochs), "--save_strategy", "no"),
            *("--cache_dir", str(self.out / "cache"), "--logging_steps", "20", *options),
            *("--train_sampling_strategy", "group_by_length"),
        ]
        results = read_json(self.command(name, arguments, threads, "all_results.json"))
        masks = self.out / name.replace(" ", "-") / MASKS_FILE
        mask = HeadMask.load(masks) if masks.exists() else None
        return {
            "method": name,
            "heads": self.heads if mask is None else mask.kept,
            "accuracy": 100.0 * results["eval_accuracy"],
            "mask": mask,
        }

    def michel(self, threads: int) -> dict:
        """Cut the least important heads of the dense model, without training after it."""
        arguments = [
            *("-m", "hf_plugin.run_michel", "--model_name_or_path", str(self.out / "dense"), "--task_name", "SST-2"),
            *("--data_dir", str(self.data / "SST-2"), "--max_seq_length", "48", "--batch_size", "64"),
            *("--num_of_heads", str(self.heads - self.keep), "--cache_dir", str(self.out / "cache")),
        ]
        rounds = read_json(self.command("michel", arguments, threads, ROUNDS_FILE))
        entry = next(r for r in rounds["rounds"] if r["heads"] == self.keep)
        mask = HeadMask.load(self.out / "michel" / MASKS_FOLDER / f"heads{self.keep}.safetensors")
        return {"method": "Michel (cut only)", "heads": mask.kept, "accuracy": entry["score"], "mask": mask}

    def run(self) -> list[dict]:
        """All models, the dense one first."""
        dense = self.out / "dense"
        rows = [self.train("dense", "run_glue", self.data / "model", self.epochs, [], self.cores)]
        k = ["--num_of_heads", str(self.keep)]
        one = max(1, self.cores // 2)
        joint = [*k, "--joint_pruning"]  # a number of heads alone means head_sensitivity
        jobs = [
            lambda: self.train("head sensitivity", "run_glue", dense, self.more_epochs, joint, one),
            lambda: self.train("DSP", "run_dsp", dense, self.more_epochs, [*joint, *ANNEAL], one),
            lambda: self.train("random heads", "run_glue", dense, self.more_epochs, [*k, "--pruner", "random"], one),
            lambda: self.michel(one),
        ]
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            rows += pool.map(lambda job: job(), jobs)
        return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-hf-output"), help="folder (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="folder with model/ and SST-2/ to use instead of the demo's own")
    parser.add_argument("--keep", type=int, default=18, help="heads to keep (default: %(default)s)")
    parser.add_argument("--epochs", type=float, default=1.5, help="epochs of the dense model (default: %(default)s)")
    parser.add_argument("--more-epochs", type=float, default=1.5, help="epochs of each pruning (default: %(default)s)")
    options = parser.parse_args()
    begin = time.monotonic()
    data = options.data or options.output / "data"
    if options.data is None:
        if subprocess.run([sys.executable, "-m", "prepare.demo_sentiment", "--dest", str(data)]).returncode:
            sys.exit("error: the demo's model and sentences could not be prepared; see the message above.")
    try:
        demo = Demo(options.output, data, options.keep, options.epochs, options.more_epochs)
        rows = demo.run()
        picture = options.output / "heads.png"
        titles = {f"{row['method']}\n{row['accuracy']:.1f} %": row["mask"] for row in rows[1:]}
        plot_head_masks(titles, picture)
        lines = [(row["method"], f"{row['heads']} of {demo.heads}", row["accuracy"]) for row in rows]
        table = text_table(("model", "heads kept", "accuracy %"), lines)
        with atomic_path(options.output / "table.txt") as temporary:
            temporary.write_text(table + "\n", encoding="utf-8")
        print(table)
        write_json(options.output / "results.json", [{k: v for k, v in row.items() if k != "mask"} for row in rows])
        print(f"The kept heads are drawn in {picture}. The demo took {(time.monotonic() - begin) / 60:.1f} minutes.")
    except HeadPruningError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
