"""The wheel carries a user-dir that fairseq can use from anywhere; what it needs is in its metadata."""

import ast
import importlib.metadata
import os
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


def _imported(package: str) -> set[str]:
    """What the package's modules import when they are imported, but for Python's own and the project's."""
    found = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            found.update(name.partition(".")[0] for name in names)
    return found - sys.stdlib_module_names - {"head_pruning", "hf_plugin", "fairseq_plugin", "prepare"}


def _needed(lines: list[str]) -> set[str]:
    needs = map(Requirement, lines)
    return {canonicalize_name(n.name) for n in needs if n.marker is None or n.marker.evaluate({"extra": ""})}


@pytest.mark.parametrize(
    "package, extra",
    [("head_pruning", ""), ("hf_plugin", "hf"), ("fairseq_plugin", "fairseq"), ("prepare", "fairseq")],
)
def test_an_extra_names_all_that_its_package_imports(package, extra, monkeypatch):
    told = {}
    monkeypatch.setattr(setuptools, "setup", told.update)
    runpy.run_path(str(ROOT / "setup.py"))
    named = _needed([*told["install_requires"], *(told["extras_require"][extra] if extra else ())])
    brought = named.union(*(_needed(importlib.metadata.requires(name) or []) for name in named))
    whose = importlib.metadata.packages_distributions()
    assert all({canonicalize_name(each) for each in whose[name]} & brought for name in _imported(package))


@pytest.mark.slow
def test_fairseq_trains_with_the_user_dir_of_the_wheel(tmp_path):
    pytest.importorskip("fairseq")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "-w", str(tmp_path)]
    # Built from a copy: building leaves its traces beside setup.py.
    source = tmp_path / "source"
    source.mkdir()
    packages = ("head_pruning", "fairseq_plugin", "hf_plugin", "prepare")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", *packages):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source / name)], check=True)
    subprocess.run([*build, str(source)], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        assert "prepare/prepare-iwslt14.sh" in archive.namelist()
        assert "head_pruning/report/templates/report.html" in archive.namelist()
        assert {"hf_plugin/run_dsp.py", "hf_plugin/glue/tasks.py"} <= set(archive.namelist())
        typed = {f"{package}/py.typed" for package in ("head_pruning", "fairseq_plugin", "hf_plugin")}
        assert typed <= set(archive.namelist())  # so that type checkers read the hints of what is installed
        assert not [name for name in archive.namelist() if name.startswith("tests")]
        (commands,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "head-pruning-dsp = hf_plugin.run_dsp:main" in archive.read(commands).decode()

    env = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    found = [sys.executable, "-m", "head_pruning.cli", "user-dir"]
    done = subprocess.run(found, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    user_dir = done.stdout.strip()
    assert Path(user_dir).samefile(site / "fairseq_plugin")
    code = """
import sys
from fairseq import options
line = ["data", "--user-dir", sys.argv[1], "--task", "translation_head_pruning", "--arch", "transformer"]
line += ["--num-of-heads", "4", "--annealing", "--cooldown-steps", "0.5", "--min-heads-per-kind", "1"]
args = options.parse_args_and_arch(options.get_training_parser(), line)
import head_pruning
print(args.task, args.num_of_heads, args.cooldown_steps, args.min_heads_per_kind, head_pruning.__file__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, user_dir], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    *values, where = done.stdout.splitlines()[-1].split()
    assert values == ["translation_head_pruning", "4", "0.5", "1"]
    assert Path(where).is_relative_to(site)
