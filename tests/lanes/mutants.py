"""Do the tests notice when a line of the product says something else?

    python -m tests.lanes.mutants --count 220

Every mutant is one change of one line, made by cosmic-ray's operators, in a copy of the repository without recorded
numbers beside it. First the tests run once without a mutant, and coverage says which of them run which line. Then
the tests that run the changed line, the cheapest first, run in a child forked from a process that has imported torch
and the host. A call goes on where one before it was ended: its work folder has what was done. Survivors need a reason
in ``survivors.json``.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Optional

from tests.forked import ROOT, Child
from tests.lanes.covering import PLUGINS, Chosen, Covering, pytest_in, run
from tests.lanes.swapping import Swapping, new_code

RESULTS = Path(__file__).parent / "results"

_CORE = [f"head_pruning/{name}" for name in ("gates", "importance", "surgery", "session.py", "weights")]
_HF = [f"hf_plugin/training/{name}.py" for name in ("checkpoints", "weights", "callback")]
_HF_TESTS = [
    "tests/hf/training/test_trainer.py",
    "tests/hf/training/test_contract.py",
    "tests/hf/training/test_weights.py",
]
_FAIRSEQ_TESTS = ["tests/fairseq/checkpoints/test_*.py"]
_FAIRSEQ_TESTS += [
    f"tests/fairseq/training/test_{name}.py" for name in ("weights", "resume", "training_output", "contract")
]
#: By group: the modules and folders, their tests (patterns), what is imported before the children are forked.
GROUPS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "core": (_CORE, ["tests/core/**/test_*.py"], ["torch._dynamo"]),
    "hf": (_HF, _HF_TESTS, ["torch._dynamo", "transformers.trainer", "transformers.models.bert.modeling_bert"]),
    "fairseq": (
        ["fairseq_plugin/checkpoints"],
        _FAIRSEQ_TESTS,
        ["torch._dynamo", "fairseq.trainer", "fairseq.sequence_generator", "hydra.experimental", "sacrebleu"],
    ),
}


def modules(group: str) -> list[str]:
    """The modules of a group."""
    found = {
        str(path.relative_to(ROOT))
        for name in GROUPS[group][0]
        for path in ([ROOT / name] if name.endswith(".py") else (ROOT / name).rglob("*.py"))
    }
    return sorted(name for name in found if not name.endswith("__init__.py"))


def copy_tree(target: Path) -> None:
    """Copy the files that git knows."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    shutil.rmtree(target, ignore_errors=True)
    for name in names.split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


def serve(group: str, work: Path, count: int, seconds: float) -> None:
    """Try the mutants of a group that were not tried yet."""
    import importlib

    import hypothesis

    own = modules(group)
    mutants = [mutant for mutant in chosen(work, count) if mutant["module"] in own]
    file = work / f"{group}.jsonl"
    done = {row["key"] for row in _read(file)}
    left = [mutant for mutant in mutants if mutant["key"] not in done]
    if not left:
        return
    for name in ("pytest", *PLUGINS, *GROUPS[group][2]):
        importlib.import_module(name)
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]  # nobody reads the smallest example
    hypothesis.settings.register_profile("mutants", deadline=None, derandomize=True, max_examples=60, phases=phases)
    tree = work / f"tree-{group}"
    copy_tree(tree)
    paths = sorted(path for pattern in GROUPS[group][1] for path in tree.glob(pattern))
    files = [str(path.relative_to(tree)) for path in paths if not path.stem.endswith("_benchmark")]  # these time only
    covering = Covering(tree, files, own, work / "unchanged")
    sys.dont_write_bytecode = True  # what was compiled of the unchanged sources stays, and serves every child
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    swapped = []
    for mutant in left:
        place = tree / mutant["module"]
        original, times = place.read_text(encoding="utf-8"), place.stat()
        tests, cost = covering.of(mutant["module"], original, mutant["line"], seconds)
        limit = 30 + 4 * cost
        codes = new_code(str(place), original, mutant["source"])
        if codes:
            swapped.append((mutant, str(place), codes, tests, limit))
            continue
        try:
            place.write_text(mutant["source"], encoding="utf-8")
            os.utime(place, (1, 1))  # the compiled original is not of this moment
            plugin = Chosen(tests)
            verdict = run(tree, plugin.files, work / f"{group}.log", plugin, limit) if tests else "passed"
        finally:
            place.write_text(original, encoding="utf-8")
            os.utime(place, ns=(times.st_atime_ns, times.st_mtime_ns))
        _write(file, mutant, verdict, tests)

    def each(swapping: Swapping) -> None:
        sound: dict[str, bool] = {}
        log = work / f"{group}.log"
        for mutant, path, codes, tests, limit in swapped:
            verdict = "passed"
            while tests:
                verdict = swapping.verdict(path, codes, tests, log, limit)
                if verdict in tests and verdict not in sound:
                    sound[verdict] = swapping.verdict(path, {}, [verdict], log, limit) == "passed"
                if sound.get(verdict, True):
                    break
                tests = [name for name in tests if name != verdict]  # it fails here without a change, too
            _write(file, mutant, verdict if tests else "passed", tests)

    if swapped:
        pytest_in(tree, files, Swapping(each), "-s")


