"""What a pass of an ONNX file takes: what the file reads, no less, and nothing that would be ignored."""

import pytest
import torch

from head_pruning import HeadPruningError
from head_pruning.inference.runtimes import onnx_pass, onnx_session

IDS = torch.arange(6).reshape(2, 3)


@pytest.fixture
def session(tmp_path):
    """Of a file that returns the one input it has."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    kind = onnx.TensorProto.INT64
    sides = [onnx.helper.make_tensor_value_info(name, kind, ["batch", "length"]) for name in ("input_ids", "same")]
    node = onnx.helper.make_node("Identity", ["input_ids"], ["same"])
    graph = onnx.helper.make_graph([node], "graph", sides[:1], sides[1:])
    opset = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), tmp_path / "model.onnx")
    return onnx_session(tmp_path / "model.onnx")


def test_what_is_the_same_everywhere_is_left_out(session):
    found = onnx_pass(session, {"input_ids": IDS, "token_type_ids": torch.zeros_like(IDS)})()
    assert torch.equal(torch.from_numpy(found[0]), IDS)


def test_what_would_be_ignored_is_refused(session):
    with pytest.raises(HeadPruningError, match="has no input token_type_ids, whose values differ.*export the model"):
        onnx_pass(session, {"input_ids": IDS, "token_type_ids": IDS % 2})


def test_what_is_missing_is_named(session):
    with pytest.raises(HeadPruningError, match="reads input_ids, too; give input_ids with the other inputs"):
        onnx_pass(session, {"attention_mask": torch.ones_like(IDS)})
