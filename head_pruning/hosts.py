"""What the ``head-pruning`` command asks of a host: which files are its own, how they load, what they export to.

A host is a module named by an entry point of the group ``head_pruning.hosts``. It has

- ``name``: what people call it;
- ``recognises(path) -> bool``: whether a file or folder is a model of this host, told without loading it;
- ``load(path, mask) -> HostModel``: raises HeadPruningError when the model cannot be loaded or the mask is of another;
- ``exports``: format to a function ``(source, target, mask) -> str`` that writes ``target`` atomically and returns the
  line to print; a mask stands in for that of the run.
"""

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Mapping, Optional, Protocol

import torch
from torch import nn

from .artifacts import MASKS_FILE
from .errors import HeadPruningError
from .surgery import heads_left
from .unit_map import HeadMask, UnitMap, lifted

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
    """

    model: nn.Module
    unit_map: UnitMap
    mask: Optional[HeadMask]
    example: Callable[[int, int], dict[str, torch.Tensor]]


class Host(Protocol):
    """The module of a host."""

    name: str
    exports: Mapping[str, Callable[[Path, Path, Optional[HeadMask]], str]]

    def recognises(self, path: Path) -> bool: ...

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
            host = entry.load()
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
    left = heads_left(loaded.model)
    if left is None or loaded.mask is None:
        return loaded.mask if left is None else left
    return lifted(left, loaded.mask) if loaded.mask.keep.size == left.kept else loaded.mask


def read_mask(path: "str | Path") -> HeadMask:
    """The head mask of a file, or of a model.

    Raises:
        HeadPruningError: there is none.
    """
    path = Path(path)
    if path.is_dir() and (path / MASKS_FILE).is_file():
        return HeadMask.load(path / MASKS_FILE)
    if path.suffix == Path(MASKS_FILE).suffix:
        return HeadMask.load(path)
    mask = kept_heads(find_host(path).load(path, None))
    if mask is None:
        raise HeadPruningError(f"{path} is a dense model and holds no head mask; give a model that was pruned.")
    return mask
