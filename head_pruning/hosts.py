"""What the ``head-pruning`` command asks of a host: which files are its own, how they load, what they export to.

A host is a module named by an entry point of the group ``head_pruning.hosts``. It has

- ``name``: what people call it;
- ``recognises(path) -> bool``: whether a file or folder is a model of this host, told without loading it;
- ``load(path, mask) -> HostModel``: raises HeadPruningError when the model cannot be loaded or the mask is of another;
- ``recipe(path) -> dict | None``: the recipe of removed heads that a folder of this host was saved with, told without
  loading the model (:mod:`head_pruning.compact`); None where no head was cut out. Asked of folders only;
- ``exports``: format to a function ``(source, target, mask) -> str`` that writes ``target`` atomically and returns the
  line to print; a mask stands in for that of the run.
"""

import contextlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Mapping, Optional, Protocol

import torch
from torch import nn

from .errors import HeadPruningError
from .files import MASKS_FILE, read_metadata
from .masks import HeadMask, full_mask
from .quantization.engine.tensors import flattened
from .surgery.remaining import heads_left, mask_of_original, recipe_of
from .surgery.removal import remove_heads
from .surgery.zeros import refuse_inexact_zeros, zeroed_heads
from .unit_map import UnitMap
from .weights.files import save_compressed

GROUP = "head_pruning.hosts"


@dataclass(frozen=True)
class HostModel:
    """A loaded model.

    Args:
        model: dense or compact, in evaluation mode, without gates.
        unit_map: its sites as they are now, with 0 heads where none is left (:func:`head_pruning.surgery.sites_left`).
        mask: the heads of ``unit_map`` that its run decided to keep; None if there was no run, or the others are
            already cut out.
        example: ``(batch, length)`` to the keyword arguments of a forward pass.
        weights: what pruning.json tells of pruned weights (:func:`head_pruning.weights.weight_report`), if it does.
        longest: tokens that ``example`` can make, those that the model has positions for; None where any number.
    """

    model: nn.Module
    unit_map: UnitMap
    mask: Optional[HeadMask]
    example: Callable[[int, int], dict[str, torch.Tensor]]
    weights: Optional[Mapping[str, Any]] = None
    longest: Optional[int] = None


class Host(Protocol):
    """The module of a host."""

    name: str
    exports: Mapping[str, Callable[[Path, Path, Optional[HeadMask]], str]]

    def recognises(self, path: Path) -> bool: ...

    def recipe(self, path: Path) -> Optional[Mapping[str, Any]]: ...

    def load(self, path: Path, mask: Optional[HeadMask]) -> HostModel: ...


def find_host(path: "str | Path") -> Host:
    """The host of a model.

    Raises:
        HeadPruningError: there is no such file or folder, no host knows it, or its host is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise HeadPruningError(f"There is no {path}; check the path.")
    absent = []
    # Importing a host takes seconds: ask that of folders first for a folder, and last for a file.
    entries = importlib.metadata.entry_points(group=GROUP)
    for entry in sorted(entries, key=lambda entry: (entry.name == "transformers") != path.is_dir()):
        try:
            host: Host = entry.load()
        except ImportError as error:
            absent.append(f"{entry.name} ({error})")
            continue
        if host.recognises(path):
            return host
    hint = f", unless it is one of a host that is not installed: {', '.join(absent)}" if absent else ""
    raise HeadPruningError(
        f"{path} is neither a folder of save_pretrained nor a checkpoint of fairseq{hint}; give the path of a model."
    )


def kept_heads(loaded: HostModel) -> Optional[HeadMask]:
    """The heads of the original model that stay: those of the mask, of those that a compact model was left with.

    None for a dense model without a mask.
    """
    recipe = recipe_of(loaded.model)
    if recipe is None or loaded.mask is None:
        return loaded.mask if recipe is None else heads_left(loaded.model)
    return mask_of_original(recipe, loaded.mask)


def cut_out(loaded: HostModel) -> str:
    """Cut the heads out that the mask does not keep; the words for what is left."""
    if loaded.mask is not None and not loaded.mask.keep.all():
        remove_heads(loaded.model, loaded.unit_map, loaded.mask)
    left = heads_left(loaded.model)
    return "all heads" if left is None else left.words


def compressed_format(load: Callable[[Path, Optional[HeadMask]], HostModel]) -> dict[str, Callable]:
    """The export of a host's models to one file of tensors without their zeros, see :func:`save_compressed`.

    Args:
        load: the host's.
    """

    def export(source: Path, target: Path, mask: Optional[HeadMask] = None) -> str:
        if target.is_dir():
            raise HeadPruningError(f"{target} is a folder; name a file to write the tensors to.")
        loaded = load(source, mask)
        if loaded.mask is not None:
            refuse_inexact_zeros(loaded.model, loaded.mask)
        with contextlib.nullcontext() if loaded.mask is None else zeroed_heads(loaded.model, loaded.mask):
            save_compressed(target, flattened(loaded.model.state_dict()))
        dense = sum(parameter.nbytes for parameter in loaded.model.parameters())
        share = target.stat().st_size / dense
        return f"{target}: {share:.1%} of the model's {dense:,} bytes; head_pruning.weights.load_compressed reads it"

    return {"compressed": export}


def read_mask(path: "str | Path", *, dense: bool = False) -> HeadMask:
    """The head mask of a file, or of a model; that of a compact model names the heads of its original.

    Args:
        path: a mask file, a run's folder, or a model.
        dense: whether a model whose heads were not pruned has the mask that keeps all.

    Raises:
        HeadPruningError: there is none.
    """
    path = Path(path)
    if path.name == MASKS_FILE and _is_model(path.parent):
        path = path.parent
    if path.suffix == Path(MASKS_FILE).suffix:
        return HeadMask.load(path)
    if path.is_dir() and (path / MASKS_FILE).is_file() and not (dense and not holds_heads(path / MASKS_FILE)):
        mask = HeadMask.load(path / MASKS_FILE)
        recipe = _recipe(path)
        return mask if recipe is None else mask_of_original(recipe, mask)
    loaded = find_host(path).load(path, None)
    found = kept_heads(loaded)
    if found is None and not dense:
        raise HeadPruningError(f"{path} is a dense model and holds no head mask; give a model that was pruned.")
    return found or full_mask(loaded.unit_map)


def holds_heads(path: "str | Path") -> bool:
    """Whether a file of masks holds a head mask, and not only masks of weights.

    Raises:
        HeadPruningError: the file is missing or damaged.
    """
    _, metadata = read_metadata(path)
    return "unit_map" in metadata or "weight_shapes" not in metadata


def _recipe(folder: Path) -> Optional[Mapping[str, Any]]:
    """The recipe of removed heads in a folder with a mask; None where it is no model of an installed host."""
    if not _is_model(folder):
        return None
    try:
        host = find_host(folder)
    except HeadPruningError:
        return None
    return host.recipe(folder)


def _is_model(folder: Path) -> bool:
    """Whether a folder is a model itself, and not one that checkpoints lie in: hosts take long to ask."""
    return (folder / "config.json").is_file()
