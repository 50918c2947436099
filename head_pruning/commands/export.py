"""``head-pruning export``: a pruned model for others to use.

``onnx`` and ``torch-export`` are one forward pass, of a translation model with the target known. They do not decode
step by step: beam search stays with the framework, which decodes the compact model.
"""

import argparse
import re
from pathlib import Path

from ..errors import HeadPruningError
from ..hosts import find_host
from .common import given_mask, note

# What a model's folder is made of, but for exports that are called so.
_PARTS = re.compile(
    r"(?!.*\.compressed\.)((pytorch_)?model.*\.(safetensors|bin)|(adapter_|masks).*\.\w+|.*\.(json|txt|py|bpe))"
)


def run(args: argparse.Namespace) -> None:
    """The command."""
    source, target = Path(args.model), Path(args.output)
    host = find_host(source)
    form = f"{args.to}-int8" if args.int8 else args.to
    if form not in host.exports:
        raise HeadPruningError(
            f"A model of {host.name} cannot be exported to {form}; choose one of {', '.join(host.exports)}."
        )
    if target.exists() and source.samefile(target):
        raise HeadPruningError(f"{target} is the model itself; give another output.")
    if target.is_file() and _PARTS.fullmatch(target.name) and _is_model(target.parent):
        raise HeadPruningError(f"{target} is part of the model in {target.parent}; give another output.")
    mask = given_mask(args.mask)
    note(f"exporting {source}")
    print(host.exports[form](source, target, mask))


def _is_model(folder: Path) -> bool:
    try:
        find_host(folder)
    except HeadPruningError:
        return False
    return True
