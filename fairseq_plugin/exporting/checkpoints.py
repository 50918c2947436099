"""What a pruned checkpoint is turned into: an ordinary one with zeros, or one whose heads are cut out.

Pruned weights are zero in both.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any, Iterator, Optional

import numpy as np
import torch
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.models.bart import BARTModel
from fairseq.tasks import TASK_DATACLASS_REGISTRY
from torch import nn

from head_pruning import HeadMask, HeadPruningError
from head_pruning.compact.recipe import ATTRIBUTE
from head_pruning.files import atomic_path
from head_pruning.inference.programs import check_file
from head_pruning.report.weights import WeightCount, count_weights, sum_counts
from head_pruning.surgery.removal import remove_heads
from head_pruning.surgery.zeros import refuse_inexact_zeros, removed_counts, zero_heads

from ..checkpoints.stored import KEEP, KEY, META, NUMBERS, RECIPE, PruningState, load_checkpoint, split_state
from ..checkpoints.weights import zero_weights
from ..modules.surgery import encode, plan_site
from ..options import TASK_SUFFIX

FP32_PARAMETERS = "ema_fp32_params"


def plain_config(cfg: dict) -> None:
    """Set the task and the criterion of a stored configuration back to fairseq's own, in place."""
    task: Any = cfg.get("task")
    if isinstance(task, argparse.Namespace):  # of a task of fairseq's old kind
        task._name = task.task = str(task._name).removesuffix(TASK_SUFFIX)
    name = task.get("_name", "") if isinstance(task, dict) else ""
    if name.endswith(TASK_SUFFIX):
        plain = name[: -len(TASK_SUFFIX)]
        known = {field.name for field in dataclasses.fields(TASK_DATACLASS_REGISTRY[plain])}
        cfg["task"] = {key: value for key, value in task.items() if key in known}
        cfg["task"]["_name"] = plain
    criterion = cfg.get("criterion")
    if isinstance(criterion, dict) and str(criterion.get("_name", "")).endswith(TASK_SUFFIX):
        criterion["_name"] = criterion["_name"][: -len(TASK_SUFFIX)]


