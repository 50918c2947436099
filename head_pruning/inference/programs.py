"""Models for other runtimes: ONNX files, and programs of ``torch.export``, written once they give what torch gives."""

import contextlib
import importlib.util
import inspect
import logging
import warnings
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, Optional, Sequence

import torch
from torch import nn

from ..errors import HeadPruningError
from ..files import appearing_at_once, atomic_path
from ..hosts import HostModel, cut_out
from ..masks import HeadMask
from .runtimes import NEEDS_ONNX, onnx_pass, onnx_session

Tensors = Mapping[str, torch.Tensor]
Run = Callable[[Tensors], Tensors]
Check = Callable[[Run], float]
"""Compares a run with the model: the largest difference, or HeadPruningError."""

OPSET = 20  # the first with Gelu
LIMIT = 2 << 30  # bytes of weights from which ONNX keeps them in a second file


class ByName(nn.Module):
    """A model whose forward has its inputs as parameters, after which exporters name them.

    Args:
        model: the model.
        names: of the inputs, in order.
        outputs: what the model returns to tensors by name.
        options: arguments of every call.
    """

    def __init__(
        self, model: nn.Module, names: Iterable[str], outputs: Callable[[Any], dict[str, torch.Tensor]], **options: Any
    ) -> None:
        super().__init__()
        self.model = model
        names = list(names)

        def forward(*args: torch.Tensor, **kwargs: torch.Tensor) -> dict[str, torch.Tensor]:
            return outputs(model(**dict(zip(names, args)), **kwargs, **options))

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature([inspect.Parameter(name, kind) for name in names])
        setattr(forward, "__signature__", signature)  # noqa: B010 (functions are not declared to have it)
        self.forward = forward


class _Bias(nn.Module):
    """What a projection that reads nothing gives."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.width, self.bias = layer.weight.shape[0], layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., outputs]``."""
        zeros = x.new_zeros(*x.shape[:-1], self.width)
        return zeros if self.bias is None else zeros + self.bias


def cut_for_runtimes(loaded: HostModel) -> str:
    """As :func:`~head_pruning.hosts.cut_out`; where nothing is left to read for a linear layer, its bias stays.

    OpenVINO takes the weights of such a layer, which have no columns, for a single number.
    """
    words = cut_out(loaded)
    for name, module in list(loaded.model.named_modules()):
        weight = getattr(module, "weight", None)  # None: a module without heads dropped it
        if isinstance(module, nn.Linear) and weight is not None and not weight.shape[1]:
            loaded.model.set_submodule(name, _Bias(module))
    return words


def program_formats(
    load: Callable[[Path, Optional[HeadMask]], HostModel],
    onnx: Callable[[HostModel, Path, bool], float],
    program: Callable[[HostModel, Path], float],
) -> dict[str, Callable[[Path, Path, Optional[HeadMask]], str]]:
    """A host's ``exports`` of these kinds.

    Args:
        load: the host's.
        onnx: writes an ONNX file of a model whose heads are cut out, or if told so OpenVINO's; returns the largest
            difference from it.
        program: likewise a program of torch.export.
    """

    def exporter(
        write: Callable[[HostModel, Path], float], compared: str, cut: Callable[[HostModel], str] = cut_for_runtimes
    ) -> Callable[..., str]:
        def export(source: Path, target: Path, mask: Optional[HeadMask] = None) -> str:
            loaded = load(source, mask)
            words = cut(loaded)
            return f"{target}: {words}; largest difference between {compared} {write(loaded, target):.1e}"

        return export

    return {
        "onnx": exporter(lambda loaded, target: onnx(loaded, target, False), "onnxruntime and torch"),
        "openvino": exporter(lambda loaded, target: onnx(loaded, target, True), "OpenVINO and torch"),
        "torch-export": exporter(program, "the exported program and the model", cut_out),
    }


def refuse_difference(model: nn.Module, what: str, difference: float, limit: float) -> None:
    """Raise HeadPruningError unless ``difference`` of an export from its model is at most ``limit``; NaN never is."""
    if not difference <= limit:
        raise HeadPruningError(
            f"The {what} export of {type(model).__name__} differs by {difference:.1e} from the model, so it was not "
            "written; export it compact and run it in torch."
        )


