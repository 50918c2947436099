"""Which mutants are tried: the same ones for the same code, and few others after a change of it."""

import ast
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.provider import OperatorProvider

SEED = 14
_NEEDS_ARGUMENTS = ("VariableReplacer", "VariableInserter")


@dataclass(frozen=True)
class Mutant:
    """One change of one line.

    Args:
        module: path in the repository.
        line: number of the line, from 1.
        before: the line, stripped.
        after: what the change makes of it.
        operator: cosmic-ray's name of the change.
        source: the whole changed module.
    """

    module: str
    line: int
    before: str
    after: str
    operator: str
    source: str

    @property
    def key(self) -> str:
        """The same as long as the line is."""
        return f"{self.module}: {self.before} -> {self.after}"


def sample(root: Path, modules: list[str], count: int) -> list[Mutant]:
    """``count`` mutants of ``modules``, at most one of each line, in the order of the files."""
    lines = [line for module in modules for line in _lines(root, module)]
    found: list[Mutant] = []
    for _, module, choices in sorted(lines, key=lambda line: line[0]):
        if len(found) == count:
            break
        # The first that is another program; some operators give the same one or no program at all.
        made = (_make(root, module, *choice) for choice in choices)
        mutant = next((mutant for mutant in made if mutant is not None), None)
        if mutant is not None:
            found.append(mutant)
    return sorted(found, key=lambda mutant: (mutant.module, mutant.line))


def _lines(root: Path, module: str) -> Iterator[tuple[str, str, list[tuple[str, int]]]]:
    """(rank, module, [(operator, occurrence), ...] by rank) of each line where something may be changed."""
    source = (root / module).read_text(encoding="utf-8")
    lines, nodes, provider = source.splitlines(), list(ast_nodes(get_ast(source))), OperatorProvider()
    hints = _hints(source)
    at: dict[int, list[tuple[str, int]]] = {}
    known: dict[str, list[tuple[int, int]]] = {}  # line and occurrence
    for name in sorted(provider):
        if name in _NEEDS_ARGUMENTS:
            continue
        # Where an operator of arithmetic can be replaced does not depend on what takes its place.
        group = name.rpartition("_")[0] if name.startswith("ReplaceBinary") else name
        if group not in known:
            operator = provider[name]()
            places = [(node, start) for node in nodes for start, _ in operator.mutation_positions(node)]
            known[group] = [
                (start[0], occurrence)
                for occurrence, (node, start) in enumerate(places)
                if start not in hints and not _is_star(node)
            ]
        for line, occurrence in known[group]:
            at.setdefault(line, []).append((name, occurrence))
    seen: dict[str, int] = {}
    for line, choices in sorted(at.items()):
        text = lines[line - 1].strip()
        seen[text] = seen.get(text, 0) + 1
        where = f"{SEED} {module} {text} {seen[text]}"
        yield _rank(where), module, sorted(choices, key=lambda choice: _rank(f"{where} {choice}"))


def _is_star(node: Any) -> bool:
    """The star of parameters and arguments is no multiplication."""
    return getattr(node, "value", None) in ("*", "**") and node.parent.type in (
        *("parameters", "param", "star_expr", "argument", "arglist", "atom", "testlist_comp", "dictorsetmaker"),
    )


def _rank(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _hints(source: str) -> set[tuple[int, int]]:
    """Where the operators of type hints stand: nobody runs them."""
    found: set[tuple[int, int]] = set()
    for node in ast.walk(ast.parse(source)):
        for hint in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(hint, ast.expr):
                ends = range(hint.lineno, (hint.end_lineno or hint.lineno) + 1)
                found |= {
                    (line, column)
                    for line in ends
                    for column in range(hint.col_offset, (hint.end_col_offset or 0) + 1)
                }
    return found


def _make(root: Path, module: str, name: str, occurrence: int) -> "Mutant | None":
    source = (root / module).read_text(encoding="utf-8")
    changed = mutate_code(source, OperatorProvider()[name](), occurrence)
    try:
        if changed is None or ast.dump(ast.parse(changed)) == ast.dump(ast.parse(source)):
            return None
    except SyntaxError:
        return None
    # What removes a decorator removes the empty line above it, too.
    old, new = ([(i, line) for i, line in enumerate(text.splitlines(), 1) if line] for text in (source, changed))
    at = next((i for i, pair in enumerate(zip(old, new)) if pair[0][1] != pair[1][1]), min(len(old), len(new)) - 1)
    before, after = (re.sub(r"\s+", " ", each[at][1].strip()) for each in (old, new))
    return Mutant(module, old[at][0], before, after, name, changed)
