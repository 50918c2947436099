"""How fast pruned models run: ``python -m benchmarks.inference [--json] [--results]``.

A BERT-base (random weights, three labels) against the same with heads cut out: random ones that leave uneven layers,
and 12 heads packed into two layers, so that ten have none; in two models units of the feed-forward blocks are cut out
too. Beside each speed-up stands what the MACs allow: per token and layer ``4 d^2`` for the projections, ``2 s d`` for
scores and sums, ``8 d^2`` for the feed-forward block; they are counted, not measured. On the CPU: processor time of
one thread; on a GPU: between two events of its stream. The models take turns, the shortest of their times counts (of
onnxruntime over four sessions of each model). glibc is told to keep large buffers, for all of them: else each
activation of 512 x 8 tokens faults its pages in anew, in layers that no head is cut from. "onnxruntime" does without
its SkipLayerNormFusion: the operator that it makes of a residual sum and a norm takes longer than both, in every layer
of every model, and no head is cut from it; "onnxruntime, fused" has it, as onnxruntime comes. With ``--results`` what
was measured before with the same options is kept; a model that is new is measured in turns with the dense one, and its
speed-up is to the dense one's time of then.
"""

import argparse
import copy
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any, Callable, Collection, Optional

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification

from head_pruning import HeadMask
from head_pruning.files import atomic_path, write_json
from head_pruning.inference.environment import restart_with_cpu_environment
from head_pruning.inference.runtimes import onnx_pass, onnx_session, torch_pass
from head_pruning.inference.sizes import mac_bound, measure_sizes
from head_pruning.inference.timing import fastest, stopwatch
from head_pruning.progress import bar_options
from head_pruning.report.tables import markdown_table, text_table
from head_pruning.surgery.removal import remove_heads
from hf_plugin.mapping.unit_map import unit_map
from hf_plugin.saving.example_inputs import example_inputs
from hf_plugin.saving.programs import export_onnx

RESULTS = Path(__file__).resolve().parent / "results"
DENSE = "dense"
FUSED = "onnxruntime, fused"
RUNTIMES = ("torch", "onnxruntime", FUSED)
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
GOAL = 0.97
SITTINGS = 4


def shape(options: argparse.Namespace) -> BertConfig:
    """BERT-base, or a smaller one to try the benchmark on."""
    return BertConfig(
        num_hidden_layers=options.layers,
        hidden_size=options.hidden,
        num_attention_heads=options.heads,
        intermediate_size=4 * options.hidden,
        num_labels=3,
    )


