"""Do the tests notice when a line of the product says something else?

    python -m tests.lanes.mutants --count 240

Every mutant is one change of one line, made by cosmic-ray's operators, in a copy of the repository without recorded
numbers beside it. The test files that hold its module run in a child forked from a process that has imported torch and
the hosts. A call goes on where one before it was ended: its work folder has what was done. Survivors need a reason in
``survivors.json``.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Optional

from tests.forked import Child

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
LIMIT = 240.0  # seconds; what takes longer has been noticed

# Module (or folder) to the tests that hold it, the quickest first.
CORE = {
    "head_pruning/gates/engine/bank.py": ["core/test_importance.py", "core/test_session.py"],
    "head_pruning/gates/engine/top_k.py": ["core/test_own_reference_gates.py", "core/test_top_k.py"],
    "head_pruning/gates": ["core/test_own_reference_gates.py", "core/test_session.py", "core/test_methods.py"],
    "head_pruning/importance": ["core/test_importance.py", "core/test_own_reference_importance.py"],
    "head_pruning/surgery/zeros.py": ["core/test_zeros.py", "core/test_surgery.py"],
    "head_pruning/surgery": ["core/test_surgery.py", "core/test_sizes.py"],
    "head_pruning/session.py": ["core/test_session.py", "core/test_contract.py", "core/test_methods.py"],
    "head_pruning/weights/engine/selection.py": [
        *("core/test_own_reference_weights.py", "core/test_weights_layouts.py"),
        *("core/test_weights_select.py", "core/test_weights_counts.py"),
    ],
    "head_pruning/weights/files.py": ["core/test_weights_artifacts.py"],
    "head_pruning/weights/spd_magnitude.py": ["core/test_own_reference_weights.py", "core/test_spd.py"],
    "head_pruning/weights": [
        *("core/test_own_reference_weights.py", "core/test_weights_layouts.py", "core/test_weights_counts.py"),
        "core/test_weights.py",
    ],
}
HF = {
    "hf_plugin/training/checkpoints.py": ["hf/test_trainer.py"],
    "hf_plugin/training/weights.py": ["hf/test_weights.py"],
    "hf_plugin/training/callback.py": ["hf/test_trainer.py", "hf/test_contract.py", "hf/test_weights.py"],
}
FAIRSEQ = {
    "fairseq_plugin/checkpoints/reports.py": ["fairseq/test_training_output.py", "fairseq/test_weights.py"],
    "fairseq_plugin/checkpoints/weights.py": ["fairseq/test_weights.py"],
    "fairseq_plugin/checkpoints": [
        *("fairseq/test_restore.py", "fairseq/test_loading.py", "fairseq/test_weights.py", "fairseq/test_resume.py"),
    ],
}
# By group: the map, and what the server imports.
GROUPS: dict[str, tuple[dict[str, list[str]], list[str]]] = {
    "core": (CORE, ["torch._dynamo"]),
    "hf": (HF, ["torch._dynamo", "transformers.trainer", "transformers.models.bert.modeling_bert"]),
    "fairseq": (FAIRSEQ, ["torch._dynamo", "fairseq.trainer", "fairseq.sequence_generator", "hydra.experimental"]),
}


def modules(names: dict[str, list[str]]) -> list[str]:
    """The modules that a map covers."""
    found = {
        str(path.relative_to(ROOT))
        for name in names
        for path in ([ROOT / name] if name.endswith(".py") else (ROOT / name).rglob("*.py"))
    }
    return sorted(name for name in found if not name.endswith("__init__.py"))


def tests_of(names: dict[str, list[str]], module: str) -> list[str]:
    """The test files of a module: those of the longest name in the map that it starts with."""
    return names[max((name for name in names if module.startswith(name)), key=len)]


def copy_tree(target: Path) -> None:
    """Copy the files that git knows."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    shutil.rmtree(target, ignore_errors=True)
    for name in names.split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