def _write(file: Path, mutant: dict[str, Any], verdict: str, tests: list[str]) -> None:
    row = {name: value for name, value in mutant.items() if name != "source"}
    with open(file, "a", encoding="utf-8") as out:
        out.write(json.dumps(row | {"verdict": verdict, "tests": len(tests)}) + "\n")


def chosen(work: Path, count: int) -> list[dict[str, Any]]:
    """The mutants, drawn once for the sources as they are."""
    from dataclasses import asdict

    from tests.lanes.sample import _rank, sample

    names = [name for group in GROUPS for name in modules(group)]
    digest = _rank(str(count) + "".join((ROOT / name).read_text(encoding="utf-8") for name in names))
    file = work / f"mutants-{digest[:16]}.json"
    if not file.exists():
        drawn = [{**asdict(mutant), "key": mutant.key} for mutant in sample(ROOT, names, count)]
        file.write_text(json.dumps(drawn), encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def page(rows: list[dict[str, Any]], count: int, reasons: dict[str, str]) -> str:
    """The results as a page: by module, then the survivors."""
    survivors = [row for row in rows if row["verdict"] == "passed"]
    bare = [row for row in survivors if row["key"] not in reasons]
    lines = [
        "# Mutants\n\n`make test-mutants` wrote this page.\n",
        f"{len(rows)} of {count} mutants were tried: {len(rows) - len(survivors)} noticed, {len(survivors)} survived, "
        f"{len(bare)} of them without a reason ({len(bare) / max(1, len(rows)):.1%}).\n",
        "| module | mutants | noticed | survived |\n| --- | ---: | ---: | ---: |",
    ]
    for module in sorted({row["module"] for row in rows}):
        own = [row for row in rows if row["module"] == module]
        left = sum(row in survivors for row in own)
        lines.append(f"| {module} | {len(own)} | {len(own) - left} | {left} |")
    lines += [
        "\n## Survivors\n",
        "| module | line | becomes | why no test needs to notice |\n| --- | --- | --- | --- |",
    ]
    for row in survivors:
        before, after = (row[name].replace("|", "\\|") for name in ("before", "after"))
        lines.append(f"| {row['module']} | `{before}` | `{after}` | {reasons.get(row['key'], 'unexplained')} |")
    return "\n".join(lines) + "\n"


def main(line: Optional[list[str]] = None) -> int:
    """Command line; returns 1 where more than 5 % of the mutants survive without a reason."""
    parser = argparse.ArgumentParser(description="mutants")
    parser.add_argument("--group", action="append", choices=list(GROUPS), help="default: all")
    parser.add_argument("--count", type=int, default=220, help="mutants in all")
    parser.add_argument("--seconds", type=float, default=8.0, help="processor time of a mutant's tests")
    parser.add_argument("--again", action="store_true", help="try unexplained survivors once more")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "head-pruning-mutants")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the page")
    options = parser.parse_args(line)
    for folder in (options.work, options.results):
        folder.mkdir(parents=True, exist_ok=True)
    reasons = json.loads((RESULTS / "survivors.json").read_text(encoding="utf-8"))
    drawn = {mutant["key"] for mutant in chosen(options.work, options.count)}
    for name in GROUPS:
        keep = [row for row in _read(options.work / f"{name}.jsonl") if row["key"] in drawn]
        if options.again:
            keep = [row for row in keep if row["verdict"] != "passed" or row["key"] in reasons]
        (options.work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in keep), encoding="utf-8")
    for name in options.group or GROUPS:
        log = options.work / f"{name}-server.log"
        if Child(lambda name=name: serve(name, options.work, options.count, options.seconds), log).wait() != 0:
            raise SystemExit(f"{name} failed:\n{log.read_text(encoding='utf-8')[-3000:]}")
    # Lines of the same text in a module are one mutant.
    rows = list({row["key"]: row for name in GROUPS for row in _read(options.work / f"{name}.jsonl")}.values())
    (options.results / "mutants.md").write_text(page(rows, len(drawn), reasons), encoding="utf-8")
    bare = [row for row in rows if row["verdict"] == "passed" and row["key"] not in reasons]
    return int(len(rows) < len(drawn) or len(bare) > 0.05 * len(rows))


if __name__ == "__main__":
    raise SystemExit(main())
