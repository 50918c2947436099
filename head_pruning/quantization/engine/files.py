"""What lies beside a stored quantized model: the ranges of its layers' inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping, Optional, Sequence

from ...compact.shapes import Number, Whole
from ...files import read_json, write_json

QUANTIZATION_FILE = "quantization.json"
_SHAPE = {"input_ranges": str, "inputs": {str: (Number(0), Whole(0, 255))}}


def save_ranges(folder: "str | Path", input_ranges: str, inputs: Mapping[str, Sequence[float]]) -> None:
    """Write :data:`QUANTIZATION_FILE`.

    Args:
        folder: of the model.
        input_ranges: by which ranges the inputs were quantized in training.
        inputs: layer name to scale and zero point of uint8 for the average range of its inputs; a scale of 0: it never
            had any, and is left out.
    """
    told = {name: [scale, int(zero)] for name, (scale, zero) in inputs.items() if scale > 0}
    write_json(Path(folder) / QUANTIZATION_FILE, {"input_ranges": input_ranges, "inputs": told})


def read_ranges(folder: "str | Path") -> Optional[dict[str, Any]]:
    """What :func:`save_ranges` wrote; None where it wrote nothing. Raises HeadPruningError when it is damaged."""
    path = Path(folder) / QUANTIZATION_FILE
    return read_json(path, _SHAPE, cure="take the one that was saved with the model") if path.is_file() else None
