"""What a module's forward does with its output projection and what it returns, read from its source.

Attention without heads is a constant, but only its class's code says what happens to that constant on the way out.
What cannot be read here keeps a dummy head instead.
"""

import ast
import functools
import inspect
import re
import textwrap
from dataclasses import dataclass
from typing import Any, Iterator, Optional

from torch import nn

# Arguments with the keys and values of earlier tokens, and attributes that say which of a cache's layers a module is.
CACHES = ("past_key_values", "past_key_value", "layer_past", "cache")
CACHE_LAYERS = ("layer_idx", "layer_id")
# Sequences that one module attends from side by side.
SIDE_BY_SIDE = (("word_hidden_states", "entity_hidden_states"), ("token_hidden_states", "global_hidden_states"))
# As CACHES, of modules whose tensors have the tokens first and the examples second.
TOKENS_FIRST_CACHE = "layer_state"


@dataclass(frozen=True)
class Forward:
    """The source of a module's class: its text, and the tree and parameters of its forward."""

    text: str
    tree: Optional[ast.FunctionDef]
    parameters: tuple[str, ...]

    def where(self, name: str) -> list:
        """An argument as the recipes give it: name and position."""
        return [name, self.parameters.index(name)]


@functools.cache
def read_forward(kind: type) -> Forward:
    """What is known of a class's code; empty when its source is not at hand."""
    function = inspect.unwrap(kind.forward)
    parameters = tuple(inspect.signature(function).parameters)[1:]
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        text = inspect.getsource(kind)
    except (OSError, TypeError, SyntaxError):
        return Forward("", None, parameters)
    start = text.find("def __init__")
    end = text.find("\n    def ", start + 1)
    without_init = text[:start] + text[end:] if start >= 0 and end >= 0 else text
    return Forward(without_init, tree if isinstance(tree, ast.FunctionDef) else None, parameters)


def names_in(text: str, owner: str) -> set[str]:
    """The attributes of ``owner`` that a text reads."""
    return set(re.findall(rf"\b{re.escape(owner)}\.(\w+)", text))


def without_heads(module: nn.Module, out: Optional[str], drop: list[str], kind: str) -> Optional[dict[str, Any]]:
    """The options of :class:`head_pruning.compact.NoHeads` for an attention module, or None when they are not known.

    Args:
        module: the module that holds the projections.
        out: the output projection within it, or None when it lies outside.
        drop: names of the modules and parameters that go.
        kind: the site's; caches are for decoders.
    """
    forward = read_forward(type(module))
    counted = kind == "decoder_self"
    if forward.tree is None or (counted and TOKENS_FIRST_CACHE in forward.parameters):
        return None
    returned = _returned(forward)
    if returned is None:
        return None
    first, others, attentions, as_list = returned
    options: dict[str, Any] = {"inputs": [forward.where(forward.parameters[0])], "out": out, "after": []}
    if as_list:
        options["list"] = True
    side_by_side = next((names for names in SIDE_BY_SIDE if set(names) <= set(forward.parameters)), None)
    if side_by_side is not None:
        options["inputs"] = [forward.where(name) for name in side_by_side]
        others = others[1:]
    elif out is not None:
        steps = _after(module, forward.tree, out, first)
        if steps is None:
            return None
        options.update(steps)
        if steps["residual"]:
            options["residual"] = forward.where(steps["residual"])
    passed = [forward.where(name) if name in forward.parameters else None for name in others or ()]
    options["returns"] = None if others is None else passed
    asks = "output_attentions"
    options["attentions"] = [forward.where(asks) if asks in forward.parameters else None, attentions]
    options["drop"] = drop
    cache = next((name for name in CACHES if name in forward.parameters), None)
    if cache is not None and (counted or kind == "decoder_cross"):
        layer = next((name for name in CACHE_LAYERS if isinstance(getattr(module, name, None), int)), None)
        if layer is None:
            return None
        options["cache"] = [*forward.where(cache), layer, not counted]
    return options


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The simple statements of a function in order, those of nested functions left out."""
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            continue
        inner = [getattr(statement, part, []) for part in ("body", "orelse", "finalbody")]
        if any(inner):
            for part in inner:
                yield from _statements(part)
        else:
            yield statement


def _target(statement: ast.stmt) -> Optional[str]:
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        if isinstance(statement.targets[0], ast.Name):
            return statement.targets[0].id
    return None


def _returned(forward: Forward) -> Optional[tuple[str, Optional[list[str]], int, bool]]:
    """What is returned: the first value, the names of the others (None: it is bare), how many more there are with
    attentions, and whether it is a list. None where the returns differ or cannot be read.
    """
    statements = list(_statements(forward.tree.body))
    assigned: dict[str, list[ast.expr]] = {}
    for statement in statements:
        if _target(statement):
            assigned.setdefault(_target(statement), []).append(statement.value)

    def elements(value: ast.expr) -> Optional[tuple[list[ast.expr], int, bool]]:
        """The values without attentions, how many more there are with them, and whether it is a list."""
        if isinstance(value, (ast.Tuple, ast.List)):
            return value.elts, 0, isinstance(value, ast.List)
        if isinstance(value, ast.IfExp):
            less, more = elements(value.orelse), elements(value.body)
            return less and more and (less[0], len(more[0]) - len(less[0]), less[2])
        if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
            less, more = elements(value.left), elements(value.right)
            return less and (less[0], less[1] + (len(more[0]) if more else 1), less[2])
        if isinstance(value, ast.Name) and value.id in assigned:
            found = elements(assigned[value.id][0])
            return found and (found[0], found[1] + len(assigned[value.id]) - 1, found[2])
        return None

    found = set()
    for statement in statements:
        if not isinstance(statement, ast.Return) or statement.value is None:
            continue
        known = elements(statement.value)
        if known is None:
            if not isinstance(statement.value, ast.Name):
                return None
            found.add((statement.value.id, None, 0, False))
            continue
        first, *others = (ast.unparse(element) for element in known[0])
        if first in assigned and elements(ast.Name(first)) is not None:
            return None  # a tuple in a tuple
        found.add((first, tuple(others), *known[1:]))
    kinds = {(first, None if others is None else len(others), *more) for first, others, *more in found}
    if len(kinds) != 1:
        return None
    first, others, attentions, as_list = sorted(found)[0]
    return first, None if others is None else list(others), attentions, as_list


def _after(module: nn.Module, tree: ast.FunctionDef, out: str, returned: str) -> Optional[dict[str, Any]]:
    """What runs on the output projection's output until it is returned as ``returned``; None when it is not known."""
    ways: list[list[ast.stmt]] = [[]]  # the statements up to each return
    for statement in _statements(tree.body):
        ways[-1].append(statement)
        if isinstance(statement, ast.Return):
            ways.append([])
    steps = [_steps(module, way, out, returned) for way in ways[:-1]]
    return steps[0] if steps and all(each == steps[0] for each in steps) else None


