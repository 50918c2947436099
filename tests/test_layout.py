"""The rules of the structure: who may import whom, and what a fresh process imports."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_the_makefile_installs_the_pinned_versions():
    pins = [
        line
        for path in (ROOT / "requirements").glob("*.txt")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==\S+", pin) for pin in pins), pins
    names = [pin.partition("==")[0].lower() for pin in pins]
    assert len(names) == len(set(names)) and "torchaudio" not in names


def test_no_host_knows_a_method():
    """What a host must know of a method is a property of its class, not its name or its type."""
    from head_pruning import Pruner, methods

    known = {**methods("heads"), **methods("weights")}
    classes = {base.__name__ for method in known.values() for base in method.pruner.__mro__}
    classes -= {base.__name__ for base in Pruner.__mro__}
    names = known.keys() - {"random", "given"}  # also words
    for folder in ("fairseq_plugin", "hf_plugin/training", "hf_plugin/scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name == "demo.py":
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                word = getattr(node, "value", None) if isinstance(node, ast.Constant) else getattr(node, "id", None)
                assert not isinstance(word, str) or word not in names | classes, f"{path}:{node.lineno} {word}"
