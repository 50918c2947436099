"""``head-pruning export``: a pruned model for others to use.

``onnx`` and ``torch-export`` are one forward pass, of a translation model with the target known. They do not decode
step by step: beam search stays with the framework, which decodes the compact model.
"""

import argparse
from pathlib import Path

from ..errors import HeadPruningError
from ..hosts import find_host
from .common import given_mask, note


def add_command(commands) -> None:
    """Add it."""
    command = commands.add_parser("export", help="write a pruned model: masked, compact, onnx and more")
    command.add_argument("model", help="folder of save_pretrained, or checkpoint of fairseq")
    command.add_argument("output", help="file or folder to write; what is there is replaced")
    command.add_argument(
        "--to",
        required=True,
        metavar="FORMAT",
        help="masked: an ordinary model whose removed heads are zero; compact: a smaller and faster model; onnx and "
        "torch-export: one forward pass of the compact model, for a runtime; compressed: one file of tensors without "
        "their zeros",
    )
    command.add_argument("--mask", metavar="FILE", help="head mask to apply instead of the model's own")
    command.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    source, target = Path(args.model), Path(args.output)
    host = find_host(source)
    if args.to not in host.exports:
        raise HeadPruningError(
            f"A model of {host.name} cannot be exported to {args.to}; choose one of {', '.join(host.exports)}."
        )
    if target.exists() and source.samefile(target):
        raise HeadPruningError(f"{target} is the model itself; give another output.")
    mask = given_mask(args.mask)
    note(f"exporting {source}")
    print(host.exports[args.to](source, target, mask))
