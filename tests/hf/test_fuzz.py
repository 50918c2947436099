"""A small sample of ``make test-fuzz`` for what transformers' side reads."""

import pytest

from tests.fuzz.hf_targets import HF
from tests.test_fuzz import check

# Loading a whole model takes a tenth of a second.
SLOW = ("folders of models", "pickled models", "pruned_heads of transformers 4")


@pytest.mark.parametrize("kind", HF)
def test_damaged_files_of_transformers(kind):
    check(kind, HF[kind], 4 if kind in SLOW else 12)
