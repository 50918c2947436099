"""What files claim is checked before memory is asked for, and what they hold before it is used."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from head_pruning import HeadMask, HeadPruningError, UnitMap
from head_pruning.compact.shapes import Either, Number, Rest, Whole, conform
from head_pruning.files import read_json
from head_pruning.old_masks import read_old_mask
from head_pruning.pickled import load_pickled
from head_pruning.report.report_file import read_report
from head_pruning.weights import load_compressed, load_weight_masks
from tests.fuzz.core_targets import MASK, SITES
from tests.fuzz.watch import bounded_memory


@pytest.mark.parametrize(
    "value, shape, words",
    [
        (True, Whole(), "it is True, not a whole number"),
        (3.0, Whole(), "not a whole number"),
        (-1, Whole(), "not from 0"),
        (10**18, Number(), "a huge number, not from"),
        (math.nan, Number(), "not a finite number"),
        ({"a": [1, "x"]}, {"a": [int]}, r"it.a\[1\] is 'x', not of the type int"),
        ([1], (int, int), "has 1 entries, not 2"),
        ([], (int, Rest(str)), "has 0 entries, not 1 or more"),
        ({}, {"a": int, "b?": str}, "it has no a"),
        ({"a": 1, "b": 2}, {"a": int, "b?": str}, "it.b is 2"),
        ({5: 1}, {str: int}, "a name in it is 5"),
        ("x", Either(None, int), "it is 'x', not of the type null or int$"),
        (3, Either(str, [str]), "it is 3, not of the type str or list$"),
        ([None], Either([Either(str, int, Number())], str), r"it\[0\] is None, not of the type str, int or number$"),
        ({"a": {"b": []}}, {"a": Either(str, {str: Either(None, Whole())})}, "it.a.b is a list of 0 .* null or whole"),
        (-1, Either(str, Whole()), "it is -1, not from 0"),
        (True, Either(str, Whole()), "it is True, not of the type str or whole number$"),
    ],
)
def test_what_is_of_another_shape_is_told_with_its_place(value, shape, words):
    with pytest.raises(ValueError, match=words):
        conform(value, shape)


def test_what_is_of_the_shape_is_handed_on():
    value = {"a": [1, 2.5, None], "b": (3, "x", "y"), "more": object()}
    assert conform(value, {"a": [Either(None, Number())], "b": (int, Rest(str)), "c?": str}) is value


@pytest.mark.parametrize(
    "text, words",
    [
        ("[" * 1000 + "]" * 1000, "nested too deeply"),
        ("{", "damaged"),
        ('{"weights": 5}', "weights is 5"),
        ("\xff", "damaged"),
    ]
    + [("\xff", "damaged"), ('{"options": [1, 2]}', "options is a list")]
    + [('{"weights": {"density": NaN}}', "not a finite")],
)
def test_a_damaged_report(tmp_path, text, words):
    path = tmp_path / "pruning.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(HeadPruningError, match=words):
        read_report(path)
    assert read_report(tmp_path / "none.json") == {}
    with pytest.raises(HeadPruningError, match="There is no file"):
        read_json(tmp_path / "none.json")


def test_sizes_that_only_a_file_claims(tmp_path):
    small = {"mask.a": torch.zeros(1, dtype=torch.uint8), "values.a": torch.zeros(0)}
    told = {"compressed": json.dumps({"a": [131072, 8192]}), "aliases": "{}", "weight_shapes": '{"a": [131072, 8192]}'}
    save_file({**small, "weights.a": small["mask.a"].clone()}, tmp_path / "small.safetensors", told)
    torch.save(torch.ones(1).expand(10**5, 10**4), tmp_path / "old.pt")
    site = {**SITES.to_dict()["attention"][0], "heads": 8 * 10**8}
    save_file({}, tmp_path / "mask.safetensors", {"unit_map": json.dumps({"attention": [site], "feed_forward": []})})
    with bounded_memory():
        for read in (load_compressed, load_weight_masks):
            with pytest.raises(HeadPruningError, match="does not fit a tensor of shape"):
                read(tmp_path / "small.safetensors")
        with pytest.raises(HeadPruningError, match="it claims a tensor of the shape"):
            read_old_mask(tmp_path / "old.pt", SITES)
        with pytest.raises(HeadPruningError, match="800000000, not from 0"):
            HeadMask.load(tmp_path / "mask.safetensors")
        with pytest.raises(HeadPruningError, match="more than any model"):
            UnitMap(tuple(type(MASK.unit_map.attention[0])(**{**site, "projections": ()}) for _ in range(1)))


@pytest.mark.parametrize("value", [torch.full((3, 4), math.nan), torch.ones(3, 4).to_sparse(), {"a": 1}, 5])
def test_old_masks_of_something_else(tmp_path, value):
    torch.save(value, tmp_path / "mask.pt")
    with pytest.raises(HeadPruningError):
        read_old_mask(tmp_path / "mask.pt", SITES)
    torch.save(torch.ones(3, 4, dtype=torch.bfloat16), tmp_path / "mask.pt")
    assert read_old_mask(tmp_path / "mask.pt", SITES).kept == 12


def test_a_head_mask_with_nan(tmp_path):
    MASK.save(tmp_path / "mask.safetensors")
    told = {"unit_map": json.dumps(SITES.to_dict())}
    for bad in (torch.full((4,), math.nan), torch.full((4,), math.nan, dtype=torch.bfloat16), torch.ones(2, 2) * 7):
        save_file({f"heads.{site.name}": bad.clone() for site in SITES.attention}, tmp_path / "mask.safetensors", told)
        with pytest.raises(HeadPruningError, match="mask.safetensors is (not a head mask|damaged)"):
            HeadMask.load(tmp_path / "mask.safetensors")
    assert not np.isnan(MASK.keep).any()


class Code:
    """Pickled, it makes a file."""

    def __reduce__(self):
        return open, ("ran", "w")


@pytest.mark.parametrize("new", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path, monkeypatch, new):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Code()}, "code.pt", _use_new_zipfile_serialization=new)
    with pytest.raises(HeadPruningError, match="holds code, of which nothing was run") as told:
        load_pickled("code.pt")
    assert "weights_only" not in str(told.value) and not (tmp_path / "ran").exists()


def test_what_a_refusal_quotes_breaks_no_line_and_obeys_no_terminal():
    assert str(HeadPruningError("of update c\x1d\x85\u2028\x1b[2J\r here,\nthe lines\tof ours")) == (
        "of update c\\x1d\\x85\\u2028\\x1b[2J\\r here,\nthe lines\\tof ours"
    )
