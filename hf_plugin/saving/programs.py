"""A transformers model for other runtimes: ONNX, and programs of ``torch.export``; batch and length stay free."""

import functools
import inspect
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from head_pruning.inference.programs import (
    ByName,
    check_file,
    check_onnx,
    one_sentence,
    refuse_difference,
    write_onnx,
    write_program,
)

Example = Callable[[int, int], Mapping[str, torch.Tensor]]
OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output", "image_embeds", "text_embeds")


def _by_name(model: PreTrainedModel, names: Iterable[str]) -> ByName:
    """The model with its inputs by name and its results as a dict of tensors, without a cache."""
    cached = "use_cache" in inspect.signature(model.forward).parameters

    def outputs(found: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {name: found[name] for name in OUTPUTS if isinstance(found.get(name), torch.Tensor)}

    return ByName(model, names, outputs, return_dict=True, **({"use_cache": False} if cached else {}))


def _axes(inputs: Mapping[str, torch.Tensor], free: Any = None) -> dict[str, dict[int, Any]]:
    """What varies: the batch of every input, the length of tokens and sounds, and the number of choices."""

    def axis(name: str) -> Any:
        return free if free is not None else name

    axes, choices = {}, ["choices"] if _has_choices(inputs) else []
    for name, tensor in inputs.items():
        varying = ["batch"]
        if tensor.ndim == 2 or not tensor.is_floating_point():
            varying += [*choices, "target_length" if name.startswith("decoder") else "length"]
        axes[name] = {number: axis(what) for number, what in enumerate(varying)}
    return axes


def _has_choices(inputs: Mapping[str, torch.Tensor]) -> bool:
    return "input_ids" in inputs and inputs["input_ids"].ndim == 3


def _difference(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    differences = [(found[name].float() - tensor.float()).abs().max() for name, tensor in expected.items()]
    return float(torch.stack(differences).max())  # NaN, if there is one


def _check(
    model: nn.Module,
    outputs: nn.Module,
    example: Example,
    run: Callable[[Mapping], Mapping],
    what: str,
    integers: bool = False,
) -> float:
    """The largest difference between an export and the model, for other sizes than it was made with."""
    inputs = dict(example(3, 9))
    if _has_choices(inputs):
        inputs = {name: tensor[:, 1:].contiguous() for name, tensor in inputs.items()}
    with torch.no_grad():
        expected = outputs(**inputs)
    difference = _difference(run(inputs), expected)
    scale = max(1.0, *(float(tensor.abs().max()) for tensor in expected.values()))
    exact = model.dtype == torch.float32 and not integers
    limit = (1e-3 if exact else 5e-2) * scale  # what is rounded otherwise at a tie goes on through all layers
    refuse_difference(model, what, difference, limit)
    return difference


def export_onnx(
    model: PreTrainedModel,
    example: Example,
    target: "str | Path",
    *,
    integers: bool = False,
    openvino: bool = False,
) -> float:
    """Write ``target``, an ONNX file with free batch and length, once onnxruntime has given the model's outputs.

    Args:
        model: dense or compact, in evaluation mode, without gates; at most 2 GB of weights.
        example: ``(batch, length)`` to inputs, see :class:`head_pruning.hosts.HostModel`.
        target: the file, written atomically.
        integers: whether layers are quantized (:mod:`head_pruning.quantization.engine.qdq`), whose roundings differ.
        openvino: write OpenVINO's two files instead, and compare these.

    Returns:
        The largest difference between the outputs of the runtime and of torch.

    Raises:
        HeadPruningError: torch cannot export the model, the outputs differ, or a package is missing.
    """
    target, what = Path(target), "OpenVINO" if openvino else "ONNX"
    check_onnx(model, target, openvino)
    inputs = dict(example(2, 16))
    outputs = _by_name(model, inputs)
    with one_sentence(model, what), torch.no_grad():
        names = list(outputs(**inputs))
        check = functools.partial(_check, model, outputs, example, what=what, integers=integers)
        return write_onnx(outputs, inputs, _axes(inputs), names, target, check, openvino)


def export_program(model: PreTrainedModel, example: Example, target: "str | Path") -> float:
    """Write ``target``, which ``torch.export.load(target).module()`` runs without transformers or this package.

    The program takes the inputs by name and returns a dict of tensors. Arguments, result and errors are those of
    :func:`export_onnx`; there is no limit of size.
    """
    target = Path(target)
    check_file(target, ".pt2")
    inputs = dict(example(2, 16))
    outputs = _by_name(model, inputs)
    with one_sentence(model, "torch.export"), torch.no_grad():
        axes = _axes(inputs, free=torch.export.Dim.AUTO)
        program = torch.export.export(outputs, (), kwargs=inputs, dynamic_shapes=axes, strict=False)
        return write_program(program, target, lambda run: _check(model, outputs, example, run, "torch.export"))
