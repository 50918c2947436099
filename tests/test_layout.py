"""The rules of the structure: who may import whom, and what a fresh process imports."""

import ast
import graphlib
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {
    "head_pruning": {"fairseq", "transformers", "fairseq_plugin", "hf_plugin"},
    "fairseq_plugin": {"transformers", "hf_plugin"},
    "hf_plugin": {"fairseq", "fairseq_plugin"},
}


def _imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_package_imports_what_it_must_not(package):
    for path in (ROOT / package).rglob("*.py"):
        assert not _imported(path) & FORBIDDEN[package], path


def import_graph(package: Path) -> dict[str, set[str]]:
    """Module to the modules of its own package that it imports, anywhere in it, by dotted names."""
    files = {".".join(path.relative_to(package.parent).with_suffix("").parts): path for path in package.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in files.items()}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        names = []
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names += [(alias.name, "") for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                up = node.level - (path.name == "__init__.py")
                start = module.split(".")[: len(module.split(".")) - up] if node.level else []
                source = ".".join([*start, *filter(None, [node.module])])
                names += [(source, alias.name) for alias in node.names]
        found = {f"{source}.{name}" if f"{source}.{name}" in modules else source for source, name in names}
        graph[module] = found & modules.keys()
    return graph


def circle(package: Path) -> list[str]:
    """Modules of a package that import each other in a circle, empty if none do."""
    try:
        graphlib.TopologicalSorter(import_graph(package)).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_go_one_way(package):
    assert len(import_graph(ROOT / package)) > 10 and not circle(ROOT / package)


def test_circles_are_found_inside_functions_and_through_packages(tmp_path):
    package = tmp_path / "rooms"
    files = {
        "__init__.py": "from .top import run",
        "top.py": "import os\nfrom .low import tool",
        "low/__init__.py": "",
        "low/tool.py": "from . import nail",
        "low/nail.py": "def late():\n    WHAT",
    }
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text, encoding="utf-8")
    for what, found in (("import rooms.top", 3), ("from ..top import run", 3), ("from .. import run", 4), ("pass", 0)):
        (package / "low/nail.py").write_text(files["low/nail.py"].replace("WHAT", what), encoding="utf-8")
        assert len(set(circle(package))) == found, what


def test_the_core_loads_without_any_host():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "head_pruning").rglob("*.py")
    ]
    code = f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\n"
    code += "print(sorted({'fairseq', 'transformers', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def underscored_flags(source: str) -> list[str]:
    """Flags spelt with underscores in the strings of a module that are not docstrings."""
    tree, told = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            told.add(id(node.value))
    found = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in told]
    return [flag for text in found if isinstance(text, str) for flag in re.findall(r"--[a-z]+[a-z-]*_\w*", text)]


def test_the_core_spells_flags_with_dashes():
    """fairseq-train refuses others; the transformers scripts turn those of methods into their own spelling."""
    for path in (ROOT / "head_pruning").rglob("*.py"):
        assert not underscored_flags(path.read_text(encoding="utf-8")), path
    text = '"""--a_b"""\nraise E(f"{x} --one_two {y}; --three-four" f" --five-six_7, --all_{z}")'
    assert set(underscored_flags(text)) == {"--one_two", "--five-six_7", "--all_"}


def test_every_public_name_has_a_docstring():
    missing = []
    for package in ("head_pruning", "fairseq_plugin", "hf_plugin", "prepare"):
        for path in (ROOT / package).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            if not ast.get_docstring(tree):
                missing.append(str(path))
            for node in tree.body:
                public = isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_")
                if public and not ast.get_docstring(node):
                    missing.append(f"{path}:{node.name}")
    assert not missing


def _pins(files: str = "*") -> dict[str, str]:
    """Name to version of what the requirements pin."""
    lines = [
        line
        for path in (ROOT / "requirements").glob(f"{files}.txt")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==\S+", pin) for pin in lines), lines
    pins = {canonicalize_name(name): version for name, _, version in (pin.partition("==") for pin in lines)}
    assert len(pins) == len(lines)
    return pins


def test_the_makefile_installs_the_pinned_versions():
    assert "torchaudio" not in _pins()


def test_what_a_pinned_package_needs_is_pinned_too():
    """Set-up installs without looking for what is missing; but for torch, whose builds need different things."""
    pins, looked = _pins("[!dm]*") | _pins("dev"), 0  # the docs and the mutants have environments of their own
    for name in sorted(pins.keys() - {"torch"}):
        for need in map(Requirement, importlib.metadata.requires(name) or ()):
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                version = pins.get(canonicalize_name(need.name))
                assert version and need.specifier.contains(version, prereleases=True), f"{name} needs {need}"
                looked += 1
    assert looked > 100
