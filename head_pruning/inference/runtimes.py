"""Forward passes to be timed: a module in torch, or an exported file in onnxruntime."""

from pathlib import Path
from typing import Any, Callable, Mapping

import torch
from torch import nn

from ..errors import HeadPruningError

NEEDS_ONNX = "onnx, onnxscript and onnxruntime are needed for this; install them: pip install 'head-pruning[onnx]'."


def torch_pass(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Callable[[], Any]:
    """A forward pass of a model without gradients."""

    @torch.inference_mode()
    def run() -> Any:
        return model(**inputs)

    return run


def onnx_session(path: "str | Path", threads: int = 1, *, fused_norms: bool = True, exact: bool = True) -> Any:
    """An onnxruntime session on the CPU.

    Args:
        path: the ONNX file.
        threads: that compute.
        fused_norms: False leaves residual sums and layer norms apart: onnxruntime fuses them into an operator that
            takes longer on CPUs than both (``benchmarks/inference.py``).
        exact: False leaves it to onnxruntime's default that products of 8 bits saturate on processors without VNNI
            instructions, which is a little faster.

    Raises:
        HeadPruningError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise HeadPruningError(NEEDS_ONNX) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    # Waiting threads would count as processor time.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    left_out = [] if fused_norms else ["SkipLayerNormFusion"]
    return onnxruntime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=left_out
    )


def onnx_pass(session: Any, inputs: Mapping[str, torch.Tensor]) -> Callable[[], list]:
    """A forward pass of :func:`onnx_session`.

    Inputs that the file does not have are left out where they are the same everywhere, as the token types of single
    sentences are.

    Raises:
        HeadPruningError: the file has no such input and its values differ, or it has one more.
    """
    names = {given.name for given in session.get_inputs()}
    for name, tensor in inputs.items():
        if name not in names and tensor.numel() and bool((tensor != tensor.flatten()[0]).any()):
            raise HeadPruningError(
                f"The ONNX file has no input {name}, whose values differ from token to token, so it would compute "
                f"without them; export the model again, or leave {name} out."
            )
    if names - inputs.keys():
        missing = ", ".join(sorted(names - inputs.keys()))
        raise HeadPruningError(f"The ONNX file reads {missing}, too; give {missing} with the other inputs.")
    feed = {name: tensor.numpy() for name, tensor in inputs.items() if name in names}
    return lambda: session.run(None, feed)
