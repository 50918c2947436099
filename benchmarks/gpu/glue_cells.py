"""Measuring one cell of the GLUE grid: train and score, or cut and score; a worker process does one after another."""

import gc
import json
import shutil
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Optional

import numpy as np
import torch
import transformers
from torch.utils.data import DataLoader, Subset
from transformers import AutoConfig, AutoModelForSequenceClassification, Trainer, set_seed

from head_pruning import HeadMask
from head_pruning.importance import pruning_rounds
from hf_plugin.command_line.arguments import parse
from hf_plugin.glue.metrics import predicted, score
from hf_plugin.glue.tasks import find_task
from hf_plugin.heads.importance import head_importance
from hf_plugin.heads.masking import head_mask
from hf_plugin.mapping.unit_map import unit_map
from hf_plugin.training.trainer import HeadPruningTrainer

from .glue_grid import (
    HEADS,
    KEPT,
    MICHEL_BATCH,
    MICHEL_EXAMPLES,
    MICHEL_ROUND,
    RECIPE,
    TASKS,
    Cell,
    dense_folder,
)
from .glue_pack import PackedSplit, collate

EVALUATION_BATCH = 256


class Bench:
    """Measures cells from a pack; dense models are kept in the work folder.

    Args:
        pack: what ``glue_pack`` wrote.
        work: for the dense models.
        device: ``cuda`` or ``cpu``.
        updates: at most so many per training, and Michel batches per importance; None: all.
    """

    def __init__(self, pack: Path, work: Path, device: str, updates: Optional[int]) -> None:
        self.pack, self.work, self.updates = pack, work, updates
        self.device = torch.device(device)
        self.name = torch.cuda.get_device_name(0) if device == "cuda" else "CPU"
        self.splits: dict[tuple[str, str], PackedSplit] = {}

    def split(self, task: str, name: str) -> PackedSplit:
        """A split of a task, read once."""
        if (task, name) not in self.splits:
            self.splits[task, name] = PackedSplit(self.pack, task, name)
        return self.splits[task, name]

    def run(self, cell: Cell) -> list[dict]:
        """Measure a cell: one row per number of heads."""
        begin = time.perf_counter()
        rows = self.cut(cell) if cell.michel else [self.train(cell)]
        seconds = round(time.perf_counter() - begin, 2)
        facts = {"cell": cell.name, "task": cell.task, "method": cell.method, "seed": cell.seed}
        facts |= {"options": list(cell.options), "seconds": seconds, "device": self.name}
        gc.collect()  # a Trainer refers to itself, and holds a model
        return [{**facts, **row} for row in rows]

    def model(self, cell: Cell) -> torch.nn.Module:
        """What the cell starts from, in float32."""
        start = dense_folder(self.work, cell.dense) if cell.after_dense else self.pack / "model"
        config = AutoConfig.from_pretrained(start, num_labels=find_task(cell.task).num_labels)
        return AutoModelForSequenceClassification.from_pretrained(start, config=config, dtype=torch.float32)

    def train(self, cell: Cell) -> dict:
        """Train and score on the validation set."""
        on_cpu = ["--use_cpu"] if self.device.type == "cpu" else []
        limit = ["--max_steps", str(self.updates)] if self.updates else []
        arguments = parse(
            [
                *("--task_name", cell.task, "--model_name_or_path", str(self.pack / "model"), "--do_train"),
                *("--output_dir", str(self.work / "trainer"), "--seed", str(cell.seed), *RECIPE.split()),
                *("--num_train_epochs", str(TASKS[cell.task].epochs), "--report_to", "none"),
                # Without these the Trainer waits for the device in every step.
                *("--logging_nan_inf_filter", "False", "--accelerator_config", json.dumps({"non_blocking": True})),
                *("--remove_unused_columns", "False", "--dataloader_pin_memory", str(self.device.type == "cuda")),
                *(*on_cpu, *limit, *cell.options),
            ],
            cell.script,
        )
        set_seed(cell.seed)
        model = self.model(cell)
        options = {
            "model": model,
            "args": arguments.training,
            "train_dataset": self.split(cell.task, "train"),
            "data_collator": collate,
        }
        if arguments.pruners:
            trainer = HeadPruningTrainer(**options, pruners=arguments.pruners)
        else:
            trainer = Trainer(**options)
        trainer.train()
        mask = getattr(trainer, "head_mask", None)
        row = self.scored(cell, model, mask)
        if cell.method == "dense":
            save_dense(model, dense_folder(self.work, cell))
        return row

    def cut(self, cell: Cell) -> list[dict]:
        """Michel: scores at each of KEPT, without training."""
        set_seed(cell.seed)
        model = self.model(cell).to(self.device).eval()
        units = unit_map(model)
        train = self.split(cell.task, "train")
        count = min(len(train), MICHEL_EXAMPLES, (self.updates or len(train)) * MICHEL_BATCH)
        loader = DataLoader(
            Subset(train, range(count)),
            MICHEL_BATCH,
            collate_fn=collate,
            pin_memory=self.device.type == "cuda",
        )
        rows = []

        def importance(mask: HeadMask) -> np.ndarray:
            return head_importance(model, loader, mask=mask, unit_map=units, progress=False)

        def note(mask: HeadMask) -> float:
            if mask.kept not in KEPT:
                return 0.0
            with head_mask(model, mask, unit_map=units):
                rows.append(self.scored(cell, model, mask))
            return rows[-1]["score"]

        exact = "--exact_pruning" in cell.options
        for result in pruning_rounds(units, importance, note, heads_per_round=MICHEL_ROUND, exact=exact):
            if result.mask.kept == min(KEPT):
                break
        return rows

    def scored(self, cell: Cell, model: torch.nn.Module, mask: Optional[HeadMask]) -> dict:
        """Heads, score in percent and all metrics of a model whose gates are set."""
        validation = self.split(cell.task, "validation")
        loader = DataLoader(validation, EVALUATION_BATCH, collate_fn=collate)
        model.eval()
        outputs = []
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16):
            for batch in loader:
                del batch["labels"]
                batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
                outputs.append(model(**batch).logits.float())
        task = find_task(cell.task)
        metrics = score(task, predicted(task, torch.cat(outputs).cpu().numpy()), validation.labels)
        return {
            "heads": mask.kept if mask else HEADS,
            "score": 100.0 * metrics[TASKS[cell.task].metric],
            "metrics": {name: round(value, 5) for name, value in metrics.items()},
            "kept": " ".join("".join("#" if k else "." for k in keep) for keep in mask.by_site().values())
            if mask
            else None,
        }


def save_dense(model: torch.nn.Module, folder: Path) -> None:
    """Save a model; the folder appears whole or not at all."""
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def serve(connection: Connection, pack: Path, work: Path, device: str, updates: Optional[int]) -> None:
    """Measure the cells that come through ``connection``, and answer each with its rows, or the text of its error."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    bench = Bench(pack, work, device, updates)
    while True:
        try:
            cell = connection.recv()
        except EOFError:  # the grid is done, or stopped
            return
        try:
            connection.send(bench.run(cell))
        except Exception as error:
            traceback.print_exc()
            connection.send(f"{type(error).__name__}: {error}")
