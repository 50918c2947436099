"""What the tests read from checkpoints, and a pruned model made by hand."""

import json
from pathlib import Path

import numpy as np
import torch

from fairseq_plugin.patches import allow_safe_globals
from head_pruning import HeadMask, UnitMap


def read(path) -> dict:
    """The whole checkpoint."""
    allow_safe_globals()  # anew: a Trainer of transformers that resumed in this process took them away
    return torch.load(path, map_location="cpu")


def mask_beside(checkpoint) -> HeadMask:
    """The mask in the folder of a checkpoint, written with the last one saved."""
    return HeadMask.load(Path(checkpoint).parent / "masks.safetensors")


def mask_in(checkpoint) -> HeadMask:
    """The mask in a checkpoint (the files beside it are of the last one saved)."""
    return HeadMask(mask_beside(checkpoint).unit_map, read(checkpoint)["model"]["head_pruning.keep"].numpy() > 0.5)


def mask_in_state(state) -> HeadMask:
    """The mask in a checkpoint that was read, without the files beside it."""
    told = json.loads(bytes(state["model"]["head_pruning.meta.version1"].tolist()))
    return HeadMask(UnitMap.from_dict(told["unit_map"]), state["model"]["head_pruning.keep"].numpy() > 0.5)


def session_of(checkpoint) -> dict[str, np.ndarray]:
    """The session's state in a checkpoint, without the prefix."""
    prefix = "head_pruning.session."
    model = read(checkpoint)["model"]
    return {name[len(prefix) :]: value.numpy() for name, value in model.items() if name.startswith(prefix)}


def logits_of(checkpoint) -> np.ndarray:
    """The gate logits in a checkpoint, or the sensitivities."""
    return next(value for name, value in session_of(checkpoint).items() if name.endswith((".logits", ".scores")))


def weights_of(checkpoint) -> dict[str, torch.Tensor]:
    """The model's own tensors."""
    return {k: v for k, v in read(checkpoint)["model"].items() if not k.startswith("head_pruning.")}


def zeroed_by_hand(checkpoint, target, mask=None) -> Path:
    """Write an ordinary checkpoint whose removed heads (default: none) have zeros in the output projection."""
    state = read(checkpoint)
    state["model"] = weights_of(checkpoint)
    state["extra_state"].pop("head_pruning", None)
    if mask is not None:
        for site, where in mask.unit_map.slices():
            for head in np.flatnonzero(~mask.keep[where]):
                columns = slice(head * site.head_dim, (head + 1) * site.head_dim)
                state["model"][f"{site.out_proj}.weight"][:, columns] = 0.0
    torch.save(state, target)
    return Path(target)


def same(first, second, where="") -> None:
    """Assert that two nests of dicts, lists and tensors are equal, bit for bit."""
    assert isinstance(first, dict) == isinstance(second, dict), where
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            same(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for index, pair in enumerate(zip(first, second)):
            same(*pair, f"{where}.{index}")
    elif isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and torch.equal(first, second), where
    else:
        assert first == second, where


def same_training_state(first, second) -> None:
    """Assert that model, gates, both optimizers and the learning-rate schedule of two checkpoints are bit-equal."""
    first, second = read(first), read(second)
    for part in ("model", "last_optimizer_state"):
        same(first[part], second[part], part)
    for key in ("num_updates", "lr_scheduler_state", "optimizer_name"):
        same(first["optimizer_history"][-1][key], second["optimizer_history"][-1][key], key)
    iterators = [state["extra_state"]["train_iterator"] for state in (first, second)]
    assert iterators[0] == iterators[1]
