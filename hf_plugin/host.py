"""Folders of ``save_pretrained`` for the ``head-pruning`` command: how they load and what they export to."""

import contextlib
import dataclasses
import functools
import logging
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Collection, Iterator, Mapping, Optional

import torch
import transformers
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import CHAT_TEMPLATE_DIR
from transformers.utils import logging as transformers_logging

from head_pruning import HeadMask, HeadPruningError
from head_pruning.compact import check_recipe
from head_pruning.compact.shapes import Either
from head_pruning.errors import one_line
from head_pruning.files import MASKS_FILE, REPORT_FILE, UNFINISHED, read_json, temporary_folder
from head_pruning.hosts import HostModel, compressed_format, cut_out, holds_heads
from head_pruning.inference.programs import cut_for_runtimes, program_formats
from head_pruning.pickled import load_pickled
from head_pruning.quantization.engine.files import read_ranges
from head_pruning.quantization.engine.linears import quantized_linears
from head_pruning.quantization.engine.qdq import dequantize, to_qdq
from head_pruning.report.report_file import read_report
from head_pruning.report.weights import WeightCount, count_weights, sum_counts, write_weight_artifacts
from head_pruning.surgery.remaining import heads_left, recipe_of, sites_left
from head_pruning.surgery.zeros import refuse_inexact_zeros, removed_counts, zeroed_heads
from head_pruning.weights import load_weight_masks
from head_pruning.weights.engine.targets import numbered

from .compact.model_classes import take_recipe
from .mapping.head_plans import plan_site
from .mapping.unit_map import unit_map
from .saving.card import weight_section
from .saving.example_inputs import example_inputs, longest
from .saving.folders import replacing_model, save_compact, save_pruned
from .saving.programs import export_onnx, export_program

logger = logging.getLogger(__name__)

name = "transformers"

# What a model's folder holds besides the model: tokenizers and processors. They have folders of their own for all chat
# templates but one, and a processor for all tokenizers but one.
COMPANIONS = re.compile(
    r"(.*tokenizer.*|vocab.*|merges\.txt|.*\.(model|bpe)|added_tokens\.json|special_tokens_map\.json|spiece.*"
    rf"|.*processor_config\.json|chat_template.*|{CHAT_TEMPLATE_DIR}/.*|source\.spm|target\.spm)"
)
# What tells of one model, and would mislead beside another: every export writes some of it.
_TOLD = re.compile(
    r"(all|eval|train|predict|test)_results\.json|trainer_state\.json"  # the scores of the model that was there
    r"|pruning\.json|weight_density\.(png|txt)|quantization\.json|compact_heads\.py|pytorch_model.*\.bin(\.index\.json)?"
)


# What is read of a configuration before transformers reads it.
_CONFIG = {"model_type?": str, "architectures?": Either(None, [str])}


def recognises(path: Path) -> bool:
    """Whether ``path`` is a folder with a configuration of transformers."""
    return "model_type" in _config(path)


def _config(path: Path) -> dict[str, Any]:
    """What a folder's ``config.json`` says; empty where there is none. Raises HeadPruningError when it is damaged."""
    file = path / "config.json"
    return read_json(file, _CONFIG, cure="copy the model again") if file.is_file() else {}


def load(path: Path, mask: Optional[HeadMask] = None) -> HostModel:
    """Load a folder of ``save_pretrained``: dense, masked or compact.

    Args:
        path: the folder.
        mask: the heads that stay, instead of those of ``masks.safetensors``.

    Raises:
        HeadPruningError: it cannot be loaded or mapped, or the mask is of another model.
    """
    model = load_model(path)
    cut = recipe_of(model)
    sites = unit_map(model) if cut is None else dataclasses.replace(sites_left(cut), planner=plan_site)
    if mask is None:
        mask = _own_mask(path / MASKS_FILE)
        if mask is not None and cut is not None and not mask.fits(sites.numbering(mask.unit_map.units)):
            mask = None  # of the original: it tells what is cut out already
    if mask is not None:
        sites = sites if sites.units == mask.unit_map.units else sites.numbering("both")
        mask = mask.numbering(sites.units).fitted(sites)
        if not mask.keep.all() and quantized_linears(model):
            raise HeadPruningError(
                f"{path} has 8-bit weights, out of which heads that are only zeroed cannot be cut; cut the heads out "
                "of the model first (head-pruning export --to compact), and train that with --do_quantization."
            )
    weights = _told_of_weights(path, model, mask)
    return HostModel(model, sites, mask, functools.partial(example_inputs, model), weights, longest(model))


