"""A fairseq model for other runtimes: ONNX, and programs of ``torch.export``; batch and lengths stay free.

It is one forward pass, of a translation model with the target known, as for scoring and reranking. Beam search hands
the decoder a dictionary of states that it changes at every step, which no such program takes; fairseq decodes compact
checkpoints.
"""

import contextlib
from pathlib import Path
from types import MethodType
from typing import Any, Iterator

import torch
from fairseq.models import BaseFairseqModel
from torch import nn
from torch.overrides import TorchFunctionMode

from head_pruning import HeadPruningError
from head_pruning.inference.programs import (
    ByName,
    Run,
    check_file,
    check_onnx,
    one_sentence,
    refuse_difference,
    write_onnx,
    write_program,
)

from .example_batch import example, positions

OUTPUT = "logits"
AXES = {
    "src_tokens": {0: "batch", 1: "source_length"},
    "src_lengths": {0: "batch"},
    "prev_output_tokens": {0: "batch", 1: "target_length"},
}
TRACED = (2, 7, 5)  # sentences, source and target tokens: all different, or torch takes equal ones for the same
CHECKED = ((3, 6, 9), (1, 8, 4))
TOLERANCE = 1e-4  # of log-probabilities in float32


class _AnyPadding(TorchFunctionMode):
    """While tracing, answers what fairseq asks of values that a program does not know yet.

    ``any()``, by which it skips the mask of a batch without padding: yes, since the mask is right for every batch. A
    shape as a tensor: the shape.
    """

    def __torch_function__(self, func: Any, classes: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.any and len(args) == 1 and not kwargs:
            return torch.tensor(True)
        if func is torch._shape_as_tensor:
            return args[0].shape
        return func(*args, **(kwargs or {}))


def _future_mask(decoder: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """What a decoder must not look at, ``[T, T]``; fairseq's own keeps the largest that it has made."""
    length = tensor.shape[0]
    return torch.full((length, length), float("-inf"), dtype=tensor.dtype, device=tensor.device).triu(1)


@contextlib.contextmanager
def _traceable(model: BaseFairseqModel) -> Iterator[None]:
    """The model without what torch.export cannot trace; afterwards it is what it was."""
    decoders = [module for module in model.modules() if hasattr(module, "buffered_future_mask")]
    for decoder in decoders:
        decoder.buffered_future_mask = MethodType(_future_mask, decoder)
    try:
        with _AnyPadding():
            yield
    finally:
        for decoder in decoders:
            del decoder.buffered_future_mask


def _longest(model: BaseFairseqModel) -> dict[str, int]:
    """How many tokens the model has positions for, by axis; axes without a limit are left out."""
    limits = zip(("source_length", "target_length"), positions(model))
    return {axis: limit for axis, limit in limits if limit is not None}


def _inputs(model: BaseFairseqModel, batch: int, source: int, target: int) -> dict[str, torch.Tensor]:
    longest = _longest(model)
    lengths = min(source, longest.get("source_length", source)), min(target, longest.get("target_length", target))
    return example(model, batch, *lengths, padded=True)


def _trace(model: BaseFairseqModel) -> torch.export.ExportedProgram:
    if getattr(getattr(model, "decoder", None), "adaptive_softmax", None) is not None:
        raise HeadPruningError(
            f"{type(model).__name__} has an adaptive softmax, so that one pass gives no logits; export it compact "
            "instead, and run it in torch."
        )
    inputs = _inputs(model, *TRACED)
    module = ByName(model, inputs, lambda found: {OUTPUT: found[0]})
    longest = _longest(model)
    free = {
        axis: torch.export.Dim(axis, max=longest.get(axis)) for axis in ("batch", "source_length", "target_length")
    }
    axes = {name: {number: free[axis] for number, axis in AXES[name].items()} for name in inputs}
    with _traceable(model), torch.no_grad():
        return torch.export.export(module, (), kwargs=inputs, dynamic_shapes=axes, strict=False)


def _check(model: BaseFairseqModel, run: Run, what: str) -> float:
    """The largest difference between the log-probabilities of an export and of the model, on padded batches."""
    found = []
    for shape in CHECKED:
        inputs = _inputs(model, *shape)
        with torch.no_grad():
            expected = model(**inputs)[0].log_softmax(-1)
            found.append((run(inputs)[OUTPUT].log_softmax(-1) - expected).abs().max())
    difference = float(torch.stack(found).max())  # NaN, if there is one
    refuse_difference(model, what, difference, TOLERANCE)
    return difference


def export_onnx(model: BaseFairseqModel, target: "str | Path", *, openvino: bool = False) -> float:
    """Write ``target``, an ONNX file of one forward pass, once onnxruntime has given the model's log-probabilities.

    Its inputs are ``src_tokens`` ``[batch, source_length]``, padded where sentences are shorter, and for a
    translation model ``src_lengths`` ``[batch]``, which fairseq's transformers do not read, and
    ``prev_output_tokens`` ``[batch, target_length]``, all int64; its output is ``logits`` ``[batch, target_length,
    words]``.

    Args:
        model: dense or compact, in evaluation mode, without gates, in float32; at most 2 GB of weights.
        target: the file, written atomically.
        openvino: write OpenVINO's two files instead, and compare these.

    Returns:
        The largest difference between the log-probabilities of the runtime and of torch.

    Raises:
        HeadPruningError: torch cannot export the model, they differ by more than 1e-4, or a package is missing.
    """
    target, what = Path(target), "OpenVINO" if openvino else "ONNX"
    check_onnx(model, target, openvino)
    with one_sentence(model, what):
        program = _trace(model)
        inputs = _inputs(model, *TRACED)
        return write_onnx(program, inputs, AXES, [OUTPUT], target, lambda run: _check(model, run, what), openvino)


def export_program(model: BaseFairseqModel, target: "str | Path") -> float:
    """Write ``target``, which ``torch.export.load(target).module()`` runs without fairseq or this package.

    The program takes the inputs of :func:`export_onnx` by name and returns a dict with ``logits``. Arguments, result
    and errors are those of that function; there is no limit of size.
    """
    target, what = Path(target), "torch.export"
    check_file(target, ".pt2")
    with one_sentence(model, what):
        program = _trace(model)
        return write_program(program, target, lambda run: _check(model, run, what))
