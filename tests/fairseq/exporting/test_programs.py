"""ONNX files and programs of torch.export: one forward pass that gives what the model gives, whatever the shape."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from fairseq.models.transformer import TransformerModel

from fairseq_plugin import host, remove_heads
from fairseq_plugin.checkpoints.keeper import StateKeeper, keeper_of
from fairseq_plugin.exporting import programs
from fairseq_plugin.exporting.checkpoints import export_compact
from fairseq_plugin.exporting.example_batch import example
from head_pruning import HeadMask, HeadPruningError
from head_pruning.cli import main
from head_pruning.weights import pack_mask
from tests.fairseq.command_lines import DSP
from tests.fairseq.files import read, weights_of
from tests.fairseq.modules.test_architectures import MODELS, one_dictionary  # noqa: F401  (a fixture)
from tests.fairseq.modules.test_surgery import SMALL, translator, uneven_mask, with_biases
from tests.fairseq.runner import Runner

# Sentences, source and target tokens; fairseq pads sources on the left.
SHAPES = ((4, 10, 3), (1, 5, 8), (2, 3, 1))


@pytest.fixture(scope="module")
def checkpoints(translation, tmp_path_factory):
    """A checkpoint of a pruning run, the same one dense, and cut unevenly: a layer whole, several layers emptied."""
    folder = tmp_path_factory.mktemp("programs")
    Runner(folder).run("train", translation.train(folder / "run", DSP, updates=4))
    found = {"gated": folder / "run" / "checkpoint_last.pt", "dense": folder / "dense.pt"}
    torch.save({**read(found["gated"]), "model": weights_of(found["gated"])}, found["dense"])
    mask = uneven_mask(host.load(found["dense"]).model)
    kept = [len(heads) for heads in mask.kept_heads().values()]
    assert 0 in kept and len(set(kept)) > 2
    found["mask"] = folder / "uneven.safetensors"
    mask.save(found["mask"])
    found["compact"] = folder / "compact.pt"
    export_compact(found["dense"], found["compact"], mask)
    return found


def _model(path):
    """What fairseq computes: the model of a checkpoint with its gates, none of whose heads is cut out here."""
    loaded = host.load(path)
    if loaded.mask is not None:
        (keeper_of(loaded.model) or StateKeeper(loaded.model)).hold(loaded.mask)
    return loaded.model


def _pass(file):
    """A run of an ONNX file."""
    session = pytest.importorskip("onnxruntime").InferenceSession(file)
    return lambda inputs: {"logits": torch.from_numpy(session.run(["logits"], _arrays(inputs))[0])}


def _arrays(inputs) -> dict:
    return {name: tensor.numpy() for name, tensor in inputs.items()}


def _same_logits(run, model, atol) -> None:
    for padded in (True, False):
        for shape in SHAPES:
            inputs = example(model, *shape, padded=padded)
            with torch.no_grad():
                torch.testing.assert_close(run(inputs)["logits"], model(**inputs)[0], atol=atol, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "gated", "compact"])
def test_the_command_exports_what_computes_the_same(kind, checkpoints, tmp_path, capsys):
    path = checkpoints[kind]
    model = _model(path)
    main(["export", str(path), str(tmp_path / "model.pt2"), "--to", "torch-export"])
    printed = capsys.readouterr().out
    assert {"dense": "all heads", "gated": "4 of 24 heads"}.get(kind, "of 24 heads") in printed
    _same_logits(_program(tmp_path / "model.pt2"), model, 1e-5)
    pytest.importorskip("onnxscript")
    main(["export", str(path), str(tmp_path / "model.onnx"), "--to", "onnx"])
    assert float(capsys.readouterr().out.split()[-1]) < 1e-4
    _same_logits(_pass(tmp_path / "model.onnx"), model, 1e-4)


def _program(file):
    module = torch.export.load(file).module()
    return lambda inputs: module(**inputs)


@pytest.mark.slow
def test_a_mask_beside_a_checkpoint_is_cut_out_and_the_program_runs_without_fairseq(checkpoints, tmp_path, capsys):
    file, mask = tmp_path / "model.pt2", checkpoints["mask"]
    main(["export", str(checkpoints["dense"]), str(file), "--to", "torch-export", "--mask", str(mask)])
    kept = HeadMask.load(mask).kept
    assert f"{kept} of 24 heads" in capsys.readouterr().out
    compact = host.load(checkpoints["compact"]).model
    _same_logits(_program(file), compact, 1e-5)
    shapes = {f"model.{name}": p.shape for name, p in compact.named_parameters(remove_duplicate=False)}
    assert {name: p.shape for name, p in torch.export.load(file).named_parameters()} == shapes
    inputs = example(compact, *SHAPES[0], padded=True)
    with torch.no_grad():
        torch.save((inputs, compact(**inputs)[0]), tmp_path / "expected")
    code = (
        "import sys\nfor name in ('fairseq', 'head_pruning', 'fairseq_plugin'): sys.modules[name] = None\n"
        "import torch\ninputs, expected = torch.load('expected')\n"
        "found = torch.export.load('model.pt2').module()(**inputs)['logits']\n"
        "torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "build",
    [model for model in MODELS if model.id in ("transformer_align", "bart_base", "transformer_lm", "roberta_base")],
)
def test_other_models_of_written_language(build, one_dictionary, tmp_path):  # noqa: F811
    torch.manual_seed(1)
    model = with_biases(build(one_dictionary)[0]).eval()
    remove_heads(model, uneven_mask(model))
    assert programs.export_program(model, tmp_path / "model.pt2") <= 1e-5
    _same_logits(_program(tmp_path / "model.pt2"), model, 1e-5)


@pytest.mark.slow
def test_a_language_model_runs_in_onnxruntime(one_dictionary, tmp_path):  # noqa: F811
    pytest.importorskip("onnxscript")
    build = next(model for model in MODELS if model.id == "transformer_lm").values[0]
    model = build(one_dictionary)[0].eval()
    programs.export_onnx(model, tmp_path / "model.onnx")
    _same_logits(_pass(tmp_path / "model.onnx"), model, 1e-4)


@pytest.mark.slow
def test_the_model_stays_what_it_is_and_too_long_sentences_are_refused(tmp_path):
    model = translator(**SMALL).eval()
    before, attributes = copy.deepcopy(model), [set(vars(module)) for module in model.modules()]
    programs.export_program(model, tmp_path / "model.pt2")
    assert [set(vars(module)) for module in model.modules()] == attributes
    unpadded, padded = (example(model, 3, 7, 5, padded=padded) for padded in (False, True))
    with torch.no_grad():
        for inputs in (unpadded, padded):
            assert torch.equal(model(**inputs)[0], before(**inputs)[0])
    run, longest = _program(tmp_path / "model.pt2"), model.max_positions()[0]
    assert run(example(model, 2, longest, 3))["logits"].isfinite().all()
    inputs = example(model, 2, longest, 3)
    inputs["src_tokens"] = torch.nn.functional.pad(inputs["src_tokens"], (0, 1), value=5)
    with pytest.raises((AssertionError, RuntimeError), match=str(longest)):
        run(inputs)


class _Moody(TransformerModel):
    """Asks more of its input than whether there is padding."""

    def forward(self, src_tokens, src_lengths, prev_output_tokens):
        logits, extra = super().forward(src_tokens, src_lengths, prev_output_tokens)
        return (logits * 2 if src_tokens.eq(10**6).any() else logits), extra


@pytest.mark.slow
@pytest.mark.parametrize("name", ["export_onnx", "export_program"])
def test_what_cannot_be_exported_is_not_written(name, tmp_path):
    if name == "export_onnx":
        pytest.importorskip("onnxscript")
    export, target = getattr(programs, name), tmp_path / "model"
    model = translator(**{**SMALL, "encoder_layers": 1, "decoder_layers": 1}).eval()
    model.__class__ = _Moody
    with pytest.raises(HeadPruningError, match="differs by"):
        export(model, target)
    adaptive = translator(**SMALL, adaptive_softmax_cutoff="10,20", tie_adaptive_weights=False).eval()
    with pytest.raises(HeadPruningError, match="adaptive softmax"):
        export(adaptive, target)
    with pytest.raises(HeadPruningError, match="is a folder"):
        export(model, tmp_path)
    assert not list(tmp_path.iterdir())
    assert "buffered_future_mask" not in vars(model.decoder)


def test_the_host_zeroes_pruned_weights(checkpoints, tmp_path):
    state, name = read(checkpoints["dense"]), "encoder.layers.0.fc1.weight"
    weight = state["model"][name]
    keep = torch.arange(weight.numel()).reshape(weight.shape) % 3 == 0
    stored = {"shapes": {name: list(weight.shape)}, "masks": {name: pack_mask(keep)}}
    state["extra_state"]["head_pruning"] = {"pruners": ["magnitude"], **stored}
    torch.save(state, tmp_path / "pruned.pt")
    loaded = host.load(tmp_path / "pruned.pt").model.get_parameter(name)
    assert torch.equal(loaded, weight * keep) and loaded.ne(0).any() and not torch.equal(loaded, weight)


@pytest.mark.slow
def test_the_benchmark_runs_in_onnxruntime(checkpoints, capsys):
    pytest.importorskip("onnxscript")
    options = "--runtime onnxruntime --length 8 --batch 2 --rounds 2 --json"
    main(["benchmark", str(checkpoints["gated"]), *options.split()])
    found = json.loads(capsys.readouterr().out)
    dense, compact = found["models"]
    assert found["runtime"] == "onnxruntime" and compact["parameters"] < dense["parameters"]
    assert dense["latency_ms"] > 0 and compact["latency_ms"] > 0
