"""What the mutants' lane does with a change: exchanged in a body, imported afresh elsewhere; which lines tell."""

import importlib.util

import pytest

from tests.lanes.covering import _where
from tests.lanes.swapping import new_code, swap

SOURCE = """\
LIMIT = 3


class Counter:
    step = 1

    def up(self, by=1):
        if by > LIMIT:
            return 0
        return by + self.step


def double(values):
    return [value * 2 for value in values]
"""


@pytest.mark.parametrize("before, after", [("LIMIT = 3", "LIMIT = 4"), ("step = 1", "step = 2"), ("by=1", "by=2")])
def test_what_an_import_settles_is_imported_afresh(before, after):
    assert new_code("module.py", SOURCE, SOURCE.replace(before, after)) is None


def test_a_body_is_exchanged_where_the_function_is(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(SOURCE, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("module", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    counter = module.Counter()
    changed = SOURCE.replace("by + self", "by - self").replace("value * 2", "value * 3")
    swap(str(path), new_code(str(path), SOURCE, changed))
    assert counter.up(2) == 1 and counter.up(4) == 0 and module.double([1]) == [3]


def test_lines_that_tell_whether_a_test_meets_a_change():
    assert _where(SOURCE, 8)[0] == {8}  # the condition, without what depends on it
    assert _where(SOURCE, 5)[0] == {8, 9, 10}  # of an attribute, the bodies of its class
    assert _where(SOURCE, 1)[0] == {8, 9, 10, 14}
