"""What a value out of a file may be: a small language of shapes, and the check of a value against one.

A shape is

- a type: ``str``, ``bool``, ``dict``, ``list``, ``int`` (no truth value), ``object`` for anything; or ``None``;
- :class:`Whole` or :class:`Number`, for numbers of a range;
- ``[shape]``, a list of any length; ``(shape, shape)``, a list of exactly these; ``(shape, ..., Rest(shape))``, a list
  that goes on with any number of the last;
- ``{str: shape}``, names with values of one shape; ``{"name": shape, "name?": shape}``, such names, the latter may be
  missing, others are not looked at;
- :class:`Either`, one of several.

A value is followed no deeper than its shape goes. A copy of this file lies in every compact folder: it imports nothing
but the standard library.
"""

import math
from typing import Any, NamedTuple

#: No count, size or statistic of a model is larger; floats tell whole numbers up to here apart.
LARGEST = 1e15


class Whole(NamedTuple):
    """A whole number; a float is none, also where it is whole."""

    low: float = 0
    high: float = LARGEST


class Number(NamedTuple):
    """A finite number."""

    low: float = -LARGEST
    high: float = LARGEST


class Rest(NamedTuple):
    """All that is left of a list."""

    shape: Any


class Either:
    """A value of one of several shapes."""

    def __init__(self, *shapes: Any) -> None:
        self.shapes = shapes


FLAG = Whole(0, 1)
STEP = Whole(-1)  # -1: not settled yet


def conform(value: Any, shape: Any, where: str = "it") -> Any:
    """The value. Raises ValueError, naming the place and what is wrong there, unless it is of the shape."""
    if isinstance(shape, (Whole, Number)):
        _check_number(value, shape, where)
    elif isinstance(shape, Either):
        _check_either(value, shape, where)
    elif isinstance(shape, list):
        _check_type(value, list, where)
        for place, entry in enumerate(value):
            conform(entry, shape[0], f"{where}[{place}]")
    elif isinstance(shape, tuple):
        _check_type(value, list, where)
        rest = shape[-1] if shape and isinstance(shape[-1], Rest) else None
        first = shape if rest is None else shape[:-1]
        if len(value) < len(first) or rest is None and len(value) > len(first):
            raise ValueError(f"{where} has {len(value)} entries, not {len(first)}{' or more' if rest else ''}")
        for place, entry in enumerate(value):
            conform(entry, first[place] if place < len(first) else rest.shape, f"{where}[{place}]")  # type: ignore
    elif isinstance(shape, dict):
        _check_names(value, shape, where)
    elif shape is None:
        if value is not None:
            raise ValueError(f"{where} is {_shown(value)}, not null")
    else:
        _check_type(value, shape, where)
    return value


def _check_number(value: Any, shape: Any, where: str) -> None:
    words = "whole number" if isinstance(shape, Whole) else "finite number"
    kinds: Any = int if isinstance(shape, Whole) else (int, float)
    number = isinstance(value, kinds) and not isinstance(value, bool)
    if not number or isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {_shown(value)}, not a {words}")
    if not shape.low <= value <= shape.high:
        raise ValueError(f"{where} is {_shown(value)}, not from {shape.low:g} to {shape.high:g}")


def _check_either(value: Any, shape: Either, where: str) -> None:
    reason: Any = None  # what is wrong inside of the first whose type it has
    for each in shape.shapes:
        try:
            conform(value, each, where)
            return
        except ValueError as error:
            if reason is None and any(_of_type(value, kinds) for kinds in _types(each).values()):
                reason = error
    if reason is None:
        *most, last = _types(shape)
        reason = ValueError(f"{where} is {_shown(value)}, not of the type {', '.join(most)} or {last}")
    raise reason


def _types(shape: Any) -> dict[str, tuple]:
    """What a value of this shape is before one looks into it: the word for it to its types."""
    if isinstance(shape, Either):
        return {word: kinds for each in shape.shapes for word, kinds in _types(each).items()}
    if isinstance(shape, (Whole, Number)):
        return {"whole number": (int,)} if isinstance(shape, Whole) else {"number": (int, float)}
    if shape is None:
        return {"null": (type(None),)}
    kind = shape if isinstance(shape, type) else list if isinstance(shape, (list, tuple)) else dict
    return {kind.__name__: (list, tuple) if kind is list else (kind,)}


def _of_type(value: Any, kinds: tuple) -> bool:
    return isinstance(value, kinds) and not (int in kinds and isinstance(value, bool))


def _check_names(value: Any, shape: dict, where: str) -> None:
    _check_type(value, dict, where)
    if str in shape:
        for name, entry in value.items():
            _check_type(name, str, f"a name in {where}")
            conform(entry, shape[str], f"{where}.{name:.80}")
        return
    for name, each in shape.items():
        plain = name.removesuffix("?")
        if plain in value:
            conform(value[plain], each, f"{where}.{plain}")
        elif plain == name:
            raise ValueError(f"{where} has no {name}")


def _check_type(value: Any, kind: type, where: str) -> None:
    if not _of_type(value, _types(kind)[kind.__name__]):
        raise ValueError(f"{where} is {_shown(value)}, not of the type {kind.__name__}")


def _shown(value: Any) -> str:
    """A value for a sentence: what is inside lists and mappings does not matter, and may be deep or long."""
    if isinstance(value, (list, tuple, dict)):
        return f"a {type(value).__name__} of {len(value)} entries"
    return f"{value!r:.40}" if not isinstance(value, int) or abs(value) < LARGEST else "a huge number"