@contextlib.contextmanager
def one_sentence(model: nn.Module, what: str) -> Iterator[None]:
    """Quiet exporters; what they cannot do becomes one sentence, a HeadPruningError."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (HeadPruningError, OSError):  # a full disk is not torch's fault
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(str(cause).split()) or repr(cause)
        raise HeadPruningError(
            f"torch cannot export {type(model).__name__} to {what} ({reason:.200}); export it compact instead, and "
            "run it in torch."
        ) from error
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def check_file(target: Path, suffix: str) -> None:
    """Raise HeadPruningError when the file to write is a folder; ``suffix`` is for the name to propose."""
    if target.is_dir():
        raise HeadPruningError(f"{target} is a folder; name a file to write, such as {target / f'model{suffix}'}.")


def check_onnx(model: nn.Module, target: Path, openvino: bool = False) -> None:
    """Raise HeadPruningError when a package is missing, the model too large, or ``target`` another kind of file."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise HeadPruningError(NEEDS_ONNX) from error
    check_file(target, ".xml" if openvino else ".onnx")
    if sum(p.numel() * p.element_size() for p in model.parameters()) >= LIMIT:
        raise HeadPruningError("An ONNX file holds less than 2 GB of weights; export the model compact instead.")
    if openvino and target.suffix != ".xml":
        raise HeadPruningError(f"OpenVINO's models are two files, .xml and .bin; name the first, {target.stem}.xml.")
    if openvino and importlib.util.find_spec("openvino") is None:
        raise HeadPruningError("openvino is needed for this; install it: pip install 'head-pruning[openvino]'.")


def write_program(program: torch.export.ExportedProgram, target: Path, check: Check) -> float:
    """Write ``target``, which ``torch.export.load(target).module()`` runs without any package but torch.

    Returns:
        The largest difference that ``check`` found.

    Raises:
        HeadPruningError: of ``check``; nothing is written then.
    """
    difference = check(lambda inputs: program.module()(**inputs))
    with atomic_path(target) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with temporary.open("wb") as file:  # a path would be warned of unless it ends in .pt2
            torch.export.save(program, file)
    return difference


def write_onnx(
    program: "nn.Module | torch.export.ExportedProgram",
    inputs: Tensors,
    axes: Mapping[str, Mapping[int, str]],
    outputs: Sequence[str],
    target: Path,
    check: Check,
    openvino: bool = False,
) -> float:
    """Write ``target``, an ONNX file, once it has passed ``check`` in onnxruntime; or OpenVINO's files.

    Args:
        program: takes its inputs by name.
        inputs: an example of them, in order.
        axes: what varies in each, by name.
        outputs: names for the tensors that it returns.
        target: the file, written atomically.
        check: is given a run of the file in its runtime.
        openvino: write what OpenVINO runs, ``target`` (``.xml``) and the weights beside it (``.bin``).

    Returns:
        The largest difference that ``check`` found.

    Raises:
        HeadPruningError: of ``check``; nothing is written then.
    """
    with contextlib.redirect_stdout(None):
        made = torch.onnx.export(
            program,
            (),
            kwargs=dict(inputs),
            dynamic_shapes={name: dict(axes[name]) for name in inputs},
            input_names=list(inputs),
            output_names=list(outputs),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert made is not None  # as dynamo=True was asked for
    _part_zero_points(made.model)
    if openvino:
        with appearing_at_once(target.parent) as folder:
            made.save(str(folder / "model.onnx"), external_data=False)
            return check(_openvino_run(folder / "model.onnx", folder / target.name, outputs))
    with atomic_path(target) as temporary:
        made.save(str(temporary), external_data=False)
        session = onnx_session(temporary)
        return check(lambda given: dict(zip(outputs, map(torch.from_numpy, onnx_pass(session, given)()))))


def _part_zero_points(model: Any) -> None:
    """Give the 8-bit weights of each layer zero points of their own, which exporters share between layers of one size.

    onnxruntime cannot convert shared ones, as it does where its products of 8 bits must not saturate.
    """
    import onnx_ir

    for node in model.graph:
        zeros = node.inputs[2] if node.op_type == "DequantizeLinear" and len(node.inputs) > 2 else None
        if zeros is None or zeros.const_value is None or zeros.const_value.shape.rank() == 0:
            continue
        if len(zeros.uses()) > 1:
            name = f"{node.outputs[0].name}_zero_points"
            own = onnx_ir.val(name, const_value=onnx_ir.tensor(zeros.const_value.numpy(), name=name))
            model.graph.register_initializer(own)
            node.replace_input_with(2, own)


def _openvino_run(file: Path, target: Path, outputs: Sequence[str]) -> Run:
    """Make OpenVINO's files of an ONNX file, which goes; a run of them."""
    import openvino

    openvino.save_model(openvino.convert_model(file), target, compress_to_fp16=False)
    file.unlink()
    model = openvino.Core().compile_model(target, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    names = [name for each in model.inputs for name in each.names]

    def run(given: Tensors) -> Tensors:
        found = model({name: given[name].numpy() for name in names})
        return {name: torch.from_numpy(found[name]) for name in outputs}

    return run
