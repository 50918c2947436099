"""``torch.no_grad`` as a decorator that does not need torch before the first call."""

from __future__ import annotations

import functools
from typing import Callable, ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def no_grad(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function, run without recording gradients."""

    @functools.wraps(function)
    def call(*args: Arguments.args, **options: Arguments.kwargs) -> Result:
        with torch.no_grad():
            return function(*args, **options)

    return call