def _told_of_weights(path: Path, model: PreTrainedModel, mask: Optional[HeadMask]) -> Optional[Mapping[str, Any]]:
    """What the run's report tells of pruned weights, with the numbers of the model as it is now, under ``mask``."""
    told = _report(path).get("weights")
    if not isinstance(told, dict) or not isinstance(told.get("kept_by_tensor"), dict):
        return told
    counts = _counts(model, mask, told["kept_by_tensor"], told.get("removed_with_heads"))
    return {**told, **sum_counts(counts).told()}


def _counts(
    model: PreTrainedModel, mask: Optional[HeadMask], names: Mapping[str, Any], before: Any
) -> dict[str, WeightCount]:
    """Of pruned tensors, under a mask of the heads that there are.

    Args:
        model: dense or compact.
        mask: the heads that stay; None: all that there are.
        names: parameter name to the report's pair of weights that stayed and weights that were left.
        before: parameter name to the number of weights that the report counts as those of removed heads.
    """
    parameters = dict(model.named_parameters())
    removed = {} if mask is None else removed_counts(model, mask)
    dense = {}
    if recipe_of(model) is not None and isinstance(before, dict):  # heads are cut out: only the report knows them
        pairs = {name: pair for name, pair in names.items() if isinstance(pair, list) and len(pair) == 2}
        dense = {name: pair[1] + before.get(name, 0) for name, pair in pairs.items()}
    with contextlib.nullcontext() if mask is None else zeroed_heads(model, mask):
        return count_weights([name for name in names if name in parameters], parameters, removed=removed, dense=dense)


def _own_mask(file: Path) -> Optional[HeadMask]:
    """The head mask in a model's folder; None without one, or if only weights were pruned."""
    return HeadMask.load(file) if file.is_file() and holds_heads(file) else None