def _steps(module: nn.Module, statements: list[ast.stmt], out: str, returned: str) -> Optional[dict[str, Any]]:
    calls = [i for i, statement in enumerate(statements) if _calls(statement, f"self.{out}")]
    if not calls:
        return None
    steps: dict[str, Any] = {"after": [], "residual": None, "norm": None}
    start = statements[calls[-1]]
    for statement in statements[calls[0] + 1 : calls[-1] + 1]:  # branches that each call it
        if _target(start) is None or _target(start) in _reads(statement):
            return None
        if _target(statement) == _target(start):
            break
    value = start.value if isinstance(start, (ast.Assign, ast.Return)) else None
    call = next((node for node in ast.walk(start) if _is_call(node, f"self.{out}")), None)
    if isinstance(value, ast.Tuple) and value.elts and value.elts[0] is call:
        return steps if ast.unparse(call) == returned else None
    if not _follow(module, value, call, steps):
        return None
    current = _target(start)
    for statement in statements[calls[-1] + 1 :]:
        if isinstance(statement, ast.Return):
            continue
        names = [node for node in ast.walk(statement) if isinstance(node, ast.Name) and node.id == current]
        read = [name for name in names if isinstance(name.ctx, ast.Load)]
        if not names:
            continue
        if isinstance(getattr(statement, "value", None), (ast.Tuple, ast.List, ast.IfExp, ast.BinOp)):
            continue  # what is returned is put together
        if _target(statement) is None or len(read) != 1 or not _follow(module, statement.value, read[0], steps):
            return None
        current = _target(statement)
    return steps if current == returned else None


def _reads(statement: ast.stmt) -> set[str]:
    return {node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def _is_call(node: ast.AST, function: str) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == function


def _calls(statement: ast.stmt, function: str) -> bool:
    return any(_is_call(node, function) for node in ast.walk(statement))


def _follow(module: nn.Module, value: Optional[ast.expr], inner: Optional[ast.expr], steps: dict[str, Any]) -> bool:
    """Note what ``value`` does to ``inner``; False when it is not known."""
    if value is None or inner is None:
        return False
    if value is inner:
        return True
    if not isinstance(value, ast.Call) or not value.args or steps["norm"]:
        return False
    function, argument = ast.unparse(value.func), value.args[0]
    if function == "dropout_add" and argument is inner and not steps["residual"]:
        probability = ast.unparse(value.args[2])
        steps["after"].append(probability.removeprefix("self."))
        steps["residual"] = ast.unparse(value.args[1])
        return probability.startswith("self.")
    if function in ("nn.functional.dropout", "F.dropout", "torch.nn.functional.dropout"):
        probability = next((ast.unparse(word.value) for word in value.keywords if word.arg == "p"), "")
        if not probability.startswith("self.") or steps["residual"] or not _follow(module, argument, inner, steps):
            return False
        steps["after"].append(probability.removeprefix("self."))
        return True
    step = getattr(module, function.removeprefix("self."), None) if function.startswith("self.") else None
    if isinstance(step, (nn.Dropout, nn.Identity)) and not steps["residual"]:
        known = _follow(module, argument, inner, steps)
        steps["after"].append(function.removeprefix("self."))
        return known
    if isinstance(step, nn.Module) and "Norm" in type(step).__name__ and isinstance(argument, ast.BinOp):
        if isinstance(argument.op, ast.Add) and argument.right is inner and isinstance(argument.left, ast.Name):
            steps["residual"], steps["norm"] = argument.left.id, function.removeprefix("self.")
            return True
    return False
