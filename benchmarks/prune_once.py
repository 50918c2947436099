"""Pruned once, in pretraining, beside pruned in each fine-tuning: Prune Once for All on one core.

    python -m benchmarks.prune_once MODEL GLUE SQUAD --work DIR [--jobs 1]

MODEL is a folder with a BERT-like encoder (that of ``python -m prepare.demo_sentiment``; its head for masked words is
new), GLUE holds CoLA/, MRPC/ and SST-2/ in GLUE's TSV layout, SQUAD a training file and dev-v1.1.json. The corpus is
the paragraphs of the training file, each a document; none of the development set are in it. A teacher is prepared on
their segment pairs, students are pruned while they learn from it, and their zeros are locked in every fine-tuning.
Beside them the teacher is fine-tuned: dense, and pruned meanwhile to as many weights of the same matrices. A cell
that has been measured is never run again (its result lies in the work folder), a pretraining that was stopped goes on
from its last checkpoint; the tables and the plots are written anew after each cell.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from benchmarks.glue import ROOT, Cell, Task, shown
from benchmarks.spd_glue import DENSE_RATE, RATE, TRAINING, Page, write_results
from benchmarks.weights_glue import METHODS, PERCENT, SCHEDULE, WeightBench, run
from head_pruning.files import atomic_path

SPARSITIES = (0.85, 0.9)
PRETRAINING = "pretraining"
#: Updates of the teacher and of a student.
UPDATES = {"teacher": 300, "student": 150}
BATCH = 8
PRETRAINING_RATE = "3e-4"
# The recipe's flags and proportions, but for the learning rate and its warm-up, which are of a short training.
PRETRAIN = (
    "--do_train --do_eval --use_cpu --disable_tqdm True --logging_steps 10 --save_steps 50 --save_total_limit 1 "
    f"--per_device_train_batch_size {BATCH} --per_device_eval_batch_size 16 --learning_rate {PRETRAINING_RATE} "
    "--lr_scheduler_type linear --warmup_ratio 0.05 --weight_decay 0.01 --validation_split_percentage 3"
)
STUDENT = (
    "--distill logits --distill_task 0.5 --distill_logits 0.5 --distill_temperature 2.0 --pruner_name "
    "gradual_magnitude --target_sparsity {sparsity} --policy_end_step 0.5 --end_pruning_step 0.8 --pruning_frequency "
    f"{UPDATES['student'] // 100} --lr_rewind"
)
MATRICES = r"--weights_include \.weight$ --weights_exclude ^(cls|classifier|qa_outputs)\. --prune_biases False"
LOCKED = "--pruner_name lock"
INT8 = "--do_quantization --input_ranges average --not_to_quantize ^(classifier|qa_outputs)$"


class PretrainingTask(Task):
    """Its score is not a ratio."""

    @property
    def scored(self) -> str:
        """As :attr:`Task.scored`."""
        return "perplexity of masked words"


TASKS = {
    PRETRAINING: PretrainingTask(PRETRAINING, "perplexity", 1, length=128),
    "SST-2": Task("SST-2", "accuracy", 1, samples=4000),
    "CoLA": Task("CoLA", "matthews_correlation", 1),
    "MRPC": Task("MRPC", "accuracy", 2, length=128),
    "SQuAD": Task("SQuAD", "f1", 1, samples=4000, length=256),
}
#: By task, of fine-tuning: the shortest are repeated. Teacher and students are the same for all.
SEEDS = {"SST-2": (1, 2, 3), "CoLA": (1, 2, 3), "MRPC": (1,), "SQuAD": (1,)}


@dataclass(frozen=True)
class Stage(Cell):
    """A training that starts from another."""

    start: Optional[Cell] = None

    @property
    def after(self) -> Optional[Cell]:
        """The cell whose outcome it needs."""
        return self.start


TEACHER = Stage(PRETRAINING, "dense", None, 1, "run_pretraining", ("--max_steps", str(UPDATES["teacher"])))


def student(sparsity: float) -> Stage:
    """What is pruned once."""
    options = (*STUDENT.format(sparsity=sparsity).split(), *MATRICES.split(), "--max_steps", str(UPDATES["student"]))
    keep = round(100 * (1 - sparsity))
    return Stage(PRETRAINING, "pruned and distilled", keep, 1, "run_pretraining", options, start=TEACHER)


def transfer(task: str, method: str, options: str, start: Stage, keep: Optional[int], seed: int) -> Stage:
    """A fine-tuning."""
    words = ("--learning_rate", RATE if keep else DENSE_RATE, *options.split())
    return Stage(task, method, keep, seed, "run_squad" if task == "SQuAD" else "run_glue", words, start=start)


def transfers(task: str, sparsity: float, seed: int) -> list[Stage]:
    """What is compared on a task, most important first."""
    pruned, density = student(sparsity), round(1 - sparsity, 6)
    keep = round(100 * density)

    def meanwhile(name: str) -> Stage:
        pruner, more = METHODS[name]
        options = f"--pruner_name {pruner} --final_threshold {density} {SCHEDULE} {MATRICES} {more}"
        return transfer(task, f"{name} in fine-tuning", options, TEACHER, keep, seed)

    return [
        transfer(task, "pruned once, locked", LOCKED, pruned, keep, seed),
        meanwhile("PLATON"),
        transfer(task, "dense", "", TEACHER, None, seed),
        transfer(task, "pruned once, locked, int8", f"{LOCKED} {INT8}", pruned, keep, seed),
        meanwhile("magnitude"),
    ]


def cells() -> list[Stage]:
    """All cells, most important first; ``keep`` is the density in percent."""
    plan = [(task, sparsity, 1) for sparsity in SPARSITIES for task in TASKS if task in ("SST-2", "CoLA", "MRPC")]
    plan += [("SQuAD", sparsity, 1) for sparsity in SPARSITIES]
    plan += [(task, s, seed) for seed in (2, 3) for s in SPARSITIES for task, all in SEEDS.items() if seed in all]
    found: list[Stage] = [TEACHER]
    for task, sparsity, seed in plan:
        wanted = [student(sparsity), *transfers(task, sparsity, seed)]
        found += [cell for cell in wanted if cell not in found]
    return found


class OnceBench(WeightBench):
    """Runs cells in a work folder."""

    tasks = TASKS

    def data_flags(self, cell: Cell) -> list[str]:
        """The flags that name a cell's data, and how much of an example is read."""
        return ["--data_dir", str(self.work / "pairs")] if cell.task == PRETRAINING else super().data_flags(cell)

    def train(self, cell: Cell) -> dict:
        """Train and score on what was kept back."""
        assert isinstance(cell, Stage)
        task, start = TASKS[cell.task], self.work / "runs" / cell.start.name if cell.start else self.model
        if cell.task == PRETRAINING:
            out = self.pretrain(cell, start)
        else:
            out = self.fine_tune(cell, start, task.epochs, TRAINING)
            (out / "model.safetensors").unlink()
        results = json.loads((out / "all_results.json").read_text())
        density = 1.0
        if cell.keep:
            density = json.loads((out / "pruning.json").read_text())["weights"]["density"]
        return {
            "task": cell.task,
            "method": cell.method,
            "percent": cell.keep or 100,
            "density": density,
            "seed": cell.seed,
            "score": ({PRETRAINING: 1.0} | PERCENT).get(cell.task, 100.0) * results[f"eval_{task.metric}"],
        }

    def pretrain(self, cell: Stage, start: Path) -> Path:
        """The teacher or a student, from the last checkpoint where there is one."""
        self.make_pairs()
        teacher = ("--teacher_path", str(start)) if cell.start else ()
        out = self.call(cell, ["--model_name_or_path", str(start), *PRETRAIN.split(), *teacher, *cell.options])
        for checkpoint in out.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        return out

    def make_pairs(self) -> None:
        """Segment pairs of the paragraphs of the training file, unless they are there."""
        corpus = self.work / "corpus"
        corpus.mkdir(parents=True, exist_ok=True)
        articles = json.loads(self.squad_train.read_text(encoding="utf-8"))["data"]
        texts = dict.fromkeys(" ".join(p["context"].split()) for article in articles for p in article["paragraphs"])
        with atomic_path(corpus / "paragraphs.txt") as temporary:
            temporary.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
        words = ["--data_dir", str(self.work / "pairs"), "--corpus", str(corpus), "--tokenizer", str(self.model)]
        words += ["--max_seq_length", str(TASKS[PRETRAINING].length), "--workers", "1"]
        words += ["--validation_split_percentage", "3"]
        subprocess.run([sys.executable, "-m", "prepare.wikipedia", *words], cwd=ROOT, env=self.env, check=True)