def without_classes(value: Any) -> Any:
    """What a checkpoint says besides its tensors, as torch loads it without being told of any class.

    torch 2.6 and later refuse argparse's Namespace, in which fairseq-train stores the options of the model; fairseq
    reads a dictionary as well.
    """
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return {key: without_classes(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(without_classes, value))
    return value.item() if isinstance(value, np.generic) else value


def _needs_namespace(cfg: Any) -> bool:
    """Whether fairseq loads the stored model with its options in a Namespace only, as it does a BART's."""
    model = cfg.get("model") if isinstance(cfg, dict) else None
    return issubclass(ARCH_MODEL_REGISTRY.get(getattr(model, "arch", None), object), BARTModel)


def cut_heads(weights: dict, mask: HeadMask, before: Optional[dict]) -> tuple[dict, dict]:
    """Cut a model state dict.

    Args:
        weights: dotted names to tensors; not changed.
        mask: the heads to keep.
        before: the recipe of what was cut earlier, None if nothing was.

    Returns:
        The tensors that are left, in their order, and the recipe.

    Raises:
        HeadPruningError, AttributeError or ValueError: the mask is of another model.
    """
    for site in mask.unit_map.sites:
        known = (before or {"sites": {}})["sites"].get(site.name)
        if known is not None and len(known["kept"]) != site.heads:
            raise HeadPruningError(
                f"{site.name} has {len(known['kept'])} heads left, and the mask is for {site.heads}; use a mask made "
                "for the compact model."
            )
    tree = _tree(weights)
    if before is not None:
        setattr(tree, ATTRIBUTE, before)
    recipe = remove_heads(tree, dataclasses.replace(mask.unit_map, planner=plan_site, adapt=None), mask)
    left = dict(tree.named_buffers(remove_duplicate=False))
    return {name: left[name] for name in weights if name in left}, recipe


def _tree(weights: dict) -> nn.Module:
    """A model state dict as modules that hold nothing else."""
    tree = nn.Module()
    for name, tensor in weights.items():
        *path, leaf = name.split(".")
        module = tree
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_buffer(leaf, tensor)
    return tree


def shared(weights: dict) -> dict:
    """The same names, with one tensor for those that are equal.

    What a model has under several names (an encoder of several languages) is stored once per name by a run on a GPU.
    Tensors of one value (zeros, ones) are left alone; others are not equal by chance.
    """
    alike: dict[tuple, list[torch.Tensor]] = {}
    found = {}
    for name, tensor in weights.items():
        if tensor.is_floating_point() and tensor.numel() > 1 and tensor.min() != tensor.max():
            others = alike.setdefault((tensor.shape, tensor.dtype, *tensor.flatten()[:4].tolist()), [])
            tensor = next((other for other in others if torch.equal(other, tensor)), tensor)
            others.append(tensor)
        found[name] = tensor
    return found


def parameters(weights: dict) -> int:
    """The numbers in a model state dict; what is shared under several names counts once."""
    counted = {
        tensor.data_ptr(): tensor.numel()
        for name, tensor in weights.items()
        if tensor.is_floating_point() and not name.endswith(("version", "_float_tensor"))  # buffers of fairseq
    }
    return sum(counted.values())


def _weights(state: dict) -> Iterator[tuple[dict, str]]:
    """Where a checkpoint holds weights of the model: a dictionary and its key."""
    yield state, "model"
    averages = state.get("extra_state") or {}
    yield from ((averages, key) for key in ("ema", FP32_PARAMETERS) if averages.get(key) is not None)


@dataclasses.dataclass(frozen=True)
class _Exported:
    """The head mask that was applied, the model's parameters before and after, and the weights that stay."""

    mask: Optional[HeadMask]
    parameters: tuple[int, int]
    weights: WeightCount
    namespace: bool

    def pruned(self) -> str:
        """What stays, for a line to print."""
        heads = [self.mask.words] if self.mask is not None else []
        return ", ".join([*heads, *([str(self.weights)] if self.weights.dense else [])])


def _export(source: "str | Path", target: "str | Path", mask: Optional[HeadMask], compact: bool) -> _Exported:
    check_file(Path(target), ".pt")
    state = load_checkpoint(source)
    stored = PruningState.of(state)
    masks, before = stored.weight_masks(state["model"]), stored.recipe
    if before is not None and not compact:
        raise HeadPruningError(f"{source} is compact, the heads are gone; export the checkpoint it was made from.")
    if before is not None and mask is None and KEEP not in stored.heads:
        raise HeadPruningError(f"{source} is compact already; give a mask to cut more heads.")
    if mask is None and (KEEP in stored.heads or compact or not masks):
        mask = stored.head_mask()
    elif mask is not None and META in stored.heads:
        theirs = stored.description()["unit_map"].numbering(mask.unit_map.units)
        theirs.check_same_heads(mask.unit_map, "The mask")
    sizes, removed = [parameters(split_state(state["model"])[0])], {}
    try:
        for place, key in _weights(state):
            own = shared(split_state(place[key])[0])
            zero_weights(own, masks)
            if compact:
                assert mask is not None  # head_mask() raises where there is none
                own, recipe = cut_heads(own, mask, before)
                if key != FP32_PARAMETERS:  # is no state dict of a model
                    own[RECIPE] = encode(recipe)
            elif mask is not None:
                refuse_inexact_zeros(_tree(own), mask)
                zero_heads(_tree(own), mask)
                removed = removed_counts(_tree(own), mask)
            place[key] = own
    except HeadPruningError:
        raise
    except (AttributeError, KeyError, IndexError, ValueError) as error:
        raise HeadPruningError(f"The mask does not fit {source} ({error}); use a mask made for this model.") from error
    if isinstance(state.get("cfg"), dict):
        plain_config(state["cfg"])
    # The optimizer's moments and the pruner's averages belong to weights that are gone.
    state.pop("last_optimizer_state", None)
    for name in (KEY, NUMBERS):
        (state.get("extra_state") or {}).pop(name, None)
    written = split_state(state["model"])[0]
    sizes.append(parameters(written))
    before_heads = {name: keep.numel() for name, keep in masks.items()}
    counts = count_weights(masks, written, removed=removed, dense=before_heads)
    namespace = _needs_namespace(state.get("cfg"))
    for part in ("cfg", "extra_state", "optimizer_history", "task_state"):
        state[part] = without_classes(state.get(part))
    if namespace:
        state["cfg"]["model"] = argparse.Namespace(**state["cfg"]["model"])
    with atomic_path(target) as temporary:
        torch.save(state, temporary)
    return _Exported(mask, (sizes[0], sizes[1]), sum_counts(counts), namespace)


def export_masked(source: "str | Path", target: "str | Path", mask: Optional[HeadMask] = None) -> Optional[HeadMask]:
    """Write the masked export of ``source`` to ``target``: plain fairseq loads it, what was pruned is zero.

    Weights are those of the checkpoint's own masks; the moving average of weights is masked too.

    Args:
        source: a checkpoint of a pruning run, or a dense one together with ``mask``.
        target: the file to write, atomically.
        mask: the heads to keep; default: those of the checkpoint.

    Returns:
        The head mask that was applied, None where weights alone were pruned.

    Raises:
        HeadPruningError: the checkpoint is missing, damaged or compact, has no mask, the mask is of another model, or
            the target is a folder.
    """
    return _export(source, target, mask, compact=False).mask


def export_compact(source: "str | Path", target: "str | Path", mask: Optional[HeadMask] = None) -> HeadMask:
    """Write the compact export of ``source`` to ``target``: the heads are cut out of its tensors.

    Every command of fairseq with ``--user-dir fairseq_plugin`` loads it, to decode and to train on; plain fairseq
    stops at sizes that do not match. Epochs are counted on from those of ``source``: train on with
    ``--finetune-from-model``, which starts anew, or with ``--restore-file``.

    Args:
        source: a checkpoint of a pruning run, or a dense or compact one together with ``mask``.
        target: the file to write, atomically.
        mask: the heads to keep, of those that ``source`` has; default: those of the checkpoint.

    Returns:
        The mask that was applied.

    Raises:
        HeadPruningError: the checkpoint is missing or damaged, has no mask, the mask is of another model, or the
            target is a folder.
    """
    return export_counted(source, target, mask)[0]


def export_counted(
    source: "str | Path", target: "str | Path", mask: Optional[HeadMask] = None
) -> tuple[HeadMask, int]:
    """:func:`export_compact`; also the number of parameters that are left."""
    done = _export(source, target, mask, compact=True)
    assert done.mask is not None
    return done.mask, done.parameters[1]


def masked(source: Path, target: Path, mask: Optional[HeadMask]) -> str:
    """:func:`export_masked` for the command line: the line to print."""
    done = _export(source, target, mask, compact=False)
    line = f"{target}: {done.pruned()}, the others are zero"
    return f"{line}; plain fairseq reads it with TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 set" if done.namespace else line


def compact(source: Path, target: Path, mask: Optional[HeadMask]) -> str:
    """:func:`export_compact` for the command line: the line to print."""
    done = _export(source, target, mask, compact=True)
    return f"{target}: {done.pruned()}, {done.parameters[1]:,} of {done.parameters[0]:,} parameters"
