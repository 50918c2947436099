"""What a module's forward returns, read from its source: it differs between versions of transformers.

Attention without heads is a constant, but only its class's code tells what comes back beside that constant. Imports
nothing but the standard library: a copy of this file lies in every compact folder.
"""

import ast
import inspect
import re
import textwrap
from typing import Any, Iterator, Optional, Sequence

ATTENTIONS = re.compile("att_|attn|attention|prob|weights")  # what attentions are called

# The first value, the names of the others (None: it is bare), how many more there are with attentions, whether it is a
# list.
Returned = tuple[str, Optional[list[str]], int, bool]


def parsed_forward(kind: Any) -> tuple[tuple[str, ...], Optional[ast.FunctionDef]]:
    """The names of a forward's parameters, and its tree; None when the source is not at hand."""
    function = inspect.unwrap(kind.forward)
    parameters = tuple(inspect.signature(function).parameters)[1:]
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return parameters, None
    return parameters, tree if isinstance(tree, ast.FunctionDef) else None


def statements_of(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The simple statements of a function in order, those of nested functions left out."""
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            continue
        inner = [getattr(statement, part, []) for part in ("body", "orelse", "finalbody")]
        if any(inner):
            for part in inner:
                yield from statements_of(part)
        else:
            yield statement


def assigned_name(statement: ast.stmt) -> Optional[str]:
    """The one name that a statement assigns to, or None."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        if isinstance(statement.targets[0], ast.Name):
            return statement.targets[0].id
    return None


def returned_values(tree: ast.FunctionDef) -> Optional[Returned]:
    """What a forward returns. None where the returns differ or cannot be read."""
    statements = list(statements_of(tree.body))
    assigned: dict[str, list[ast.expr]] = {}
    for statement in statements:
        name = assigned_name(statement)
        if name and isinstance(statement, ast.Assign):
            assigned.setdefault(name, []).append(statement.value)
        elif isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name):
            if statement.target.id in assigned and isinstance(statement.value, ast.Tuple):
                assigned[statement.target.id].append(statement.value)

    def elements(value: ast.expr) -> Optional[tuple[list[ast.expr], int, bool]]:
        """The values without attentions, how many more there are with them, and whether it is a list."""
        if isinstance(value, (ast.Tuple, ast.List)):
            return value.elts, 0, isinstance(value, ast.List)
        if isinstance(value, ast.IfExp):
            less, more = elements(value.orelse), elements(value.body)
            return less and more and (less[0], max(less[1], len(more[0]) + more[1] - len(less[0])), less[2])
        if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
            less, more = elements(value.left), elements(value.right)
            return less and (less[0], less[1] + (len(more[0]) if more else 1), less[2])
        if isinstance(value, ast.Name) and value.id in assigned:
            found = elements(assigned[value.id][0])
            return found and (found[0], found[1] + len(assigned[value.id]) - 1, found[2])
        return None

    found: set[tuple[str, Optional[tuple[str, ...]], int, bool]] = set()
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
    name, more, attentions, as_list = min(found)
    if more is None:
        return name, None, attentions, as_list
    # What one return gives as None has its name in another.
    places = zip(*(names for _, names, *_ in found))
    return name, [next((n for n in names if n != "None"), "None") for names in places], attentions, as_list


def return_options(parameters: Sequence[str], returned: Returned, constants: int) -> dict[str, Any]:
    """How :class:`head_pruning.compact.NoHeads` is told what to return.

    Args:
        parameters: of the forward.
        returned: what it returns.
        constants: how many of the first values are constants, one for each sequence that attends.
    """
    _, others, attentions, as_list = returned
    asks, named = "output_attentions", (others or ())[constants - 1 :]
    passed = [placed([name], parameters) if name in parameters else None for name in named]
    weights = [place for place, name in enumerate(named) if passed[place] is None and ATTENTIONS.search(name)]
    weights += range(len(named), len(named) + attentions)
    return {
        "returns": None if others is None else passed,
        "attentions": [placed([asks], parameters) if asks in parameters else None, attentions],
        "weights": weights,
        **({"list": True} if as_list else {}),
    }


def placed(where: Sequence[Any], parameters: Sequence[str]) -> list:
    """An argument as the recipes give it, name and position and maybe more, with its position in this forward."""
    name, *more = where
    return [name, parameters.index(name) if name in parameters else None, *more[1:]]