def recipe(path: Path) -> Optional[Mapping[str, Any]]:
    """The recipe of removed heads in a folder's configuration, or None. Raises HeadPruningError when it is damaged."""
    found = take_recipe(SimpleNamespace(**_config(path)))
    try:
        return None if found is None else check_recipe(found)
    except ValueError as error:
        raise HeadPruningError(
            f"The recipe of removed heads in {path} is damaged ({one_line(error):.300}); take the config.json that "
            "was saved with these weights."
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars, and without the report of what a broken checkpoint lacks, which is raised."""
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _refuse_parts(path: Path, missing: Collection[str]) -> None:
    """Raise HeadPruningError where parameters of a layer would keep random numbers.

    Published models lack others that are not used, such as poolers, or are computed, such as positions: a warning.
    """
    lacking = sorted(missing, key=lambda name: (not _in_layer(name), name))
    if lacking and not _in_layer(lacking[0]):
        logger.warning("%s has no %s, which keeps the numbers of a new model", path, numbered(lacking))
    elif lacking:
        raise HeadPruningError(
            f"The weights in {path} are incomplete: {lacking[0]} is missing"
            f"{f' (and {len(lacking) - 1} more)' if lacking[1:] else ''}; copy the model again."
        )


def _in_layer(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def load_model(path: Path) -> PreTrainedModel:
    """The model in the class that its configuration names, in evaluation mode."""
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(path)
            _config(path)
            if not any(path.glob("*.safetensors")):  # transformers believes what these files claim
                for file in sorted(path.glob("pytorch_model*.bin")):
                    load_pickled(file, cure="write it again")
            named = (config.architectures or [""])[0]
            model_class = getattr(transformers, named, AutoModel)
            model, found = model_class.from_pretrained(path, output_loading_info=True)
            _refuse_parts(path, found["missing_keys"])
            return model.eval()
    except HeadPruningError:
        raise
    except Exception as error:  # each class fails in its own way with a damaged configuration
        reason = one_line(error)
        raise HeadPruningError(f"transformers cannot load {path} ({reason:.300}); write it again.") from error


@contextlib.contextmanager
def _model_folder(target: Path, source: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``target`` in the end, or takes the place of the model alone in one that is
    there; with the tokenizer files of ``source``.
    """
    if target.is_file():
        raise HeadPruningError(f"{target} is a file; name a folder to write the model to.")
    there = target.is_dir()
    if there and any(not path.name.startswith(UNFINISHED) for path in target.iterdir()) and not recognises(target):
        raise HeadPruningError(f"{target} holds something else than a model; name another folder.")
    with replacing_model(target, (COMPANIONS, _TOLD)) if there else temporary_folder(target.parent) as temporary:
        new = temporary if there else temporary / "new"  # temporary folders are private
        new.mkdir(exist_ok=True)
        yield new
        for file in (*source.glob("*"), *source.glob(f"{CHAT_TEMPLATE_DIR}/*"), *source.glob("*_tokenizer/*")):
            name = file.relative_to(source)
            if file.is_file() and COMPANIONS.fullmatch(name.as_posix()) and not (new / name).exists():
                (new / name).parent.mkdir(exist_ok=True)
                shutil.copy(file, new / name)
        if not there:
            os.replace(new, target)


def _history(source: Path) -> dict[str, Any]:
    """Method, options and history of the run that left ``pruning.json``."""
    report = _report(source)
    return {key: report[key] for key in ("method", "options", "history") if key in report}


def _report(source: Path) -> dict[str, Any]:
    """A run's ``pruning.json``; empty where there is none. Raises HeadPruningError when it is damaged."""
    return read_report(source / REPORT_FILE)


def _pruned(source: Path, mask: Optional[HeadMask]) -> HostModel:
    """The model and the heads that it keeps, which must be known. Raises HeadPruningError when they are not."""
    loaded = load(source, mask)
    if loaded.mask is None and recipe_of(loaded.model) is None:
        lacks = f"has no head mask ({MASKS_FILE})"
        if (source / MASKS_FILE).is_file():  # of weights, as load() saw
            lacks = "was pruned by weights alone and has no head mask"
        raise HeadPruningError(f"{source} {lacks}; give one with --mask.")
    return loaded


def export_masked(source: Path, target: Path, mask: Optional[HeadMask] = None) -> str:
    """Write the folder that plain transformers loads: the removed heads' weights are zero."""
    loaded = _pruned(source, mask)
    if recipe_of(loaded.model) is not None:
        raise HeadPruningError(f"The heads of {source} are cut out already; export the model that it was made from.")
    mask = loaded.mask
    assert mask is not None  # as _pruned says
    refuse_inexact_zeros(loaded.model, mask)
    with _model_folder(target, source) as folder, _quiet():
        save_pruned(loaded.model, mask, folder, **_history(source))
        _carry_weight_masks(source, folder, loaded, mask)
    return f"{target}: {mask.words}{_words(loaded)}, the others are zero"


def _words(loaded: HostModel) -> str:
    """What stays of pruned weights, for a line to print."""
    told = loaded.weights
    if not isinstance(told, dict) or not isinstance(told.get("weights_kept"), int):
        return ""
    kept, left = told["weights_kept"], told["weights_total"]
    return f", {WeightCount(kept, left, int(told.get('weights_of_dense') or left))}"


def _carry_weight_masks(source: Path, folder: Path, loaded: HostModel, mask: HeadMask) -> None:
    """Add what the run's files tell of pruned weights, which are zero in the model already."""
    told = loaded.weights
    if isinstance(told, dict) and told:
        masks = load_weight_masks(source / MASKS_FILE)
        counts = _counts(loaded.model, mask, masks, None)
        with zeroed_heads(loaded.model, mask):
            _describe_weights(folder, loaded, mask, masks, counts)


def _describe_weights(
    folder: Path,
    loaded: HostModel,
    head_mask: Optional[HeadMask],
    masks: Mapping[str, torch.Tensor],
    counts: Mapping[str, WeightCount],
) -> None:
    """Add masks and densities to a folder, and to its card."""
    parameters, told = dict(loaded.model.named_parameters()), loaded.weights or {}
    left = {name: size for name, size in told.get("left_dense", {}).items() if name in parameters}
    write_weight_artifacts(
        folder,
        masks,
        parameters,
        method=told["method"],
        options=told["options"],
        head_mask=head_mask,
        counts=counts,
        left_dense=left,
    )
    card = folder / "README.md"
    text = "\n".join([card.read_text(encoding="utf-8"), *weight_section(counts, left)])
    card.write_text(text, encoding="utf-8")


def export_compact(source: Path, target: Path, mask: Optional[HeadMask] = None, **about: Any) -> str:
    """Write the folder of the model whose removed heads are cut out; ``about`` it: see :func:`save_compact`."""
    loaded = _pruned(source, mask)
    before = _before_the_cut(loaded)
    words = cut_out(loaded)
    if recipe_of(loaded.model) is None:
        raise HeadPruningError(f"The head mask of {source} keeps every head, so there is nothing to cut out.")
    with _model_folder(target, source) as folder, _quiet():
        save_compact(loaded.model, folder, **{**_history(source), **about})
        if before:
            words += _describe_cut_weights(folder, loaded, before)
    return f"{target}: {words}, the others are cut out"


def _before_the_cut(loaded: HostModel) -> dict[str, int]:
    """Of a model whose weights were pruned: the pruned tensors, and how many weights each had with all heads."""
    told = loaded.weights
    if not isinstance(told, dict) or not isinstance(told.get("kept_by_tensor"), dict):
        return {}
    counts = _counts(loaded.model, loaded.mask, told["kept_by_tensor"], told.get("removed_with_heads"))
    return {name: count.dense for name, count in counts.items()}


def _describe_cut_weights(folder: Path, loaded: HostModel, before: Mapping[str, int]) -> str:
    """Add what is left of pruned weights to a compact folder; the words for it."""
    parameters = dict(loaded.model.named_parameters())
    masks = {name: parameters[name].detach() != 0 for name in before if name in parameters}
    counts = count_weights(masks, parameters, dense=before)
    _describe_weights(folder, loaded, heads_left(loaded.model), masks, counts)
    return f", {sum_counts(counts)}"


def in_floats(model: PreTrainedModel) -> PreTrainedModel:
    """The model; its quantized layers have float weights of the same values now."""
    dequantize(model)
    return model


def export_int8(kind: str, source: Path, target: Path, mask: Optional[HeadMask] = None) -> str:
    """Write a model that was trained with quantization as one forward pass with 8-bit linear layers.

    Args:
        kind: ``onnx`` or ``openvino``.
        source: its folder, with the ranges of the layers' inputs.
        target: the file.
        mask: as for all exports.

    Returns:
        The line to print, which says so where the inputs had other ranges in training than they can have here.

    Raises:
        HeadPruningError: it was not trained so, or cannot be exported.
    """
    ranges = read_ranges(source) or {"inputs": {}, "input_ranges": "average"}
    loaded = load(source, mask)
    words, number = cut_for_runtimes(loaded), to_qdq(loaded.model, ranges["inputs"])
    openvino = kind == "openvino"
    difference = export_onnx(loaded.model, loaded.example, target, integers=True, openvino=openvino)
    others, trained = "", ranges["input_ranges"]
    if trained != "average":
        others = f" with averaged ranges, so not the model that was trained with --input_ranges {trained} (train with "
        others += "--input_ranges average to export what is trained)"
    exact = "" if openvino else "; on CPUs without VNNI give sessions the option session.x64quantprecision = 1"
    return (
        f"{target}: {words}, {number} linear layers of 8 bits{others}; largest difference between "
        f"{'OpenVINO' if openvino else 'onnxruntime'} and torch {difference:.1e}{exact}"
    )


exports: Mapping[str, Callable[[Path, Path, Optional[HeadMask]], str]] = {
    "masked": export_masked,
    "compact": export_compact,
    **program_formats(
        load,
        lambda loaded, target, openvino: export_onnx(
            in_floats(loaded.model), loaded.example, target, openvino=openvino
        ),
        lambda loaded, target: export_program(in_floats(loaded.model), loaded.example, target),
    ),
    **{f"{kind}-int8": functools.partial(export_int8, kind) for kind in ("onnx", "openvino")},
    **compressed_format(load),
}
