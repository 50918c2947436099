"""Heads are named by whole numbers; truth values, fractions and words are none."""

import numpy as np
import pytest
import torch

from head_pruning import AttentionSite, HeadMask, HeadPruningError, UnitMap
from head_pruning.masks import head_numbers, mask_without

MAP = UnitMap((AttentionSite("a", "encoder_self", "a", 4, 2, "a.out"),))
NO_NUMBERS = [
    [True, False, True, True],
    np.array([True, False, True, True]),
    torch.tensor([True, False]),
    [0, True],
    [1.0],
    np.array([0.5]),
    torch.tensor([1.5]),
    ["1"],
    "12",
    3,
    None,
    [None],
    [[1]],
]


@pytest.mark.parametrize("heads", NO_NUMBERS, ids=repr)
def test_what_is_no_list_of_whole_numbers_is_refused(heads):
    with pytest.raises(HeadPruningError, match="from a must be a list of integers"):
        mask_without(MAP, {"a": heads})


@pytest.mark.parametrize("heads", [[1, 3], (1, 3), {1, 3}, np.array([1, 3]), torch.tensor([1, 3]), range(1, 4, 2)])
def test_whole_numbers_of_any_library(heads):
    assert sorted(head_numbers("a", heads)) == [1, 3]
    assert mask_without(MAP, {"a": heads}).kept_heads() == {"a": [0, 2]}


@pytest.mark.parametrize("keep", [[0.5, 1, 1, 1], [float("nan")] * 4, [-1, 0, 1, 1], [2, 0, 1, 1]])
def test_masks_are_of_truth_values(keep):
    with pytest.raises(HeadPruningError, match="entries other than true and false"):
        HeadMask(MAP, np.array(keep))
    assert HeadMask(MAP, np.array([1.0, 0.0, 1.0, 1.0])).kept == 3
