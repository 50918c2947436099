"""Checkpoints of fairseq for the ``head-pruning`` command: how they load and what they export to."""

import contextlib
import copy
import functools
import inspect
import re
import tempfile
from pathlib import Path
from typing import Any, Callable, Mapping, MutableMapping, Optional

import torch
from fairseq import checkpoint_utils, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import BaseFairseqModel
from omegaconf import open_dict

from head_pruning import HeadMask, HeadPruningError
from head_pruning.errors import one_line
from head_pruning.hosts import HostModel, compressed_format
from head_pruning.inference.programs import program_formats
from head_pruning.report.weights import count_weights, weight_report
from head_pruning.surgery.zeros import removed_counts, zeroed_heads

from .checkpoints.stored import KEEP, RECIPE, PruningState, split_state
from .checkpoints.weights import zero_weights
from .exporting.checkpoints import compact, masked
from .exporting.example_batch import SPECIALS, example, longest
from .exporting.programs import export_onnx, export_program
from .modules.unit_map import unit_map
from .options import TASK_SUFFIX

name = "fairseq"


def recognises(path: Path) -> bool:
    """Whether ``path`` is a ``.pt`` file; loading says what is wrong with one that fairseq did not write."""
    return path.is_file() and path.suffix == ".pt"


def load(path: Path, mask: Optional[HeadMask] = None) -> HostModel:
    """Load a checkpoint of fairseq: dense, pruned or compact; pruned weights are zero.

    The data it was trained on need not be there.

    Args:
        path: the checkpoint.
        mask: the heads that stay, instead of those of the checkpoint.

    Raises:
        HeadPruningError: it cannot be loaded or mapped, or the mask is of another model.
    """
    state = checkpoint_utils.load_checkpoint_to_cpu(str(path))
    stored, weights = PruningState.of(state), split_state(state["model"])[0]
    masks = stored.weight_masks(weights)
    zero_weights(weights, masks)
    if mask is None and KEEP in stored.heads:
        mask = stored.head_mask()
    model = build_model(state, weights)
    shape = {name: value for name, value in state["model"].items() if name == RECIPE}
    try:
        model.load_state_dict({**weights, **shape}, strict=True)
    except RuntimeError as error:
        reason = one_line(error)
        raise HeadPruningError(f"The weights in {path} do not fit its model ({reason:.300}).") from error
    model.eval()
    sites = unit_map(model)
    if mask is not None:
        sites = sites.numbering(mask.unit_map.units)
        sites.check_same_heads(mask.unit_map, "The head mask")
    told = None
    if masks:
        parameters, removed = dict(model.named_parameters()), {} if mask is None else removed_counts(model, mask)
        with contextlib.nullcontext() if mask is None else zeroed_heads(model, mask):
            counts = count_weights(masks, parameters, removed=removed)
            told = weight_report(counts, parameters, method="+".join(stored.weight_pruners()), options={})
    return HostModel(model, sites, mask, functools.partial(example, model), told, longest(model))


def build_model(state: dict, weights: Mapping[str, torch.Tensor]) -> BaseFairseqModel:
    """The model of a checkpoint, with random weights.

    A task wants its dictionaries; only their sizes matter here, and the embeddings tell them.

    Raises:
        HeadPruningError: the embeddings do not tell them, or fairseq cannot build the model.
    """
    cfg = state["cfg"] if state.get("cfg") is not None else convert_namespace_to_omegaconf(state["args"])
    cfg = copy.deepcopy(cfg)
    with tempfile.TemporaryDirectory() as folder:
        try:
            with open_dict(cfg):
                names = _dictionaries(cfg.task, weights)
                cfg.task.data = folder if names else cfg.task.get("data")
            for file, words in names.items():
                lines = "".join(f"word{number} 1\n" for number in range(words))
                (Path(folder) / file).write_text(lines, encoding="utf-8")
            task = tasks.setup_task(cfg.task, from_checkpoint=True)
            if state.get("task_state"):
                task.load_state_dict(state["task_state"])
            if "from_checkpoint" in inspect.signature(task.build_model).parameters:
                return task.build_model(cfg.model, from_checkpoint=True)
            return task.build_model(cfg.model)
        except HeadPruningError:
            raise
        except Exception as error:  # whatever a task does not find
            reason = one_line(error)
            raise HeadPruningError(
                f"fairseq cannot build the model of the checkpoint ({reason:.300}); its data must lie where it was "
                f"trained: {cfg.task.get('data', 'unknown')}."
            ) from error


def _words(embedding: str, weights: Mapping[str, torch.Tensor]) -> int:
    """How many words an embedding has, special ones included; an adaptive one has them in bands."""
    if f"{embedding}.weight" in weights:
        return weights[f"{embedding}.weight"].shape[0]
    bands = re.compile(re.escape(embedding) + r"\.embeddings\.\d+\.0\.weight")
    found = [weight.shape[0] for name, weight in weights.items() if bands.fullmatch(name)]
    if not found:
        raise HeadPruningError(
            f"The checkpoint has no {embedding}.weight, which tells how many words its dictionary has; models that "
            "embed words, whole or in adaptive bands, can be loaded."
        )
    return sum(found)


def _dictionaries(task: MutableMapping[str, Any], weights: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The dictionary files that a task of fairseq's own will look for, and how many words each must have."""

    def words(embedding: str) -> int:
        return _words(embedding, weights) - SPECIALS

    kind = str(task["_name"]).removesuffix(TASK_SUFFIX)
    if kind == "translation":
        task["source_lang"] = task["source_lang"] or "source"  # None where fairseq read them off the files
        task["target_lang"] = task["target_lang"] or "target"
        return {
            f"dict.{task['source_lang']}.txt": words("encoder.embed_tokens"),
            f"dict.{task['target_lang']}.txt": words("decoder.embed_tokens"),
        }
    if kind == "language_modeling":
        return {"dict.txt": words("decoder.embed_tokens")}
    if kind == "masked_lm":  # adds a <mask> of its own
        return {"dict.txt": words("encoder.sentence_encoder.embed_tokens") - 1}
    return {}


exports: Mapping[str, Callable[[Path, Path, Optional[HeadMask]], str]] = {
    "masked": masked,
    "compact": compact,
    **program_formats(
        load,
        lambda loaded, target, openvino: export_onnx(loaded.model, target, openvino=openvino),
        lambda loaded, target: export_program(loaded.model, target),
    ),
    **compressed_format(load),
}
