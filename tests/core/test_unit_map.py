"""Unit maps, head masks and their files."""

import json
import os
import stat

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from head_pruning import AttentionSite, FeedForwardSite, HeadMask, HeadPruningError, UnitMap, full_mask
from head_pruning.files import atomic_path, read_safetensors, write_json, write_safetensors
from head_pruning.masks import mask_without
from head_pruning.report import head_table
from head_pruning.report.artifacts import write_artifacts


def site(name: str, heads: int, kind: str = "encoder_self") -> AttentionSite:
    return AttentionSite(
        name, kind, f"layer of {name}", heads, 2, f"{name}.out", (f"{name}.q", f"{name}.k", f"{name}.v")
    )


@pytest.fixture
def unit_map() -> UnitMap:
    """Uneven sites: 2 + 3 + 1 heads."""
    feed_forward = (FeedForwardSite("ffn", "layer of a", 8, "fc1", "fc2"),)
    return UnitMap((site("a", 2), site("b", 3, "decoder_cross"), site("c", 1)), feed_forward)


def test_heads_are_numbered_site_after_site(unit_map):
    assert unit_map.num_heads == 6
    assert [row.tolist() for row in unit_map.rows()] == [[0, 1], [2, 3, 4], [5]]
    assert {kind: heads.tolist() for kind, heads in unit_map.kinds().items()} == {
        "encoder_self": [0, 1, 5],
        "decoder_cross": [2, 3, 4],
    }
    assert unit_map.layers == ("layer of a", "layer of b", "layer of c")
    assert {name: values.tolist() for name, values in unit_map.by_site(np.arange(6)).items()} == {
        "a": [0, 1],
        "b": [2, 3, 4],
        "c": [5],
    }


def test_a_map_survives_json(unit_map):
    assert UnitMap.from_dict(json.loads(json.dumps(unit_map.to_dict()))) == unit_map


def test_empty_and_double_maps_are_refused():
    with pytest.raises(HeadPruningError, match="no attention module"):
        UnitMap(())
    with pytest.raises(HeadPruningError, match="names a twice"):
        UnitMap((site("a", 2), site("b", 2), site("a", 2)))


def test_maps_of_other_architectures_are_told_apart(unit_map):
    unit_map.check_same_heads(UnitMap(unit_map.attention), "It")  # feed-forward blocks have no heads
    with pytest.raises(HeadPruningError, match="It belongs to another architecture .*differ in b"):
        unit_map.check_same_heads(UnitMap((site("a", 2), site("b", 4), site("c", 1))), "It")
    with pytest.raises(HeadPruningError, match="the order of the sites"):
        unit_map.check_same_heads(UnitMap(unit_map.attention[::-1]), "It")


def test_a_mask_says_what_stays(unit_map):
    mask = HeadMask(unit_map, [[1, 0, 1], [0, 0, 1]])
    assert mask.kept == 3
    assert mask.by_site() == {"a": [True, False], "b": [True, False, False], "c": [True]}
    assert mask.kept_heads() == {"a": [0], "b": [0], "c": [0]}
    assert mask == mask_without(unit_map, {"a": [1], "b": [1, 2]}) != full_mask(unit_map)
    assert mask_without(unit_map, {"c": [0]}, base=mask).kept == 2 and mask.kept == 3
    assert str(mask) == "3 of 6 heads stay; a: 0; b: 0; c: 0"
    lines = head_table(mask).splitlines()
    assert [line.split() for line in lines[2:]] == [
        ["a", "#.", "1/2"],
        ["b", "#..", "1/3"],
        ["c", "#", "1/1"],
        ["all", "3/6"],
    ]


@pytest.mark.parametrize("removed, words", [({"d": [0]}, "no site d; the map has a, b, c"),
                                            ({"b": [3]}, "b has heads 0 to 2; 3 is not"),
                                            ({"b": [-1]}, "-1 is not")])  # fmt: skip
def test_removing_what_is_not_there_is_refused(unit_map, removed, words):
    with pytest.raises(HeadPruningError, match=words):
        mask_without(unit_map, removed)


def test_a_mask_must_have_the_models_size(unit_map):
    with pytest.raises(HeadPruningError, match="5 entries but the model has 6 heads"):
        HeadMask(unit_map, np.ones(5))


def with_prefix(unit_map: UnitMap, prefix: str) -> UnitMap:
    return UnitMap(tuple(site(prefix + each.name, each.heads, each.kind) for each in unit_map.attention))


@pytest.mark.parametrize("mine, theirs", [("", "bert."), ("bert.", ""), ("a.", "a.b.a."), ("", "")])
def test_a_mask_fits_a_model_with_and_without_a_prefix(unit_map, mine, theirs):
    mask = HeadMask(with_prefix(unit_map, mine), [1, 0, 1, 0, 0, 1])
    other = with_prefix(unit_map, theirs)
    assert mask.fits(other) and mask.fitted(other).kept_heads() == {
        f"{theirs}a": [0],
        f"{theirs}b": [0],
        f"{theirs}c": [0],
    }
    overlap = mask.compare(HeadMask(other, [1, 1, 1, 0, 0, 0]))
    assert (overlap["both"], overlap["only_first"], overlap["only_second"]) == (2, 1, 1)


