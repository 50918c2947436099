"""What runs leave, as one row each: the folders of single runs, and those of sweeps."""

from __future__ import annotations

import math
import os
import re
import statistics
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, Optional, Sequence

from ..compact.shapes import Number
from ..errors import HeadPruningError
from ..files import MASKS_FILE, REPORT_FILE, read_json, tensor_shapes
from ..masks import HeadMask
from .report_file import read_report

RESULTS_FILE = "all_results.json"
#: Where a sweep keeps what its finished cells left, a file each, and what such a file is.
CELLS_FOLDER = "cells"
CELL = {
    "name": str,
    "values": {str: object},
    "commands": [str],  # as its plan has them, which a cell is known by
    "ran?": [str],  # with the benchmark as it was called, where there was one
    "folder": str,
    "score_name": str,
    "measure?": [str],
    "settings?": {str: str},
    "numbers": {str: Number()},
    "more?": [{"folder": str, "score_name": str, "numbers": {str: Number()}}],
    "seconds": Number(0),
}
#: The keys of all_results.json that are taken for the score, the first that is there.
SCORES = tuple(
    f"{split}{name}"
    for split in ("eval_", "test_", "")
    for name in ("combined_score", "matthews_correlation", "f1", "accuracy", "pearson", "bleu", "score", "loss")
)
#: What is told of a run beside its score, and how a table calls it.
NUMBERS = {
    "heads_kept": "heads",
    "units_kept": "units",
    "density": "density of weights",
    "parameters": "parameters in the file",
    "nonzero_parameters": "nonzero parameters",
    "file_bytes": "file, bytes",
    "latency_ms": "latency, ms",
    "examples_per_second": "examples per second",
    "macs": "MACs",
    "speed_up": "times as fast",
    "mac_bound": "times by MACs",
}
_TOLD = (*NUMBERS, "heads_total", "units_total")
# The files of a model. The first that are there count: those beside them are of other precisions, or left over.
_MODELS = (
    *(
        f"{stem}{part}{ending}"
        for stem, ending in (("model", ".safetensors"), ("adapter_model", ".safetensors"), ("pytorch_model", ".bin"))
        for part in ("", "-*-of-*", ".bf16*", ".fp16*")
    ),
    "checkpoint_last.pt",
)
_DEEPEST = 6  # folders below one that is given


@dataclass(frozen=True)
class Run:
    """One model of a run.

    Args:
        name: unique among those of one report.
        folder: where it lies.
        method: registered names of its pruners, or what a sweep calls it; ``dense`` where nothing was pruned.
        numbers: ``score``, if there is one, and of :data:`NUMBERS`, ``heads_total`` and ``units_total`` those that
            are known.
        score_name: key of the score; also where the run came to nothing, so that its score is no finite number.
        values: what its sweep set for it, such as its seed.
        commands: the command lines that made it; empty where nothing tells them.
        options: the options of its method.
        versions: package to version.
        kept: the heads that stay, by site.
    """

    name: str
    folder: Path
    method: str
    numbers: Mapping[str, float]
    score_name: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    commands: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def score(self) -> Optional[float]:
        """As the run wrote it."""
        return self.numbers.get("score")

    @property
    def dense(self) -> bool:
        """Whether nothing was pruned, as far as its method or its numbers tell."""
        pairs = (("heads_kept", "heads_total"), ("units_kept", "units_total"))
        known = [self.numbers[kept] == self.numbers.get(total) for kept, total in pairs if kept in self.numbers]
        known += [self.numbers["density"] == 1.0] if "density" in self.numbers else []
        return self.method == "dense" or bool(known) and all(known)

    def mask(self) -> Optional[HeadMask]:
        """Its head mask, if it left one."""
        path = self.folder / MASKS_FILE
        return HeadMask.load(path) if self.kept and path.is_file() else None


def lower_is_better(score_name: str) -> bool:
    """Whether a score of this name is the better the lower it is."""
    return re.search(r"loss|ppl|perplexity|error|(?<![a-z])wer(?![a-z])", score_name) is not None


def read_run(folder: "str | Path", scores: Sequence[str] = SCORES) -> Optional[Run]:
    """The run that left its files in ``folder``; None where there are none.

    Args:
        folder: with ``all_results.json``, ``pruning.json`` or both.
        scores: keys of all_results.json, of which the first that is there is the score; of several that are joined by
            + it is the mean. One that is not finite is no score, and none of the others stands in for it.

    Raises:
        HeadPruningError: a file is damaged.
    """
    folder = Path(folder)
    given, report = {}, read_report(folder / REPORT_FILE)
    if (folder / RESULTS_FILE).is_file():
        given = read_json(folder / RESULTS_FILE, {str: object}, cure="move it away, or run what wrote it again")
    elif not report:
        return None
    results = {name: value for name, value in given.items() if _finite(value)}
    weights = report.get("weights", {})
    told = {**results, **report, **report.get("sparsity", {}), **({"density": weights["density"]} if weights else {})}
    numbers = {name: told[name] for name in _TOLD if _finite(told.get(name))}
    if "density" not in numbers and results.get("weights_total"):
        numbers["density"] = results.get("weights_kept", 0.0) / results["weights_total"]
    sizes = file_sizes(folder)
    numbers |= {name: value for name, value in sizes.items() if value}
    if not sizes["parameters"] and "compact_parameters" in told:  # of a format that no header tells them of
        numbers["parameters"] = told["compact_parameters"]
    there = {name for name, value in given.items() if value is None or _number(value)}  # null: NaN in strict JSON
    parts = {name: [name] if name in there else name.split("+") for name in scores}
    score = next((name for name in scores if there.issuperset(parts[name])), "")
    if score and results.keys() >= set(parts[score]):
        numbers["score"] = statistics.fmean(results[part] for part in parts[score])
    return Run(
        name=folder.name,
        folder=folder,
        method=report.get("method", "dense"),
        numbers=numbers,
        score_name=score,
        options=report.get("options", {}),
        versions={name: str(version) for name, version in report.get("versions", {}).items()},
        kept=report.get("kept_heads_by_site", {}),
    )


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _finite(value: Any) -> bool:
    return _number(value) and math.isfinite(value)


