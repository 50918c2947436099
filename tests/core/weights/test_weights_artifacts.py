"""Files of pruned weights: packed masks, compressed models, tables and pictures."""

import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from head_pruning import HeadPruningError
from head_pruning.files import MASKS_FILE, REPORT_FILE, sort_metadata
from head_pruning.masks import HeadMask
from head_pruning.report.artifacts import write_artifacts
from head_pruning.report.weights import density_table, write_weight_artifacts
from head_pruning.weights import (
    load_compressed,
    load_weight_masks,
    pack_mask,
    save_compressed,
    save_weight_masks,
    unpack_mask,
)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_masks_take_one_bit_and_come_back(shape, random):
    mask = torch.tensor([random.random() < 0.5 for _ in range(math.prod(shape))]).view(shape)
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8 and packed.numel() == (mask.numel() + 7) // 8
    assert torch.equal(unpack_mask(packed, mask.shape), mask)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(HeadPruningError, match="packed mask of 1 bytes does not fit a tensor of shape"):
        unpack_mask(pack_mask(torch.ones(3, dtype=torch.bool)), (3, 3))


def pruned(shape: tuple[int, ...], density: float, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    weight[torch.rand(shape, generator=generator) >= density] = 0.0
    return weight


def test_a_compressed_file_is_small_and_exact(tmp_path):
    shared = pruned((64, 64), 0.1)
    state = {
        "a": pruned((300, 400), 0.1), "b.low": pruned((200, 100), 0.1, torch.bfloat16), "c": torch.randn(3, 3),
        "d": torch.arange(7), "e": shared, "f": shared, "g": torch.tensor(0.0), "h": pruned((40, 60), 0.1).t(),
        "i": torch.full((9, 9), -0.0), "j": torch.zeros(50, 50),
    }  # fmt: skip
    path = tmp_path / "model.compressed.safetensors"
    save_compressed(path, state)
    found = load_compressed(path)
    assert set(found) == set(state)
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert torch.signbit(found["i"]).all() and found["e"] is found["f"]
    save_compressed(path, {"a": state["a"]})
    assert path.stat().st_size < 0.2 * state["a"].numel() * 4


@pytest.mark.parametrize("density", [0.1, 1.0])
def test_a_compressed_file_has_shared_memory_once(tmp_path, density):
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(50, 40), "out": torch.nn.Linear(40, 50, bias=False)})
    model["out"].weight = model["embed"].weight
    weight = model["out"].weight.data.copy_(pruned((50, 40), density))
    state = {**model.state_dict(), "half": weight[:25], "flat": weight.detach().view(-1)}
    save_compressed(tmp_path / "model", state)
    found = load_compressed(tmp_path / "model")
    assert set(found) == set(state) and all(torch.equal(found[name], tensor) for name, tensor in state.items())
    save_compressed(tmp_path / "model", model.state_dict())
    once = (tmp_path / "model").stat().st_size
    assert found["embed.weight"] is found["out.weight"] and once < 1000 + (0.2 if density < 1 else 1.0) * 8000


