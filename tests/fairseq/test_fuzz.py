"""A small sample of ``make test-fuzz`` for what fairseq's side reads."""

import pytest

from tests.fuzz.fairseq_targets import FAIRSEQ
from tests.test_fuzz import check


@pytest.mark.parametrize("kind", FAIRSEQ)
def test_damaged_files_of_fairseq(kind):
    check(kind, FAIRSEQ[kind], 12)