def _about(tasks: "set[str]") -> str:
    sizes = "; ".join(
        f"{name}: {task.epochs:g} epochs of {task.samples or 'all'} examples"
        for name, task in TASKS.items()
        if name in tasks and name != PRETRAINING
    )
    return (
        f"Pretraining: {UPDATES['teacher']} updates of the teacher, {UPDATES['student']} of a student, each of "
        f"{BATCH} segment pairs of up to {TASKS[PRETRAINING].length} tokens, out of the paragraphs of SQuAD's "
        f"training file, 3 % of which are kept back; learning rate {PRETRAINING_RATE}. "
        f"{sizes}{'. ' * bool(sizes)}Fine-tuning: batches of 16; learning rate {RATE}, {DENSE_RATE} for dense "
        "models. Every model starts from the teacher or from a student. Of several seeds the mean and the range."
    )


PAGE = Page(
    name="prune_once",
    title="Pruned once, and pruned in every fine-tuning",
    tasks=TASKS,
    percents=[round(100 * (1 - sparsity)) for sparsity in SPARSITIES],
    unit="% of the weights",
    shown=lambda rows: shown([row["score"] for row in rows]),
    about=_about,
    cells=len(cells()),
    data="GLUE SQUAD",
)


def main() -> None:
    """Command line."""
    run(__doc__, OnceBench, cells(), lambda rows, folder: write_results(PAGE, rows, folder))


if __name__ == "__main__":
    main()
