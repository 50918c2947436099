"""What a command loads before it answers: counted in modules, which no busy machine changes."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = {"torch", "numpy", "safetensors", "matplotlib", "transformers", "fairseq", "hf_plugin", "fairseq_plugin"}
COMMANDS = ("inspect", "export", "benchmark", "show", "diff", "report", "sweep")
SCRIPTS = ("dsp", "voita", "glue", "squad", "ner", "swag", "michel")


def _python(*arguments, cwd=ROOT):
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=True)


def _loaded(*arguments):
    """What a command printed, and the packages whose modules it executed."""
    done = _python("-X", "importtime", "-m", *arguments)
    names = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")]
    return done.stdout, {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("words", [["--help"], ["pruners"], ["user-dir"], *([name, "--help"] for name in COMMANDS)])
def test_head_pruning_answers_without_any_library(words):
    printed, packages = _loaded("head_pruning.cli", *words)
    assert printed and "head_pruning" in packages
    assert not packages & LIBRARIES


def test_pruners_lists_the_methods_that_are_there_once_torch_is():
    from head_pruning import methods

    printed, _ = _loaded("head_pruning.cli", "pruners")
    listed = [line.partition(" (")[0] for line in printed.splitlines() if not line.startswith(" ")]
    assert listed == list(methods(None)) and len(listed) > 10
    assert sum(line.startswith("    --") for line in printed.splitlines()) == sum(
        len(method.options) for method in methods(None).values()
    )


def test_scripts_show_their_flags_with_little_more_than_transformers_own():
    code = f"""
import contextlib, importlib, io, json, sys
import hf_plugin
alone = sorted({{name.partition(".")[0] for name in sys.modules}})
from transformers import TrainingArguments
bare, found = set(sys.modules), {{}}
for script in {SCRIPTS!r}:
    sys.argv, shown = [script, "--help"], io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        importlib.import_module(f"hf_plugin.run_{{script}}").main()
    found[script] = len(shown.getvalue())
print(json.dumps([alone, found, sorted(set(sys.modules) - bare)]))
"""
    alone, shown, more = json.loads(_python("-c", code).stdout)
    assert not set(alone) & (LIBRARIES - {"hf_plugin"})
    assert set(shown) == set(SCRIPTS) and min(shown.values()) > 1000
    ours = [name for name in more if name.startswith("hf_plugin.")]
    allowed = ("command_line", "compact.registration", "compact.quantizer", "run_", "training.optimizers")
    assert [name for name in ours if not name.removeprefix("hf_plugin.").startswith(allowed)] == ["hf_plugin.training"]
    foreign = [name for name in more if name.partition(".")[0] not in ("hf_plugin", "head_pruning")]
    assert len(foreign) < 20, foreign


@pytest.mark.parametrize(
    "name", ["head_pruning", "head_pruning.gates", "head_pruning.weights", "hf_plugin.glue", "hf_plugin"]
)
def test_names_that_load_later_are_those_that_type_checkers_see(name):
    if name.startswith("hf_plugin"):
        pytest.importorskip("transformers")
    package = importlib.import_module(name)
    assert package.__file__
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: f"{name}.{node.module}" for node in block.body for alias in node.names}
    assert sorted(seen) == sorted(package.__all__)
    for wanted, home in seen.items():
        assert getattr(package, wanted) is getattr(importlib.import_module(home), wanted)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = package.nothing
    with pytest.raises(ImportError):
        exec(f"from {name} import nothing")


def test_modules_of_a_package_are_found_without_importing_them_first():
    code = (
        "import head_pruning; print(head_pruning.surgery.remove_heads.__name__, head_pruning.weights.engine.__name__)"
    )
    assert _python("-c", code).stdout.split() == ["remove_heads", "head_pruning.weights.engine"]


@pytest.mark.parametrize(
    "use",
    [
        "import slow.part; print(slow.part.NAME, slow.NAME)",
        "from slow import part; print(part.NAME, slow.NAME)",
        "from slow import NAME; print(slow.part.NAME, NAME)",
        "print(slow.__path__ and slow.part.NAME, slow.NAME)",
    ],
)
def test_a_module_that_loads_later_loads_once_it_is_used(tmp_path, use):
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow/__init__.py").write_text("NAME = 'whole'\nprint('loads')\nfrom . import part\n")
    (tmp_path / "slow/part.py").write_text("import slow\nNAME = 'part of ' + slow.NAME\n")
    code = "from head_pruning.lazy import load_later\nload_later('slow', 'no_such_module')\nimport slow\nimport slow\n"
    printed = _python("-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}print('waits')\n{use}").stdout
    assert printed.splitlines() == ["waits", "loads", "part of whole whole"]


def test_a_module_that_fails_when_it_loads_is_as_if_it_had_not_been_imported(tmp_path):
    (tmp_path / "broken.py").write_text("raise ImportError('no such library')\n")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from head_pruning.lazy import load_later
load_later('broken')
import broken
for use in ('broken.name', 'import broken'):
    try:
        exec(use)
    except ImportError as error:
        print(error, 'broken' in sys.modules)
"""
    assert _python("-c", code).stdout.splitlines() == ["no such library False"] * 2


def test_a_method_that_uses_torch_when_it_is_imported_is_listed_all_the_same(tmp_path):
    """Only later: a method's file is asked to leave torch alone, not forced to."""
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom dataclasses import dataclass\nfrom head_pruning import Pruner, register_pruner\n"
        "SCALE = torch.ones(2) * 3\n"
        "@dataclass\nclass Nothing:\n    pass\n"
        "class Mine(Pruner):\n    '''Prunes as I like it.'''\n    name = 'mine'\n"
        "register_pruner(name='mine', config=Nothing, pruner=Mine)\n"
    )
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from head_pruning.lazy import load_later
load_later('torch', 'numpy')
import mine
from head_pruning.cli import main
main(['pruners'])
print(mine.SCALE.tolist(), 'torch._tensor' in sys.modules)
"""
    printed = _python("-c", code).stdout.splitlines()
    assert "mine (heads): Prunes as I like it." in printed and printed[-1] == "[3.0, 3.0] True"
