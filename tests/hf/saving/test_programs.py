"""Exported models read what their tokenizers make: token types of pairs, and the choices of multiple choice."""

import functools
import json

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    FunnelConfig,
    FunnelModel,
    GPT2Config,
    GPT2Model,
    RobertaConfig,
    RobertaModel,
    TapasConfig,
    TapasModel,
)

from head_pruning.cli import main
from head_pruning.inference.runtimes import onnx_pass, onnx_session
from hf_plugin import prune_heads, save_compact
from hf_plugin.saving.example_inputs import example_inputs
from hf_plugin.saving.programs import export_program
from tests.hf.families import TEXT
from tests.hf.tiny import VOCABULARY, built

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
CLASSES = {
    "pair": BertForSequenceClassification,
    "question": BertForQuestionAnswering,
    "choice": BertForMultipleChoice,
}
OUTPUTS = {"pair": ["logits"], "question": ["start_logits", "end_logits"], "choice": ["logits"]}


def _bert(kind: str):
    # Weights so large that types change decisions.
    return CLASSES[kind](BertConfig(**SIZES, vocab_size=VOCABULARY, max_position_embeddings=32, initializer_range=0.4))


@pytest.fixture
def saved(tmp_path):
    """Writes a compact model of a kind, and gives it too."""

    def save(kind: str):
        model = built(3, _bert, kind=kind)
        prune_heads(model, {0: [1, 2]})
        save_compact(model, tmp_path / kind)
        return model, str(tmp_path / kind)

    return save


def batch(kind: str) -> dict[str, torch.Tensor]:
    """Pairs of other lengths each, padded; of multiple choice three for each of five examples."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCABULARY, (15, 11), generator=draw)
    first, whole = torch.randint(2, 5, (15, 1), generator=draw), torch.randint(7, 12, (15, 1), generator=draw)
    place = torch.arange(11)
    mask = (place < whole).long()
    found = {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": (place >= first).long() * mask}
    return {name: tensor.view(5, 3, 11) for name, tensor in found.items()} if kind == "choice" else found


def agrees(run, model, kind: str) -> None:
    """The scores are torch's, and so are decisions; without types they would not be."""
    inputs = batch(kind)
    with torch.no_grad():
        expected, without = model(**inputs), model(**{**inputs, "token_type_ids": 0 * inputs["token_type_ids"]})
    for name, found in zip(OUTPUTS[kind], run(inputs), strict=True):
        torch.testing.assert_close(found, expected[name], rtol=0, atol=1e-4)
        assert torch.equal(found.argmax(-1), expected[name].argmax(-1))
        assert not torch.equal(without[name].argmax(-1), expected[name].argmax(-1))


@pytest.mark.parametrize("kind", ["pair", pytest.param("question", marks=pytest.mark.slow), "choice"])
def test_a_program_decides_as_torch(saved, kind, tmp_path):
    model, folder = saved(kind)
    main(["export", folder, str(tmp_path / "model.pt2"), "--to", "torch-export"])
    program = torch.export.load(tmp_path / "model.pt2").module()
    agrees(lambda inputs: [program(**inputs)[name] for name in OUTPUTS[kind]], model, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CLASSES)
def test_onnxruntime_decides_as_torch(saved, kind, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, folder = saved(kind)
    main(["export", folder, str(tmp_path / "model.onnx"), "--to", "onnx"])
    session = onnx_session(tmp_path / "model.onnx")
    axes = ["batch", "choices", "length"] if kind == "choice" else ["batch", "length"]
    assert {given.name: given.shape for given in session.get_inputs()} == dict.fromkeys(batch(kind), axes)
    agrees(lambda inputs: map(torch.from_numpy, onnx_pass(session, inputs)()), model, kind)


def test_multiple_choice_is_inspected_and_timed(saved, capsys):
    _, folder = saved("choice")
    main(["inspect", folder, "--length", "8", "--json"])
    assert json.loads(capsys.readouterr().out)["heads_kept"] == 6
    main(["benchmark", folder, "--length", "8", "--batch", "2", "--rounds", "1", "--json"])
    assert json.loads(capsys.readouterr().out)["models"][0]["latency_ms"] > 0


def _tapas():
    return TapasModel(TapasConfig(**TEXT))


def _funnel():
    return FunnelModel(FunnelConfig(vocab_size=60, block_sizes=[1, 1], d_model=32, n_head=4, d_head=8, d_inner=40))


def _roberta():
    return RobertaModel(RobertaConfig(**{**TEXT, "type_vocab_size": 1}))


def _gpt2():
    """What it takes as token types are words."""
    return GPT2Model(GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=4))


@pytest.mark.parametrize(("build", "shape"), [(_tapas, (2, 8, 7)), (_funnel, (2, 8)), (_roberta, None), (_gpt2, None)])
def test_types_are_those_that_a_model_tells_apart(build, shape):
    types = example_inputs(built(0, build), 2, 8).get("token_type_ids")
    assert shape == (None if types is None else tuple(types.shape))
    if types is not None:
        assert types[:, :4].max() == 0 and types[:, 4:].min() == 1


def test_types_of_many_kinds_stay_free(tmp_path):
    model = built(0, _tapas)
    assert export_program(model, functools.partial(example_inputs, model), tmp_path / "program.pt2") < 1e-5