def run_tests(tree: Path, files: list[str], log: Path, limit: float = LIMIT) -> str:
    """``survived`` if all tests pass, else what noticed: the first failing test, an error, or the time."""

    def work() -> None:
        os.chdir(tree)
        # The lane's own modules, and what they import of the project, are those of the repository.
        for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "head_pruning")]:
            del sys.modules[name]
        sys.path[:] = [str(tree), *(place for place in sys.path if place not in ("", str(ROOT)))]
        os.environ["PYTHONPATH"] = str(tree)
        os.environ.pop("HEAD_PRUNING_REFERENCE", None)
        import pytest

        there = [f"tests/{name}" for name in files if (tree / "tests" / name).exists()]
        options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--hypothesis-profile", "mutants"]
        raise SystemExit(int(pytest.main([*options, *there])))

    child, deadline = Child(work, log), time.monotonic() + limit
    while not child.ended():
        if time.monotonic() > deadline:
            child.kill()
            child.wait()
            return "the time"
        time.sleep(0.05)
    code = child.wait()
    if code == 0:
        return "survived"
    failed = [line for line in log.read_text(errors="replace").splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return failed[0].split(" - ")[0].partition(" ")[2] if failed else f"an error ({code})"


def serve(group: str, work: Path, count: int) -> None:
    """Try the mutants of a group that were not tried yet."""
    import importlib

    import hypothesis

    names, imports = GROUPS[group]
    mutants = [mutant for mutant in chosen(work, count) if mutant["module"] in modules(names)]
    file = work / f"{group}.jsonl"
    done = {row["key"] for row in _read(file)}
    left = [mutant for mutant in mutants if mutant["key"] not in done]
    if not left:
        return
    for name in imports:
        importlib.import_module(name)
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]  # nobody reads the smallest example
    hypothesis.settings.register_profile("mutants", deadline=None, derandomize=True, max_examples=60, phases=phases)
    tree = work / f"tree-{group}"
    copy_tree(tree)
    every = sorted({name for mutant in mutants for name in tests_of(names, mutant["module"])})
    noticed = run_tests(tree, every, work / f"{group}-unchanged.log", limit=math.inf)
    if noticed != "survived":
        raise RuntimeError(f"the tests do not pass without a mutant: {noticed}")
    for mutant in left:
        began, place = time.monotonic(), tree / mutant["module"]
        original = place.read_text(encoding="utf-8")
        place.write_text(mutant["source"], encoding="utf-8")
        try:
            verdict = run_tests(tree, tests_of(names, mutant["module"]), work / f"{group}.log")
        finally:
            place.write_text(original, encoding="utf-8")
        row = {name: value for name, value in mutant.items() if name != "source"}
        row |= {"verdict": verdict, "seconds": round(time.monotonic() - began, 1)}
        with open(file, "a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def chosen(work: Path, count: int) -> list[dict[str, Any]]:
    """The mutants, drawn once for the sources as they are."""
    from dataclasses import asdict

    from tests.lanes.sample import _rank, sample

    names = [name for group in GROUPS.values() for name in modules(group[0])]
    digest = _rank(str(count) + "".join((ROOT / name).read_text(encoding="utf-8") for name in names))
    file = work / f"mutants-{digest[:16]}.json"
    if not file.exists():
        drawn = [{**asdict(mutant), "key": mutant.key} for mutant in sample(ROOT, names, count)]
        file.write_text(json.dumps(drawn), encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def page(rows: list[dict[str, Any]], reasons: dict[str, str]) -> str:
    """The results as a page: by module, then the survivors."""
    survivors = [row for row in rows if row["verdict"] == "survived"]
    bare = [row for row in survivors if row["key"] not in reasons]
    lines = [
        "# Mutants\n\n`make test-mutants` wrote this page.\n",
        f"{len(rows)} mutants: {len(rows) - len(survivors)} noticed, {len(survivors)} survived, "
        f"{len(bare)} of them without a reason ({len(bare) / max(1, len(rows)):.1%}).\n",
        "| module | mutants | survived |\n| --- | ---: | ---: |",
    ]
    for module in sorted({row["module"] for row in rows}):
        own = [row for row in rows if row["module"] == module]
        lines.append(f"| {module} | {len(own)} | {sum(row in survivors for row in own)} |")
    lines += ["\n## Survivors\n", "| line | becomes | why no test notices |\n| --- | --- | --- |"]
    for row in survivors:
        before, after = (row[name].replace("|", "\\|") for name in ("before", "after"))
        why = reasons.get(row["key"], "unexplained")
        lines.append(f"| {row['module']}: `{before}` | `{after}` | {why} |")
    return "\n".join(lines) + "\n"


def main(line: Optional[list[str]] = None) -> int:
    """Command line; returns 1 where more than 5 % of the mutants survive without a reason."""
    parser = argparse.ArgumentParser(description="mutants")
    parser.add_argument("--group", action="append", choices=list(GROUPS), help="default: all")
    parser.add_argument("--count", type=int, default=240, help="mutants in all")
    parser.add_argument("--again", action="store_true", help="try survivors without a reason once more")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "head-pruning-mutants")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the page")
    options = parser.parse_args(line)
    for folder in (options.work, options.results):
        folder.mkdir(parents=True, exist_ok=True)
    reasons = json.loads((RESULTS / "survivors.json").read_text(encoding="utf-8"))
    drawn = {mutant["key"] for mutant in chosen(options.work, options.count)}
    for name in GROUPS:
        file = options.work / f"{name}.jsonl"
        keep = [row for row in _read(file) if row["key"] in drawn]
        if options.again:
            keep = [row for row in keep if row["verdict"] != "survived" or row["key"] in reasons]
        file.write_text("".join(json.dumps(row) + "\n" for row in keep), encoding="utf-8")
    for name in options.group or GROUPS:
        log = options.work / f"{name}-server.log"
        if Child(lambda name=name: serve(name, options.work, options.count), log).wait() != 0:
            raise SystemExit(f"{name} failed:\n{log.read_text(encoding='utf-8')[-3000:]}")
    rows = [row for name in GROUPS for row in _read(options.work / f"{name}.jsonl")]
    (options.results / "mutants.md").write_text(page(rows, reasons), encoding="utf-8")
    bare = [row for row in rows if row["verdict"] == "survived" and row["key"] not in reasons]
    return int(len(bare) > 0.05 * len(rows))


if __name__ == "__main__":
    raise SystemExit(main())
