"""What the core reads."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterator

import numpy as np
import torch

from head_pruning import AttentionSite, HeadMask, HeadPruningError, PruningSession, UnitMap
from head_pruning.hosts import holds_heads
from head_pruning.importance.michel import PruningRound
from head_pruning.importance.rounds import ROUNDS_FILE, RoundsReport
from head_pruning.old_masks import read_old_mask
from head_pruning.quantization.engine.files import QUANTIZATION_FILE, read_ranges, save_ranges
from head_pruning.report.report_file import read_report
from head_pruning.weights import load_compressed, load_weight_masks, save_compressed, save_weight_masks
from tests.core.conftest import make_batch, make_seq2seq, sum_loss
from tests.core.test_methods import build, train

from .damage import damaged_bytes, damaged_json, damaged_safetensors, damaged_value

#: A target: gives, for a folder and a source of randomness, one reading of a damaged input after the other.
Target = Callable[[Path, random.Random], Iterator[Callable[[], Any]]]
SITES = UnitMap(
    tuple(AttentionSite(f"layers.{i}.attn", "encoder_self", f"layers.{i}", 4, 8, f"layers.{i}.out") for i in range(3))
)
MASK = HeadMask(SITES, np.arange(12) % 3 < 2)


def mask_files(folder: Path, rng: random.Random) -> Iterator[Callable[[], Any]]:
    """Masks of heads and weights."""
    good, bad = folder / "good.safetensors", folder / "bad.safetensors"
    save_weight_masks(good, {"a.weight": torch.eye(9) > 0, "b.weight": torch.ones(3, 5) > 0}, MASK)
    data = good.read_bytes()

    def read() -> None:
        refusals = []
        for each in (holds_heads, HeadMask.load, load_weight_masks):
            try:
                each(bad)
            except HeadPruningError as error:
                refusals.append(error)
        if refusals:
            raise refusals[0]

    while True:
        bad.write_bytes(damaged_safetensors(rng, data))
        yield read


def old_masks(folder: Path, rng: random.Random) -> Iterator[Callable[[], Any]]:
    """Masks of the published code."""
    path, kinds = folder / "mask8.pt", []
    for value in (
        torch.ones(3, 4),
        torch.ones(1).expand(3, 4),
        torch.ones(3, 4).bfloat16(),
        {"a": [torch.ones(3, 4)]},
    ):
        for new in (True, False):
            torch.save(value, path, _use_new_zipfile_serialization=new)
            kinds.append(path.read_bytes())
    while True:
        path.write_bytes(damaged_bytes(rng, rng.choice(kinds)))
        yield lambda: read_old_mask(path, SITES)


def compressed_files(folder: Path, rng: random.Random) -> Iterator[Callable[[], Any]]:
    """Tensors without their zeros."""
    good, bad = folder / "good.safetensors", folder / "bad.safetensors"
    sparse = torch.eye(16) * 2
    save_compressed(good, {"a": sparse, "b": torch.arange(6.0), "c": sparse, "d": torch.arange(3)})
    data = good.read_bytes()
    while True:
        bad.write_bytes(damaged_safetensors(rng, data))
        yield lambda: load_compressed(bad)


def rounds(folder: Path, rng: random.Random) -> Iterator[Callable[[], Any]]:
    """The file of a Michel run."""
    report = RoundsReport(folder, {"seed": 1}, SITES)
    for keep in (9, 6):
        report.add(PruningRound(HeadMask(SITES, np.arange(12) < keep), 0.5, np.arange(12.0)))
    path = folder / ROUNDS_FILE
    text = path.read_text()
    while True:
        path.write_text(damaged_json(rng, text), encoding="latin-1")
        yield lambda: RoundsReport(folder, {"seed": 1}, SITES)


def reports(folder: Path, rng: random.Random) -> Iterator[Callable[[], Any]]:
    """pruning.json, as the library reads it."""
    path = folder / "pruning.json"
    weights = {"method": "platon", "options": {"a": 1}, "weights_kept": 5, "weights_total": 9, "density": 0.5}
    weights |= {"kept_by_tensor": {"a": [5, 9]}, "left_dense": {"b": 4}}
    text = json.dumps({"method": "dsp", "options": {}, "history": [{"step": 1}], "weights": weights})
    while True:
        path.write_text(damaged_json(rng, text), encoding="latin-1")
        yield lambda: read_report(path)


def input_ranges(folder: Path, rng: random.Random) -> Iterator[Callable[[], Any]]:
    """quantization.json."""
    save_ranges(folder, "average", {f"layers.{i}.out": (0.01 * (i + 1), 128) for i in range(3)})
    path = folder / QUANTIZATION_FILE
    text = path.read_text(encoding="utf-8")
    while True:
        path.write_text(damaged_json(rng, text), encoding="latin-1")
        yield lambda: read_ranges(folder)


def states(folder: Path, rng: random.Random) -> Iterator[Callable[[], Any]]:
    """The states of sessions, which must also be of use when they are taken."""
    toy, held = SimpleNamespace(make=make_seq2seq, batch=make_batch, loss=sum_loss), []
    for name in ("dsp", "gradual_magnitude", "platon"):
        state, *_ = train(toy, name, folder / "none", range(3))
        held.append((build(toy, name, folder / "none")[1], state["session"], state["tensors"]))

    def read(session: PruningSession, values: dict, tensors: dict) -> None:
        session.load_state_dict(values)
        session.load_tensor_state(tensors)
        session.state_dict(), session.metrics(), session.head_mask()

    while True:
        session, values, tensors = rng.choice(held)
        bad, tensors = {name: value.tolist() for name, value in values.items()}, dict(tensors)
        if tensors and rng.random() < 0.4:
            name = rng.choice(list(tensors))
            tensors[name] = damaged_tensor(rng, tensors[name])
        else:
            bad = damaged_value(rng, bad)
        if isinstance(bad, dict):
            yield lambda session=session, bad=bad, tensors=tensors: read(session, bad, tensors)


def damaged_tensor(rng: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """Of another shape or type, or with numbers that cannot be."""
    kinds: list[Callable[[], torch.Tensor]] = [
        lambda: tensor[:0],
        lambda: tensor.to(torch.float64),
        lambda: tensor.to(torch.int32),
        lambda: tensor.reshape(-1),
        lambda: tensor.float() * torch.nan,
        lambda: tensor.float() + 1e30,
        lambda: tensor.flatten()[:1].expand(10**6, 10**6),
        lambda: tensor.float().to_sparse(),
    ]
    return rng.choice(kinds)()


CORE: dict[str, Target] = {
    "mask files": mask_files,
    "masks of the published code": old_masks,
    "compressed models": compressed_files,
    "michel_rounds.json": rounds,
    "pruning.json": reports,
    "quantization.json": input_ranges,
    "states of sessions": states,
}
