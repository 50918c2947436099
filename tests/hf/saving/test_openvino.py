"""Models for OpenVINO: what lies in the ONNX file that it reads, what it computes, and what is refused."""

import sys

import pytest
import torch

from head_pruning.cli import main
from hf_plugin import prune_heads, save_compact, unit_map
from tests.hf.tiny import collate, sentences
from tests.hf.training.test_quantization import student, trainer_of


@pytest.fixture(scope="module")
def compact(tmp_path_factory):
    """A model with a layer without heads and one without units, and its folder."""
    model = student().eval()
    block = unit_map(model).feed_forward[0]
    prune_heads(model, {0: [1, 2], 1: [0, 1, 2, 3], block.name: range(block.width)})
    folder = tmp_path_factory.mktemp("models") / "compact"
    save_compact(model, folder)
    return model, folder


def batch():
    found = collate(sentences(64, seed=5))
    found.pop("labels")
    return {**found, "token_type_ids": found["input_ids"] % 2}


def expected(model):
    with torch.no_grad():
        return model.eval()(**batch()).logits


@pytest.mark.slow
def test_nothing_without_elements_lies_in_an_onnx_file(compact, tmp_path):
    """OpenVINO takes weights without columns for one number."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript", reason="needs onnx")
    main(["export", str(compact[1]), str(tmp_path / "model.onnx"), "--to", "onnx"])
    graph = onnx.load(tmp_path / "model.onnx").graph
    tensors = [*graph.initializer, *(a.t for node in graph.node for a in node.attribute if node.op_type == "Constant")]
    assert tensors and not any(0 in tensor.dims for tensor in tensors)


def run(file):
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(file, "CPU", options)
    inputs = batch()
    return torch.from_numpy(compiled({i.any_name: inputs[i.any_name].numpy() for i in compiled.inputs})["logits"])


def test_openvino_computes_what_torch_does(compact, tmp_path, capsys):
    pytest.importorskip("openvino", reason="needs openvino")
    model, folder = compact
    main(["export", str(folder), str(tmp_path / "model.xml"), "--to", "openvino"])
    assert float(capsys.readouterr().out.partition("difference between OpenVINO and torch ")[2]) < 1e-5
    torch.testing.assert_close(run(tmp_path / "model.xml"), expected(model), rtol=0, atol=1e-5)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".bin", ".xml"]


@pytest.mark.slow
def test_openvino_computes_with_8_bits(tmp_path):
    pytest.importorskip("openvino", reason="needs openvino")
    pytest.importorskip("torchao", reason="needs torchao")
    trainer = trainer_of(tmp_path / "run", student(compact=True), save_strategy="no")
    trainer.train()
    trainer.save_model(tmp_path / "int8")
    main(["export", str(tmp_path / "int8"), str(tmp_path / "int8.xml"), "--to", "openvino", "--int8"])
    torch.testing.assert_close(run(tmp_path / "int8.xml"), expected(trainer.session.model), rtol=0, atol=2e-3)
    assert '"FakeQuantize"' in (tmp_path / "int8.xml").read_text()


def test_what_is_refused(compact, tmp_path, monkeypatch):
    words = ["export", str(compact[1]), str(tmp_path / "model.onnx"), "--to", "openvino"]
    with pytest.raises(SystemExit, match=r"two files, .xml and .bin; name the first, model.xml"):
        main(words)
    monkeypatch.setitem(sys.modules, "openvino", None)
    words[2] = str(tmp_path / "model.xml")
    with pytest.raises(SystemExit, match=r"openvino is needed for this; install it: .*head-pruning\[openvino\]"):
        main(words)
    assert not list(tmp_path.iterdir())