def kept(options: argparse.Namespace) -> dict[str, np.ndarray]:
    """What the models keep: name to booleans, one per head, or per head and feed-forward unit."""
    total = options.layers * options.heads
    draw = np.random.default_rng(0)
    found = {}
    for share in (2, 4, 12):
        found[f"{total // share} heads"] = draw.permutation(np.arange(total) < total // share)
    packed = np.zeros((options.layers, options.heads), dtype=bool)
    packed[[0, options.layers // 2], : max(1, total // 24)] = True
    found[f"{packed.sum()} heads in 2 layers"] = packed.flatten()
    found["0 heads"] = np.zeros(total, dtype=bool)
    units = options.layers * 4 * options.hidden
    for share, of_units in ((2, 2), (12, 4)):
        some = draw.permutation(np.arange(units) < units // of_units)
        found[f"{total // share} heads, 1/{of_units} of the units"] = np.concatenate(
            [found[f"{total // share} heads"], some]
        )
    return found


class Contest:
    """The models that are compared, and their forward passes."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        torch.manual_seed(0)
        dense = BertForSequenceClassification(shape(options)).eval()
        dense = dense.to(DTYPES[options.dtype])
        self.unit_map = unit_map(dense)
        self.models = {DENSE: dense}
        for name, keep in kept(options).items():
            self.models[name] = copy.deepcopy(dense)
            numbered = self.unit_map.numbering("heads" if keep.size == self.unit_map.num_heads else "both")
            remove_heads(self.models[name], self.unit_map, HeadMask(numbered, keep))
        self.sizes = {name: self._size(model, folder) for name, model in self.models.items()}
        self.device = options.device
        self.folder = folder
        self.files: dict[str, Path] = {}
        for model in self.models.values():
            model.to(self.device)

    def _size(self, model: torch.nn.Module, folder: Path) -> dict[str, int]:
        file = folder / "model.safetensors"
        save_file(model.state_dict(), file)
        parameters = list(model.parameters())
        return {
            "parameters": sum(p.numel() for p in parameters),
            "parameter_bytes": sum(p.numel() * p.element_size() for p in parameters),
            "file_bytes": file.stat().st_size,
        }

    def bounds(self, length: int) -> dict[str, float]:
        """What the MACs allow, by model."""
        inputs = {name: value.to(self.device) for name, value in example_inputs(self.models[DENSE], 1, length).items()}
        sizes = {name: measure_sizes(model, self.unit_map, inputs) for name, model in self.models.items()}
        return {name: mac_bound(sizes[DENSE], size) for name, size in sizes.items()}

    def passes(self, runtime: str, batch: int, length: int, names: Collection[str]) -> dict[str, Callable[[], Any]]:
        """A forward pass of each of these models."""
        inputs = example_inputs(self.models[DENSE], batch, length)
        if runtime == "torch":
            inputs = {name: value.to(self.device) for name, value in inputs.items()}
            return {name: torch_pass(self.models[name], inputs) for name in names}
        for name in tqdm([name for name in names if name not in self.files], leave=False, **bar_options()):
            model, file = self.models[name], self.folder / f"{name}.onnx"
            export_onnx(model, lambda batch, length, model=model: example_inputs(model, batch, length), file)
            self.files[name] = file
        fused = runtime == FUSED
        return {name: onnx_pass(onnx_session(self.files[name], fused_norms=fused), inputs) for name in names}

    def times(
        self, cell: tuple[str, int, int], names: Collection[str], options: argparse.Namespace, bar: tqdm
    ) -> dict[str, float]:
        """The shortest time of each; of onnxruntime over several sessions, whose weights lie elsewhere each."""
        runtime, length, batch = cell
        sittings = 1 if runtime == "torch" else SITTINGS
        found = []
        for _ in range(sittings):
            found.append(
                fastest(
                    self.passes(runtime, batch, length, names),
                    -(-options.rounds // sittings),
                    stopwatch(options.device),
                    progress=lambda turn: bar.set_postfix_str(f"round {turn}"),
                    at_least=1000.0 * options.seconds / sittings,
                )
            )
        return {name: min(times[name] for times in found) for name in names}


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What the times depend on besides the cell."""
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU, 1 thread"
    names = ("layers", "hidden", "heads", "dtype", "rounds", "seconds")
    return {"device": device, **{name: getattr(options, name) for name in names}}


def measure(options: argparse.Namespace, before: list[dict]) -> tuple[list[dict], dict[str, dict[str, int]]]:
    """A row per cell and model, and the models' sizes; ``before``: rows that need not be measured again."""
    cells = list(itertools.product(options.runtimes, options.lengths, options.batches))
    cells.sort(key=lambda cell: cell[1] * cell[2])  # the quick ones first
    used = settings(options)
    rows: list[dict] = []
    with tempfile.TemporaryDirectory(prefix="inference-") as folder, tqdm(total=len(cells), **bar_options()) as bar:
        contest = Contest(options, Path(folder))
        place = {name: number for number, name in enumerate(contest.models)}
        rows += [row for row in before if used.items() <= row.items() and row["model"] in place]
        for runtime, length, batch in cells:
            cell = {"runtime": runtime, "length": length, "batch": batch, **used}
            known = {row["model"] for row in rows if cell.items() <= row.items()}
            names = [name for name in contest.models if name == DENSE or name not in known]
            if names != [DENSE] or DENSE not in known:
                bar.set_description(f"{runtime}, length {length}, batch {batch}")
                times = contest.times((runtime, length, batch), names, options, bar)
                rows += [row for row in _rows(cell, times, contest.bounds(length)) if row["model"] not in known]
            rows.sort(
                key=lambda row: (RUNTIMES.index(row["runtime"]), row["length"], row["batch"], place[row["model"]])
            )
            bar.update()
            if options.results:
                write_results(rows, before, contest.sizes, options)
        return rows, contest.sizes


def _rows(cell: dict, times: dict[str, float], bounds: dict[str, float]) -> list[dict]:
    rows = []
    for name, taken in times.items():
        speed_up = times[DENSE] / taken
        numbers = {"ms": round(taken, 3), "speed_up": round(speed_up, 4), "mac_bound": round(bounds[name], 4)}
        rows.append({**cell, "model": name, **numbers, "fraction_of_bound": round(speed_up / bounds[name], 4)})
    return rows


def _least(rows: list[dict], runtime: str) -> Optional[float]:
    found = [row["fraction_of_bound"] for row in rows if row["runtime"] == runtime and row["model"] != DENSE]
    return min(found) if found else None


def summary(rows: list[dict], sizes: dict[str, dict[str, int]], options: argparse.Namespace) -> dict[str, Any]:
    """What ``--json`` prints; the lowest fraction of the bound is that of the first runtime."""
    least = {runtime: _least(rows, runtime) for runtime in RUNTIMES}
    return {
        "min_fraction_of_bound": next(value for value in least.values() if value is not None),
        "min_fraction_of_bound_by_runtime": least,
        "goal": GOAL,
        "sizes": sizes,
        **settings(options),
        "rows": rows,
    }


def _cells(rows: list[dict]) -> tuple[tuple[str, ...], list[tuple]]:
    header = ("runtime", "tokens", "batch", "keeps", "ms", "speed-up", "MAC bound", "of the bound")
    return header, [
        (
            *(row["runtime"], row["length"], row["batch"], row["model"], f"{row['ms']:.1f}"),
            *(f"{row['speed_up']:.3f}", f"{row['mac_bound']:.3f}", f"{row['fraction_of_bound']:.1%}"),
        )
        for row in rows
    ]


def _weights(sizes: dict[str, dict[str, int]]) -> tuple[tuple[str, ...], list[tuple]]:
    header = ("keeps", "parameters", "of dense", "bytes of parameters", "file")
    dense = sizes[DENSE]["parameters"]
    return header, [
        (
            *(name, f"{size['parameters']:,}", f"{size['parameters'] / dense:.1%}"),
            *(f"{size['parameter_bytes']:,}", f"{size['file_bytes']:,}"),
        )
        for name, size in sizes.items()
    ]


def write_results(
    rows: list[dict], before: list[dict], sizes: dict[str, dict[str, int]], options: argparse.Namespace
) -> None:
    """``inference.md`` and ``.json`` in the folder of results: these rows, and those of other options from before."""
    key = ("runtime", "length", "batch", "model", *settings(options))
    measured = {tuple(row[name] for name in key) for row in rows}
    others = [row for row in before if tuple(row[name] for name in key) not in measured]
    folder = Path(options.results)
    write_json(folder / "inference.json", {**summary(rows, sizes, options), "other_rows": others})
    title, about = __doc__.strip().split("\n\n", 1)
    used = settings(options)
    line = f"{options.layers} layers of {options.heads} heads, width {options.hidden}, {options.dtype}; "
    line += f"{used['device']}, torch {torch.__version__}; turns of each model: {options.rounds} or more, "
    line += f"{options.seconds} seconds or more of them in a cell."
    least = ", ".join(f"{name} {value:.1%}" for name in RUNTIMES if (value := _least(rows, name)) is not None)
    parts = [
        f"# {title.split(':')[0]}",
        f"`{_command(options)}`: {about}",
        line,
        f"Least share of the bound: {least}.",
        markdown_table(*_cells(rows)),
        "Sizes of the models and of their safetensors files:",
        markdown_table(*_weights(sizes)),
    ]
    if others:
        parts += ["Measured with other options:", markdown_table(*_cells(others))]
    with atomic_path(folder / "inference.md") as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _command(options: argparse.Namespace) -> str:
    changed = [f"--device {options.device}"] if options.device != "cpu" else []
    changed += [f"--dtype {options.dtype}"] if options.dtype != "float32" else []
    batches = " ".join(map(str, options.batches))
    changed += [f"--batches {batches}"] if batches != "1 8" else []
    return " ".join(["python -m benchmarks.inference --results", *changed])


def _before(options: argparse.Namespace) -> list[dict]:
    if not options.results or options.again:
        return []
    try:
        found = json.loads((Path(options.results) / "inference.json").read_text(encoding="utf-8"))
        return found["rows"] + found["other_rows"]
    except FileNotFoundError:
        return []


def main() -> None:
    """Print the tables, or with ``--json`` one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument(
        "--results", nargs="?", const=RESULTS, metavar="FOLDER", help="write inference.{md,json} (default: results/)"
    )
    parser.add_argument("--again", action="store_true", help="measure every cell, also those in the results")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, help="default: all; on a GPU: torch")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="default: 1 8")
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 512], help="default: 128 512")
    for name, (value, words) in {
        "rounds": (10, "turns of each, at least"),
        "seconds": (60, "seconds of turns in each cell, at least"),
        "layers": (12, "layers of the model"),
        "hidden": (768, "width of the model"),
        "heads": (12, "heads per layer"),
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{words} (default: %(default)s)")
    options = parser.parse_args()
    if min(options.rounds, *options.batches, *options.lengths) < 1:
        parser.error("--rounds, --batches and --lengths must be 1 or more")
    options.runtimes = options.runtimes or (["torch"] if options.device == "cuda" else list(RUNTIMES))
    if options.runtimes != ["torch"] and (options.device != "cpu" or options.dtype != "float32"):
        parser.error("onnxruntime is measured on the CPU in float32 only; choose --runtimes torch")
    torch.set_num_threads(1)
    rows, sizes = measure(options, _before(options))
    if options.json:
        print(json.dumps(summary(rows, sizes, options)))
    else:
        print(text_table(*_cells(rows)), text_table(*_weights(sizes)), sep="\n\n")


if __name__ == "__main__":
    restart_with_cpu_environment()
    main()
