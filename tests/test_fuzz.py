"""A small sample of ``make test-fuzz``: damaged inputs are refused in one sentence, or taken."""

import logging

import pytest

from tests.fuzz.core_targets import CORE
from tests.fuzz.run import fuzz

# The same inputs each time; the kinds of the hosts are in tests/hf and tests/fairseq.
COUNT, SEED = 25, 7


@pytest.mark.parametrize("kind", CORE)
def test_damaged_files_of_the_core(kind):
    check(kind, CORE[kind], COUNT)


def check(kind, target, count):
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        outcome = fuzz(kind, target, count, SEED)
    finally:
        logging.disable(before)
    assert not outcome.faults and outcome.inputs == count and outcome.refused > 0
    assert outcome.megabytes < 200
