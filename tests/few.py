"""Which cases of a test run by default."""

from typing import Any, Iterable

import pytest


def few(cases: Iterable[Any], *kept: Any) -> list:
    """``kept`` run by default, and the other cases with ``make test-slow`` too."""
    cases = list(cases)
    assert all(case in cases for case in kept), kept
    return [case if case in kept else pytest.param(case, marks=pytest.mark.slow) for case in cases]