@pytest.mark.parametrize(
    "names, heads",
    [
        (("bert.a", "bert.b", "c"), (2, 3, 1)),  # not all of them
        (("x.a", "y.b", "x.c"), (2, 3, 1)),
        (("xa", "xb", "xc"), (2, 3, 1)),  # no dotted prefix
        (("x.a", "x.b", "x.c"), (2, 4, 1)),
        (("x.a", "x.c", "x.b"), (2, 1, 3)),
        (("x.a", "x.b"), (2, 3)),
        (("x.a", "x.b", "x.c", "x.d"), (2, 3, 1, 1)),
    ],
)
def test_a_mask_of_another_architecture_does_not_fit(unit_map, names, heads):
    other = UnitMap(tuple(site(name, size) for name, size in zip(names, heads)))
    for mask, sites in ((full_mask(other), unit_map), (full_mask(unit_map), other)):
        assert not mask.fits(sites)
        with pytest.raises(HeadPruningError, match="The head mask belongs to another architecture .*differ in"):
            mask.fitted(sites)


@given(st.lists(st.booleans(), min_size=6, max_size=6), st.lists(st.booleans(), min_size=6, max_size=6))
def test_comparison_counts_heads(one, two):
    unit_map = UnitMap((site("a", 2), site("b", 4)))
    first, second = HeadMask(unit_map, one), HeadMask(unit_map, two)
    overlap = first.compare(second)
    both = sum(x and y for x, y in zip(one, two))
    assert overlap["both"] == both and overlap["only_first"] == sum(one) - both
    assert overlap["only_second"] == sum(two) - both
    either = sum(x or y for x, y in zip(one, two))
    assert overlap["jaccard"] == (both / either if either else 1.0)
    assert (overlap["jaccard"] == 1.0) == (first == second)


def test_comparison_of_two_models_is_refused(unit_map):
    with pytest.raises(HeadPruningError, match="The other mask belongs to another architecture"):
        full_mask(unit_map).compare(full_mask(UnitMap((site("x", 6),))))


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [[1, 0, 1, 0, 0, 1], [0] * 6, [1] * 6])
def test_a_saved_mask_comes_back(unit_map, tmp_path, keep):
    path = tmp_path / "new folder" / "masks.safetensors"
    mask = HeadMask(unit_map, keep)
    mask.save(path)
    loaded = HeadMask.load(path)
    assert loaded == mask and loaded.unit_map == unit_map
    assert [entry.name for entry in path.parent.iterdir()] == ["masks.safetensors"]
    tensors, _ = read_safetensors(path)
    assert tensors["heads.b"].tolist() == keep[2:5] and tensors["heads.b"].dtype == np.uint8


def test_missing_and_damaged_masks_are_refused(unit_map, tmp_path):
    path = tmp_path / "masks.safetensors"
    with pytest.raises(HeadPruningError, match="There is no file .*masks.safetensors"):
        HeadMask.load(path)
    full_mask(unit_map).save(path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-1], b"", b"\x80\x04pickle", os.urandom(64)):
        path.write_bytes(damaged)
        with pytest.raises(HeadPruningError, match="is damaged .*write it again"):
            HeadMask.load(path)


@pytest.mark.parametrize("metadata", [{}, {"unit_map": "{"}, {"unit_map": "[]"}, {"unit_map": '{"attention": []}'},
                                      {"unit_map": '{"attention": [{"name": "a"}], "feed_forward": []}'}])  # fmt: skip
def test_a_file_that_is_no_mask_is_refused(tmp_path, metadata):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"heads.a": np.ones(2, dtype=np.uint8)}, metadata)
    with pytest.raises(HeadPruningError, match="is not a head mask"):
        HeadMask.load(path)


def test_a_mask_whose_tensors_do_not_fit_its_map_is_refused(unit_map, tmp_path):
    path = tmp_path / "x.safetensors"
    metadata = {"unit_map": json.dumps(unit_map.to_dict())}
    write_safetensors(path, {"heads.a": np.ones(2, dtype=np.uint8)}, metadata)
    with pytest.raises(HeadPruningError, match="is not a head mask .*heads.b"):
        HeadMask.load(path)
    sizes = {"heads.a": 3, "heads.b": 2, "heads.c": 1}  # six in all, but not where they belong
    write_safetensors(path, {name: np.ones(size, dtype=np.uint8) for name, size in sizes.items()}, metadata)
    with pytest.raises(HeadPruningError, match="is not a head mask"):
        HeadMask.load(path)


def test_atomic_path_leaves_nothing_behind_on_failure(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="halfway"), atomic_path(path) as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".txt"
        temporary.write_text("new, but not whole")
        raise RuntimeError("halfway")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"] and path.read_text() == "old"


def test_atomic_path_replaces_whole_and_with_the_usual_mode(tmp_path):
    path = tmp_path / "file.json"
    path.write_text("old")
    write_json(path, {"b": 1, "a": [2]})
    assert json.loads(path.read_text()) == {"b": 1, "a": [2]}
    (tmp_path / "plain").write_text("")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file.json", "plain"]
    assert json.loads(path.read_text()) == {"b": 1, "a": [2]}


def test_artifacts_say_what_was_kept(unit_map, tmp_path):
    mask = mask_without(unit_map, {"b": [0, 1]})
    write_artifacts(
        tmp_path, mask, method="dsp", options={"num_of_heads": 4}, parameters=(200, 150), versions={"host": "1"}
    )
    report = json.loads((tmp_path / "pruning.json").read_text())
    assert report["kept_heads_by_site"] == {"a": [0, 1], "b": [2], "c": [0]}
    assert (report["heads_kept"], report["heads_total"], report["method"]) == (4, 6, "dsp")
    assert report["sparsity"]["heads_removed"] == pytest.approx(1 / 3)
    assert report["sparsity"]["zeros_of_all_parameters"] == 0.25
    assert report["versions"]["host"] == "1" and report["options"] == {"num_of_heads": 4}
    assert HeadMask.load(tmp_path / "masks.safetensors") == mask
