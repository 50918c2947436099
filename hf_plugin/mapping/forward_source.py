"""What a module's forward does with its output projection and what it returns, read from its source.

Attention without heads is a constant, but only its class's code says what happens to that constant on the way out.
What cannot be read here keeps a dummy head instead.
"""

import ast
import functools
import inspect
import re
from dataclasses import dataclass
from typing import Any, Optional

from torch import nn

from head_pruning.compact.no_heads import bias_maker
from head_pruning.compact.returned import (
    assigned_name,
    parsed_forward,
    placed,
    return_options,
    returned_values,
    statements_of,
)

# Arguments with the keys and values of earlier tokens, and attributes that say which of a cache's layers a module is.
CACHES = ("past_key_values", "past_key_value", "layer_past", "cache")
CACHE_LAYERS = ("layer_idx", "layer_id")
# Sequences that one module attends from side by side.
SIDE_BY_SIDE = (("word_hidden_states", "entity_hidden_states"), ("token_hidden_states", "global_hidden_states"))
# As CACHES, of modules whose tensors have the tokens first and the examples second.
TOKENS_FIRST_CACHE = "layer_state"
# The attribute with the number of streams behind the first in a module's input, and where the output projections of
# the first and the others are put together.
STREAMS = "ngram"
JOINED = re.compile(r"\w+ = torch\.cat\(\[(\w+(?:, \w+)*)\], 1\)\.view\(batch_size, -1, hidden_size\)")


@dataclass(frozen=True)
class Forward:
    """The source of a module's class: its text, and the tree and parameters of its forward."""

    text: str
    tree: Optional[ast.FunctionDef]
    parameters: tuple[str, ...]

    def where(self, name: str) -> list:
        """An argument as the recipes give it: name and position."""
        return placed([name], self.parameters)


def read_forward(kind: type) -> Forward:
    """What is known of a class's code; empty when its source is not at hand."""
    return _read_forward(kind)


@functools.cache
def _read_forward(kind: type) -> Forward:
    parameters, tree = parsed_forward(kind)
    try:
        text = inspect.getsource(kind)
    except (OSError, TypeError):
        return Forward("", None, parameters)
    start = text.find("def __init__")
    end = text.find("\n    def ", start + 1)
    without_init = text[:start] + text[end:] if start >= 0 and end >= 0 else text
    return Forward(without_init, tree, parameters)


def names_in(text: str, owner: str) -> set[str]:
    """The attributes of ``owner`` that a text reads."""
    return set(re.findall(rf"\b{re.escape(owner)}\.(\w+)", text))


def without_heads(
    module: nn.Module, out: Optional[str], drop: list[str], kind: str, bias: Optional[str] = None
) -> Optional[dict[str, Any]]:
    """The options of :class:`head_pruning.compact.NoHeads` for an attention module, or None when they are not known.

    Args:
        module: the module that holds the projections.
        out: the output projection within it, or None when it lies outside.
        drop: names of the modules and parameters that go.
        kind: the site's; caches are for decoders.
        bias: the argument with a position bias that the module makes where it gets none, and hands on.
    """
    forward = read_forward(type(module))
    counted = kind == "decoder_self"
    # I-BERT returns tuples in tuples and keeps a dummy: when it quantizes, its output projection takes the largest and
    # smallest of a row's weights, and needs one.
    returned = None if forward.tree is None else returned_values(forward.tree)
    if forward.tree is None or returned is None:
        return None
    options: dict[str, Any] = {"inputs": [forward.where(forward.parameters[0])], "out": out, "after": []}
    side_by_side = next((names for names in SIDE_BY_SIDE if set(names) <= set(forward.parameters)), None)
    if side_by_side is not None:
        options["inputs"] = [forward.where(name) for name in side_by_side]
    elif out is not None:
        steps = _after(module, forward.tree, out, returned[0])
        if steps is None:
            return None
        options.update(steps)
        if steps["residual"]:
            options["residual"] = forward.where(steps["residual"])
    options.update(return_options(forward.parameters, returned, len(options["inputs"])), drop=drop, versions=True)
    if TOKENS_FIRST_CACHE in forward.parameters:
        options["tokens_first"] = True
    if bias is not None:
        options["bias"] = forward.where(bias)
        if bias_maker(type(module)) is None or options["bias"] not in (options["returns"] or ()):
            return None
    cache = next((name for name in (*CACHES, TOKENS_FIRST_CACHE) if name in forward.parameters), None)
    if cache is not None and (counted or kind == "decoder_cross"):
        layer = next((name for name in CACHE_LAYERS if isinstance(getattr(module, name, None), int)), None)
        if layer is None:
            return None
        options["cache"] = [*forward.where(cache), layer, not counted]
        if isinstance(getattr(module, STREAMS, None), int):
            options["streams"] = STREAMS
    return options


def _after(module: nn.Module, tree: ast.FunctionDef, out: str, returned: str) -> Optional[dict[str, Any]]:
    """What runs on the output projection's output until it is returned as ``returned``; None when it is not known."""
    ways: list[list[ast.stmt]] = [[]]  # the statements up to each return
    for statement in statements_of(tree.body):
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
    joined = _joined(statements, out)
    if joined is not None:
        return _rest(module, statements, joined, returned, steps)
    start = statements[calls[-1]]
    for statement in statements[calls[0] + 1 : calls[-1] + 1]:  # branches that each call it
        if assigned_name(start) is None or assigned_name(start) in _reads(statement):
            return None
        if assigned_name(statement) == assigned_name(start):
            break
    value = start.value if isinstance(start, (ast.Assign, ast.Return)) else None
    found = (node for node in ast.walk(start) if isinstance(node, ast.Call))
    call = next((node for node in found if _is_call(node, f"self.{out}")), None)
    if call is None:
        return None
    if isinstance(value, ast.Tuple) and value.elts and value.elts[0] is call:
        return steps if ast.unparse(call) == returned else None
    if not _follow(module, value, call, steps):
        return None
    return _rest(module, statements, calls[-1], returned, steps)


def _joined(statements: list[ast.stmt], out: str) -> Optional[int]:
    """Which statement puts several outputs of the output projection together, token after token; None: none does."""
    latest: dict[Optional[str], bool] = {}  # whether what a name has is an output
    for number, statement in enumerate(statements):
        names = JOINED.fullmatch(ast.unparse(statement))
        if names and all(latest.get(name) for name in names[1].split(", ")):
            return number
        latest[assigned_name(statement)] = isinstance(statement, ast.Assign) and _is_call(
            statement.value, f"self.{out}"
        )
    return None


def _rest(
    module: nn.Module, statements: list[ast.stmt], start: int, returned: str, steps: dict[str, Any]
) -> Optional[dict[str, Any]]:
    """``steps`` with what runs on the name assigned by the statement ``start``; None when it is not known."""
    current = assigned_name(statements[start])
    for statement in statements[start + 1 :]:
        if isinstance(statement, ast.Return):
            continue
        names = [node for node in ast.walk(statement) if isinstance(node, ast.Name) and node.id == current]
        read = [name for name in names if isinstance(name.ctx, ast.Load)]
        if not names:
            continue
        if isinstance(getattr(statement, "value", None), (ast.Tuple, ast.List, ast.IfExp, ast.BinOp)):
            continue  # what is returned is put together
        value = getattr(statement, "value", None)
        if assigned_name(statement) is None or len(read) != 1 or not _follow(module, value, read[0], steps):
            return None
        current = assigned_name(statement)
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