def test_weight_files_and_report(tmp_path):
    masks = {"a.weight": pruned((10, 20), 0.3) != 0, "a.bias": torch.ones(10, dtype=torch.bool)}
    parameters = {"a.weight": masks["a.weight"].float(), "a.bias": torch.ones(10), "head": torch.ones(5)}
    write_weight_artifacts(tmp_path, masks, parameters, method="platon", options={"beta1": 0.85})
    kept = int(masks["a.weight"].sum())
    report = json.loads((tmp_path / REPORT_FILE).read_text())["weights"]
    assert report["kept_by_tensor"] == {"a.weight": [kept, 200], "a.bias": [10, 10]}
    assert report["density"] == (kept + 10) / 210 and report["nonzero_parameters"] == kept + 15
    loaded = load_weight_masks(tmp_path / MASKS_FILE)
    assert all(torch.equal(loaded[name], mask) for name, mask in masks.items())
    table = (tmp_path / "weight_density.txt").read_text()
    assert table.strip() == density_table(masks) and table.splitlines()[-1].split()[:3] == [
        "all",
        str(kept + 10),
        "210",
    ]
    assert (tmp_path / "weight_density.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(HeadPruningError, match="no weight mask yet"):
        write_weight_artifacts(tmp_path, {}, parameters, method="platon", options={})


def test_the_report_has_one_layout_whatever_was_pruned(toy, tmp_path):
    """Weights alone, heads alone, and both: the same entries, and what each kind adds."""
    unit_map = toy.make()[1]
    masks, parameters = {"w": pruned((4, 5), 0.5) != 0}, {"w": pruned((4, 5), 0.5), "b": torch.ones(3)}
    known = {"options": {"beta1": 0.85}, "history": [{"eval_loss": 1.0}], "versions": {"host": "1"}}
    write_weight_artifacts(tmp_path / "weights", masks, parameters, method="platon", **known)
    mask = HeadMask(unit_map, np.ones(unit_map.num_heads, dtype=bool))
    for folder in ("heads", "both"):
        write_artifacts(tmp_path / folder, mask, method="dsp+platon", parameters=(23, 20), **known)
    options = {"beta1": 0.85}
    write_weight_artifacts(tmp_path / "both", masks, parameters, method="platon", options=options, head_mask=mask)
    weights, heads, both = (
        json.loads((tmp_path / name / REPORT_FILE).read_text()) for name in ("weights", "heads", "both")
    )
    shared = {"method", "options", "sparsity", "history", "versions"}
    assert set(weights) == {*shared, "weights"} and set(both) == {*heads, "weights"} and shared < set(heads)
    assert weights["weights"] == both["weights"] and weights["method"] == "platon" and both["method"] == "dsp+platon"
    for name in ("options", "history", "versions"):
        assert weights[name] == heads[name] == both[name], name
    assert weights["versions"].keys() >= {"head_pruning", "torch", "host"} and weights["history"] == known["history"]
    zeros = int((parameters["w"] == 0).sum())
    assert weights["sparsity"] == {
        "parameters": 23,
        "nonzero_parameters": 23 - zeros,
        "zeros_of_all_parameters": pytest.approx(zeros / 23),
    }
    assert set(heads["sparsity"]) == {*weights["sparsity"], "heads_removed"}


def test_equal_content_gives_equal_bytes(toy, tmp_path):
    """The library writes metadata in an order of chance."""
    unit_map = toy.make()[1]
    mask = HeadMask(unit_map, np.ones(unit_map.num_heads, dtype=bool))
    state = {"a": pruned((30, 40), 0.1), "b": torch.ones(3)}
    for write in (
        lambda path: save_weight_masks(path, {"a": state["a"] != 0}, mask),
        lambda path: save_compressed(path, state),
    ):
        found = set()
        for i in range(12):
            write(tmp_path / f"file{i}")
            found.add((tmp_path / f"file{i}").read_bytes())
        assert len(found) == 1


@pytest.mark.slow
@given(st.dictionaries(st.text(max_size=9), st.text(max_size=9), min_size=1, max_size=5))
def test_sorted_metadata_reads_as_before(metadata):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        save_file({"x": torch.arange(5)}, path, metadata)
        size = path.stat().st_size
        sort_metadata(path)
        assert path.stat().st_size == size
        with safe_open(path, framework="pt") as handle:
            assert handle.metadata() == metadata and torch.equal(handle.get_tensor("x"), torch.arange(5))


def test_damaged_and_foreign_files_are_refused(tmp_path):
    (tmp_path / "bad").write_bytes(b"12345678")
    save_weight_masks(tmp_path / "masks", {"a": torch.ones(9, dtype=torch.bool)})
    save_compressed(tmp_path / "model", {"a": torch.zeros(9)})
    for read, other, words in (
        (load_weight_masks, "model", "holds no weight masks"), (load_compressed, "masks", "is no compressed model"),
    ):  # fmt: skip
        with pytest.raises(HeadPruningError, match="is damaged"):
            read(tmp_path / "bad")
        with pytest.raises(HeadPruningError, match="There is no file"):
            read(tmp_path / "absent")
        with pytest.raises(HeadPruningError, match=words):
            read(tmp_path / other)
