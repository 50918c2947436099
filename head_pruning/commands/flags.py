"""What can be said to each command; its work is imported when it runs, so that help comes at once."""

import argparse
import importlib
from typing import Any, Callable

LENGTH = 128  # tokens, unless --length says otherwise or a model has fewer positions
RUNTIMES = ("torch", "onnxruntime")
LAUNCHERS = ("local", "ray", "slurm")
#: Flags of benchmark that are counts: default, and what is counted.
COUNTS = {
    "batch": (8, "examples per pass for the throughput; the latency is of one"),
    "length": (None, "tokens per example"),
    "rounds": (10, "turns of each"),
    "threads": (1, "threads; with one, processor time is measured, else the clock"),
}


def add_commands(commands: Any) -> None:
    """Add all that work on models and masks.

    Args:
        commands: what ``ArgumentParser.add_subparsers`` gave.
    """
    _add_inspect(commands)
    _add_export(commands)
    _add_benchmark(commands)
    _add_show_and_diff(commands)
    _add_report(commands)
    _add_sweep(commands)


def _work(module: str, function: str = "run") -> Callable[[argparse.Namespace], None]:
    def run(args: argparse.Namespace) -> None:
        getattr(importlib.import_module(f".{module}", __package__), function)(args)

    return run


def _add_inspect(commands: Any) -> None:
    command = commands.add_parser("inspect", help="where a model's heads are, its parameters and MACs")
    command.add_argument("model", help="folder of save_pretrained, or checkpoint of fairseq")
    command.add_argument("--mask", metavar="FILE", help="head mask to look at instead of the model's own")
    command.add_argument("--length", type=int, help=f"tokens that MACs are of (default: at most {LENGTH})")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.add_argument("--plot", metavar="FILE", help="PNG, SVG or PDF to draw the heads in")
    command.set_defaults(run=_work("inspect"))


def _add_export(commands: Any) -> None:
    command = commands.add_parser("export", help="write a pruned model: masked, compact, onnx and more")
    command.add_argument("model", help="folder of save_pretrained, or checkpoint of fairseq")
    command.add_argument("output", help="file or folder to write; what is there is replaced")
    command.add_argument(
        "--to",
        required=True,
        metavar="FORMAT",
        help="masked: an ordinary model whose removed heads are zero; compact: a smaller and faster model; onnx and "
        "torch-export: one forward pass of the compact model, for a runtime; openvino: the same for OpenVINO; "
        "compressed: one file of tensors without their zeros",
    )
    command.add_argument(
        "--int8",
        action="store_true",
        help="with 8-bit linear layers, to onnx or openvino, of a model that was trained with --do-quantization",
    )
    command.add_argument("--mask", metavar="FILE", help="head mask to apply instead of the model's own")
    command.set_defaults(run=_work("export"))


def _add_benchmark(commands: Any) -> None:
    command = commands.add_parser("benchmark", help="latency and throughput of pruned against dense models")
    command.add_argument("model", help="folder of save_pretrained, or checkpoint of fairseq")
    command.add_argument("model2", nargs="?", help="the model to compare with; default: the first without its heads")
    command.add_argument("--mask", metavar="FILE", help="head mask to apply instead of the first model's own")
    for name, (value, words) in COUNTS.items():
        told = f"at most {LENGTH}" if value is None else value
        command.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"{words} (default: {told})")
    command.add_argument("--runtime", choices=RUNTIMES, default="torch", help="default: %(default)s")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=_work("benchmark"))


def _add_show_and_diff(commands: Any) -> None:
    command = commands.add_parser("show", help="print head masks, compare them, draw them")
    command.add_argument("masks", nargs="+", help="head mask files, or pruned models")
    command.add_argument("--plot", metavar="FILE", help="PNG, SVG or PDF to draw them in, side by side")
    command.set_defaults(run=_work("masks", "show"))
    command = commands.add_parser("diff", help="the heads that two masks share, and those that one has alone")
    command.add_argument("first", help="a head mask file, or a model, whose heads count as those of its original")
    command.add_argument("second", help="another of the same architecture")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.add_argument("--plot", metavar="FILE", help="PNG, SVG or PDF to draw them in, side by side")
    command.set_defaults(run=_work("masks", "diff"))


def _add_report(commands: Any) -> None:
    command = commands.add_parser("report", help="one page about many runs: scores, sizes, kept heads, commands")
    command.add_argument("folders", nargs="+", metavar="DIR", help="folder of a run, of several, or of a sweep")
    command.add_argument("--output", default="report.html", metavar="HTML", help="default: %(default)s")
    command.add_argument("--markdown", metavar="FILE", help="write Markdown too, its pictures beside it")
    command.add_argument("--score", metavar="KEY", help="entry of all_results.json to compare runs by")
    command.add_argument("--title", default="Pruned models", help="default: %(default)s")
    command.set_defaults(run=_work("report"))


def _add_sweep(commands: Any) -> None:
    command = commands.add_parser("sweep", help="run many command lines by a plan; goes on where it was cut off")
    command.add_argument("plan", nargs="+", metavar="[show] PLAN", help="YAML file; show: print what has been done")
    command.add_argument("--out", metavar="DIR", help="folder for everything (default: the plan's name, and -sweep)")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="what stands for a name of the plan's set, such as model=FOLDER; may be repeated",
    )
    command.add_argument("--dry-run", action="store_true", help="print the cells and their commands; run nothing")
    command.add_argument("--only", metavar="REGEX", help="leave out the cells whose names it does not match")
    command.add_argument("--jobs", type=int, default=0, metavar="N", help="cells at a time (default: by cores)")
    command.add_argument("--threads", type=int, metavar="N", help="threads of a cell, instead of the plan's")
    command.add_argument("--launcher", choices=LAUNCHERS, default="local", help="default: %(default)s")
    command.add_argument(
        "--launcher-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of ray.init, or of submitit, such as slurm_partition=gpu; may be repeated",
    )
    command.add_argument("--optuna", type=int, metavar="N", help="search: measure N cells that Optuna proposes")
    command.add_argument("--parquet", action="store_true", help="write results.parquet beside results.csv")
    command.set_defaults(run=_work("sweep"))
