"""Values of options: their types, what they must be, and how an option is spelt as a flag."""

import dataclasses
import math
import numbers
from typing import Any, Callable, Optional, get_args, get_type_hints

from .errors import HeadPruningError

# A whole number will do for a float, numpy's numbers for Python's; a truth value is no number.
_TYPES: dict[type, tuple[type, str]] = {
    bool: (bool, "True or False"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    str: (str, "a text"),
}


#: Of an option that methods of several kinds have, so that one flag says the same to all.
TARGET_SPARSITY = {
    "help": "share removed at the end, 0 to 1: of weights, or by gpp of the heads and of the feed-forward units (a "
    "half unless given)",
    "once_unset": 0.0,
}


def dashed(option: str) -> str:
    """An option as a flag with dashes: ``--num-of-heads``."""
    return f"--{option.replace('_', '-')}"


def underscored(option: str) -> str:
    """An option as a flag with underscores: ``--num_of_heads``."""
    return f"--{option}"


def check_types(config: Any) -> None:
    """Raise HeadPruningError if an option's value is not of the type that its field in the dataclass says."""
    types = get_type_hints(type(config)) if dataclasses.is_dataclass(config) else {}
    for name, annotation in types.items():
        value, allowed = getattr(config, name), get_args(annotation) or (annotation,)
        wanted = next((kind for kind in allowed if kind in _TYPES), None)
        if wanted is None or value is None and type(None) in allowed:
            continue
        kind, words = _TYPES[wanted]
        if not isinstance(value, kind) or isinstance(value, bool) and wanted is not bool:
            raise HeadPruningError(f"{dashed(name)} is {value!r}; it must be {words}.")


def is_same(option: Optional[dataclasses.Field], stored: Any, value: Any) -> bool:
    """Whether an option's value is the one that a checkpoint has, which may be of an earlier version."""
    unset = (None, option.metadata.get("once_unset") if option else None)
    return stored == value or stored in unset and value in unset


def require(config: Any, option: str, holds: Callable[[float], bool], words: str) -> None:
    """Raise HeadPruningError unless ``holds`` for the option's value (NaN, infinity and other types never do).

    Args:
        config: the method's options.
        option: the name of one of them.
        holds: what is asked of its value.
        words: the same in words, after "it must be".
    """
    value = getattr(config, option)
    if not (isinstance(value, (int, float)) and math.isfinite(value) and holds(value)):
        raise HeadPruningError(f"{dashed(option)} is {value!r}; it must be {words}.")


#: What :func:`require` needs to check the share that a round of Michel et al. removes.
MACS_PER_ROUND = ("macs_per_round", lambda value: 0 < value <= 1, "a share above 0, up to 1")
