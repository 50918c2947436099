"""What travels to the GPU machine: an encoder in float16, and GLUE tasks as token ids in one ``.npz`` each.

    python -m benchmarks.gpu.glue_pack MODEL DATA FOLDER

Reading needs neither the tokenizer nor ``datasets``.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from head_pruning import HeadPruningError
from head_pruning.errors import one_line
from head_pruning.files import write_json

from .glue_grid import HEADS, TASKS, Task

SPLITS = ("train", "validation")
PAD_TO = 8  # few different shapes, which tensor cores like


def pack(model: Path, data: Path, folder: Path) -> None:
    """Write ``model/``, ``TASK.npz`` and ``pack.json`` into ``folder``.

    Raises:
        HeadPruningError: the model has another number of heads than the grid or does not fit float16, or a task
            cannot be read.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(model)
        tokenizer = AutoTokenizer.from_pretrained(model)
        encoder = AutoModel.from_pretrained(model, dtype=torch.float16)
    except (OSError, ValueError, RuntimeError) as error:
        reason = one_line(error)[:300]
        raise HeadPruningError(
            f"{model} cannot be loaded ({reason}); give the folder of an encoder with its tokenizer."
        ) from error
    heads = config.num_hidden_layers * config.num_attention_heads
    if heads != HEADS:
        raise HeadPruningError(f"{model} has {heads} heads, but the grid is for {HEADS}; give another encoder.")
    if len(tokenizer) > 2**16:
        raise HeadPruningError(
            f"{model} has more than {2**16} tokens, which 16 bits do not hold; give another encoder."
        )
    broken = [name for name, tensor in encoder.named_parameters() if not torch.isfinite(tensor).all()]
    if broken:
        raise HeadPruningError(f"{broken[0]} of {model} does not fit float16; give another encoder.")
    encoder.save_pretrained(folder / "model")
    rows = {}
    with tempfile.TemporaryDirectory() as cache:
        for task in TASKS.values():
            rows[task.name] = _pack_task(task, tokenizer, data, folder, cache)
    digest = hashlib.sha256()
    for path in [folder / "model" / "model.safetensors", *(folder / f"{name}.npz" for name in TASKS)]:
        digest.update(path.read_bytes())
    name = json.loads((model / "config.json").read_text(encoding="utf-8")).get("_name_or_path") or model.name
    write_json(folder / "pack.json", {"model": name, "digest": digest.hexdigest()[:16], "rows": rows})


def _pack_task(task: Task, tokenizer: Any, data: Path, folder: Path, cache: str) -> dict[str, int]:
    from hf_plugin.glue import load_task

    loaded = load_task(
        task.name,
        tokenizer=tokenizer,
        data_dir=data / task.name,
        cache_dir=cache,
        max_seq_length=task.length,
        splits=SPLITS,
    )
    (validation,) = loaded.validation.values()
    arrays = {}
    for split, table in zip(SPLITS, (loaded.train, validation)):
        ids = table["input_ids"][:]
        types = table["token_type_ids"][:] if "token_type_ids" in table.column_names else [[0] * len(i) for i in ids]
        arrays[f"{split}.ids"] = np.concatenate([np.array(row, dtype=np.uint16) for row in ids])
        arrays[f"{split}.types"] = np.concatenate([np.array(row, dtype=np.uint8) for row in types])
        arrays[f"{split}.lengths"] = np.array([len(row) for row in ids], dtype=np.uint16)
        arrays[f"{split}.labels"] = np.array(table["label"][:], dtype=np.uint8)
    np.savez_compressed(folder / f"{task.name}.npz", **arrays)
    return {split: len(arrays[f"{split}.labels"]) for split in SPLITS}


class PackedSplit(torch.utils.data.Dataset):
    """One split of a packed task: rows with ``input_ids`` (uint16), ``token_type_ids`` (uint8) and ``label``."""

    def __init__(self, pack: Path, task: str, split: str) -> None:
        with np.load(pack / f"{task}.npz", allow_pickle=False) as arrays:
            self.ids, self.types, lengths, self.labels = (
                arrays[f"{split}.{name}"] for name in ("ids", "types", "lengths", "labels")
            )
        self.ends = np.cumsum(lengths, dtype=np.int64)
        self.starts = self.ends - lengths

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        where = slice(self.starts[index], self.ends[index])
        return {"input_ids": self.ids[where], "token_type_ids": self.types[where], "label": self.labels[index]}


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch ``[B, T]`` with T a multiple of 8. Padding is token 0, which the mask hides."""
    longest = max(len(row["input_ids"]) for row in rows)
    shape = (len(rows), -(-longest // PAD_TO) * PAD_TO)
    ids, types, mask = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[i, :length], types[i, :length], mask[i, :length] = row["input_ids"], row["token_type_ids"], 1
    labels = np.array([row["label"] for row in rows], dtype=np.int64)
    batch = {"input_ids": ids, "token_type_ids": types, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(values) for name, values in batch.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data", "folder"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args()
    try:
        pack(options.model, options.data, options.folder)
    except HeadPruningError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