def model_files(folder: Path) -> list[Path]:
    """The files that hold the weights of the model in a folder."""
    return next((found for found in (sorted(folder.glob(each)) for each in _MODELS) if found), [])


def file_sizes(folder: Path) -> dict[str, int]:
    """The bytes of a model's files, and the parameters in them by their headers: 0 of formats without any."""
    files = model_files(folder)
    shapes = [shape for path in files if path.suffix == ".safetensors" for shape in tensor_shapes(path).values()]
    return {"file_bytes": sum(path.stat().st_size for path in files), "parameters": sum(map(math.prod, shapes))}


def find_runs(folders: Iterable["str | Path"], score: Optional[str] = None) -> list[Run]:
    """All runs in folders of runs and of sweeps, and below them; checkpoints of a run are none.

    Args:
        folders: where they lie. Runs of one name are called by their paths.
        score: the entry of all_results.json to take for the score where there is one; None for the usual ones, and
            what a sweep took.

    Raises:
        HeadPruningError: there is no such folder, it holds no run, no run has the score, or a file is damaged.
    """
    found: dict[Path, Run] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise HeadPruningError(f"There is no folder {folder}; give the folder of a run or of a sweep.")
        here = {run.folder.resolve(): run for run in runs_below(folder, (score, *SCORES) if score else SCORES)}
        if not here:
            raise HeadPruningError(
                f"{folder} holds no {RESULTS_FILE}, {REPORT_FILE} or finished cells of a sweep; give the folder of a "
                "run or of a sweep."
            )
        for place, run in here.items():
            found.setdefault(place, run)
    if score is not None and not any(run.score_name == score and run.score is not None for run in found.values()):
        raise HeadPruningError(f"No run has a finite {score} in its {RESULTS_FILE}; name another --score.")
    counts = Counter(run.name for run in found.values())
    return [replace(run, name=run.name if counts[run.name] == 1 else _shown(run.folder)) for run in found.values()]


def _shown(path: Path) -> str:
    """A path as text, also where its bytes are none."""
    return path.as_posix().encode("utf-8", "replace").decode("utf-8")


def runs_below(folder: Path, scores: Sequence[str] = SCORES) -> Iterator[Run]:
    """The runs in a folder and below it, see :func:`find_runs`; that of the folder itself comes first.

    Args:
        folder: where they lie.
        scores: see :func:`read_run`; where they are not the usual ones, the first counts more than what a sweep took.

    Raises:
        HeadPruningError: a file is damaged.
    """
    return _below(folder, folder, scores, 0)


def _below(folder: Path, top: Path, scores: Sequence[str], depth: int) -> Iterator[Run]:
    cells = sorted((folder / CELLS_FOLDER).glob("*.json"))
    for path in cells:
        yield from _of_cell(read_json(path, CELL, cure="delete it and start the sweep again"), folder, scores, depth)
    if cells:
        return
    run = read_run(folder, scores)
    if run is not None:
        yield replace(run, name=_shown(Path(os.path.basename(os.path.abspath(top))) / folder.relative_to(top)))
    if depth < _DEEPEST:
        for below in sorted(folder.iterdir()):
            if below.is_dir() and not below.name.startswith((".", "checkpoint-")):
                yield from _below(below, top, scores, depth + 1)


def _of_cell(cell: Mapping[str, Any], sweep: Path, scores: Sequence[str], depth: int) -> Iterator[Run]:
    """What a cell measured, with what its folder tells beside it, and the further models that it left there."""
    folder = sweep / cell["folder"]
    found = {run.folder: run for run in (_below(folder, folder, scores, depth) if folder.is_dir() else ())}
    measured = {folder: cell, **{folder / each["folder"]: each for each in cell.get("more", ())}}
    nothing = Run(cell["name"], folder, "dense", {})
    told = {"values": cell["values"], "commands": cell.get("ran", cell["commands"])}
    told["method"] = str(cell["values"].get("method", found.get(folder, nothing).method))
    for place in dict.fromkeys([*measured, *found]):
        run = found.get(place, replace(nothing, folder=place))
        each = measured.get(place, {"numbers": {}, "score_name": run.score_name})
        numbers, score_name = {**run.numbers, **each["numbers"]}, each["score_name"]
        if scores != SCORES and run.score_name == scores[0] and run.score is not None:  # not what the sweep took
            numbers["score"], score_name = run.score, scores[0]
        name = cell["name"] if place == folder else f"{cell['name']}/{_shown(place.relative_to(folder))}"
        yield replace(run, name=name, numbers=numbers, score_name=score_name, **told)
