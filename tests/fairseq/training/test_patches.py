"""What the plugin changes in fairseq: in one file, and once."""

import ast
import sys

from fairseq import checkpoint_utils
from fairseq.distributed import utils as distributed_utils
from fairseq.models import BaseFairseqModel
from fairseq.trainer import Trainer

from fairseq_plugin import patches
from tests.fairseq.runner import ROOT

PLACES = [
    *((sys, "excepthook"), (distributed_utils, "_broadcast_object_slow")),
    *((checkpoint_utils, "load_checkpoint_to_cpu"), (checkpoint_utils, "save_checkpoint")),
    *((BaseFairseqModel, "load_state_dict"), (Trainer, "load_checkpoint"), (Trainer, "state_dict")),
]


def test_patches_are_applied_once():
    before = [getattr(owner, name) for owner, name in PLACES]
    for patched in before[1:]:  # pytest has an excepthook of its own while a test runs
        assert hasattr(patched, "__wrapped__") and not hasattr(patched.__wrapped__, "__wrapped__")
    patches.install()
    again = [getattr(owner, name) for owner, name in PLACES]
    patches.install()
    assert again[1:] == before[1:] and again == [getattr(owner, name) for owner, name in PLACES]


def test_fairseq_is_changed_in_one_file_only():
    found = set()
    for path in (ROOT / "fairseq_plugin").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {
            (alias.asname or alias.name).partition(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0)
            for alias in node.names
        }
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else []
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr":
                targets = [ast.Attribute(node.args[0])]
            for target in targets:
                name = getattr(getattr(target, "value", None), "id", None)
                if isinstance(target, ast.Attribute) and name in imported | {"owner"}:
                    found.add(path.name)
    assert found == {"patches.py"}
