"""Turn a pruned checkpoint into an ordinary one that plain fairseq loads: the removed heads' weights are zero."""

import argparse
import dataclasses
from pathlib import Path
from typing import Optional

import torch
from fairseq.tasks import TASK_DATACLASS_REGISTRY

from head_pruning import HeadMask, HeadPruningError
from head_pruning.artifacts import atomic_path

from .state import mask_of_state, split_state

TASK_SUFFIX = "_head_pruning"


def load_checkpoint(path: "str | Path") -> dict:
    """Read a fairseq checkpoint without unpickling code. Raises HeadPruningError when missing or damaged."""
    if not Path(path).is_file():
        raise HeadPruningError(f"There is no checkpoint {path}; check the path.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise HeadPruningError(f"{path} is damaged or no fairseq checkpoint ({reason}); write it again.") from error
    if not isinstance(state, dict) or "model" not in state:
        raise HeadPruningError(f"{path} is no fairseq checkpoint: it has no model in it.")
    return state


def zero_heads(weights: dict, mask: HeadMask) -> None:
    """Zero, in place, the q, k, v rows and the output columns of the removed heads in a model state dict."""
    for site, where in mask.unit_map.slices():
        channels = torch.from_numpy(~mask.keep[where]).repeat_interleave(site.head_dim)
        weights[f"{site.out_proj}.weight"][:, channels] = 0
        for name in site.projections:
            weights[f"{name}.weight"][channels] = 0
            if f"{name}.bias" in weights:
                weights[f"{name}.bias"][channels] = 0


def plain_config(cfg: dict) -> None:
    """Set the task and the criterion of a stored configuration back to fairseq's own, in place."""
    task = cfg.get("task")
    name = task.get("_name", "") if isinstance(task, dict) else ""
    if name.endswith(TASK_SUFFIX):
        plain = name[: -len(TASK_SUFFIX)]
        known = {field.name for field in dataclasses.fields(TASK_DATACLASS_REGISTRY[plain])}
        cfg["task"] = {key: value for key, value in task.items() if key in known}
        cfg["task"]["_name"] = plain
    criterion = cfg.get("criterion")
    if isinstance(criterion, dict) and str(criterion.get("_name", "")).endswith(TASK_SUFFIX):
        criterion["_name"] = criterion["_name"][: -len(TASK_SUFFIX)]


def export_masked(source: "str | Path", target: "str | Path", mask: Optional[HeadMask] = None) -> HeadMask:
    """Write the masked export of ``source`` to ``target``.

    Args:
        source: a checkpoint of a pruning run, or a dense one together with ``mask``.
        target: the file to write, atomically.
        mask: the heads to keep; default: those of the checkpoint.

    Returns:
        The mask that was applied.
    """
    state = load_checkpoint(source)
    state["model"], stored = split_state(state["model"])
    if mask is None:
        mask = mask_of_state(stored)
    try:
        zero_heads(state["model"], mask)
        averaged = state.get("extra_state", {}).get("ema")
        if averaged is not None:
            state["extra_state"]["ema"] = split_state(averaged)[0]
            zero_heads(state["extra_state"]["ema"], mask)
    except (KeyError, IndexError) as error:
        raise HeadPruningError(f"The mask does not fit {source} ({error}); use a mask made for this model.") from error
    if isinstance(state.get("cfg"), dict):
        plain_config(state["cfg"])
    # The optimizer's moments belong to weights that are gone.
    state.pop("last_optimizer_state", None)
    with atomic_path(target) as temporary:
        torch.save(state, temporary)
    return mask


def add_command(commands) -> None:
    """Add ``head-pruning export-fairseq`` to the command line."""
    parser = commands.add_parser("export-fairseq", help="write a pruned fairseq checkpoint that plain fairseq loads")
    parser.add_argument("checkpoint", help="checkpoint of a pruning run, or a dense one with --mask")
    parser.add_argument("output", help="file to write")
    parser.add_argument("--mask", help="head mask file to apply instead of the checkpoint's own")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    mask = export_masked(args.checkpoint, args.output, HeadMask.load(args.mask) if args.mask else None)
    print(f"{args.output}: {mask.kept} of {mask.keep.size} heads, the others are zero")
