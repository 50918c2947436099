"""Quantization-aware training in a Trainer: what is stored, zeros, resume, compact models, what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from benchmarks.int8 import arithmetic
from head_pruning import HeadPruningError
from head_pruning.cli import main
from head_pruning.weights import load_compressed
from hf_plugin import HeadPruningTrainer, mark_compact, open_session, prune_heads, pruner
from hf_plugin.scripts.compact import leave_compact
from tests.hf.tiny import arguments, collate, sentences, tiny_bert
from tests.hf.training.test_trainer import StopAt, same, same_session

pytest.importorskip("torchao", reason="needs torchao")

IDS = torch.randint(5, 40, (3, 9), generator=torch.Generator().manual_seed(0))
FFN = r"(intermediate|layer\.\d\.output)\.dense\.weight"


def student(compact: bool = False):
    """The tiny BERT with zeros in its layers; compact, its second layer has no heads."""
    model = tiny_bert()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "encoder" in name and parameter.dim() == 2:
                parameter[:, ::3] = 0.0
    if compact:
        prune_heads(model, {0: [1, 2], 1: [0, 1, 2, 3]})
        mark_compact(model)
    return model


def trainer_of(folder, model, ranges="average", callbacks=(), others=(), **training):
    lock = pruner("lock", weights_include=FFN)
    qat = pruner("qat", quantization_begin=0.25, not_to_quantize="classifier", input_ranges=ranges)
    return HeadPruningTrainer(
        model=model,
        args=arguments(folder, **training),
        pruners=[*others, lock, qat],
        train_dataset=sentences(32),
        data_collator=collate,
        callbacks=list(callbacks),
    )


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder, trainer and model of two runs with lock: one of a whole model, one of a compact one."""
    found = {}
    for name, ranges in (("whole", "average"), ("compact", "token")):
        folder = tmp_path_factory.mktemp(name)
        trainer = trainer_of(folder, student(name == "compact"), ranges, save_strategy="steps", save_steps=4)
        trainer.train()
        trainer.save_model(folder / "model")
        found[name] = folder / "model", trainer
    return found


def test_the_stored_model_computes_what_was_trained(trained):
    folder, trainer = trained["compact"]
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    torch.testing.assert_close(logits(model), logits(trainer.session.model), rtol=0, atol=0)
    assert model.classifier.weight.is_floating_point() and not hasattr(model.classifier.weight, "qdata")
    assert model.bert.encoder.layer[0].attention.self.query.weight.qdata.shape == (8, 16)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "torchao" and config["removed_heads"]["sites"]


@pytest.mark.parametrize("name", ["whole", "compact"])
def test_a_loaded_model_is_saved_as_what_it_is(trained, tmp_path, name):
    model = AutoModelForSequenceClassification.from_pretrained(trained[name][0])
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert same(*(load_file(folder / "model.safetensors") for folder in (tmp_path, trained[name][0])))


@pytest.mark.parametrize("method", [
    pruner("lock"), pruner("dsp", num_of_heads=3), pruner("qat"), pruner("magnitude", final_threshold=0.5),
    pruner("logits"),
])  # fmt: skip
def test_integers_are_neither_trained_nor_pruned(trained, method):
    model = AutoModelForSequenceClassification.from_pretrained(trained["compact"][0])
    expected = logits(model)
    with pytest.raises(HeadPruningError, match="query.weight., which can be evaluated, but not trained or pruned"):
        open_session(model, [method])
    assert torch.equal(logits(model), expected)


def test_averaged_ranges_are_near_to_those_of_tokens(trained):
    folder, trainer = trained["whole"]
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    ours, stored = logits(trainer.session.model), logits(model)
    assert 0 < (ours - stored).abs().max() < 0.01


@pytest.mark.parametrize("name", ["whole", "compact"])
def test_zeros_stay_zeros_and_are_counted_as_stored(trained, name):
    folder, trainer = trained[name]
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    names = trainer.session.weight_masks()
    parameters = dict(model.named_parameters())
    kept = 0
    for tensor, mask in names.items():
        value = parameters[tensor]
        integers = getattr(value, "qdata", value)
        assert mask[:, 1::3].all() and not mask[:, ::3].any() and not integers[~mask].any(), tensor
        assert not trainer.session.model.get_parameter(tensor)[~mask].any(), tensor  # before they were rounded
        kept += int(torch.count_nonzero(integers))
    report = json.loads((folder / "pruning.json").read_text())["weights"]
    assert report["weights_kept"] == kept and kept < sum(int(mask.sum()) for mask in names.values())


def test_a_resumed_run_ends_bit_equal(trained, tmp_path):
    _, whole = trained["whole"]
    trainer_of(tmp_path, student(), save_strategy="steps", save_steps=4, callbacks=[StopAt(4)]).train()
    resumed = trainer_of(tmp_path, student(), save_strategy="steps", save_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same(resumed.session.model.state_dict(), whole.session.model.state_dict())
    assert same_session(resumed.session, whole.session)


def test_the_model_is_float_before_and_after(trained):
    model = student()
    expected = logits(model)
    session = open_session(model, [pruner("qat", quantization_begin=3)], total_steps=9)
    session.before_update(2)
    assert not session.at_target() and torch.equal(logits(model), expected)
    session.before_update(3)
    assert session.at_target() and not torch.equal(logits(model), expected)
    session.detach()
    assert torch.equal(logits(model), expected) and type(model.classifier) is torch.nn.Linear


def test_it_learns_from_a_teacher_beside(tmp_path):
    distiller = pruner("logits")
    trainer = trainer_of(tmp_path, student(), others=[distiller], max_steps=2)
    trainer.train()
    teacher = trainer.session.of_kind("distils")[0]
    assert all(type(module).__name__ != "FakeQuantizedLinear" for module in teacher.teacher.model.modules())


def test_heads_go_to_zero_before_weights_are_rounded(tmp_path, caplog):
    dsp = pruner("dsp", num_of_heads=3, joint_pruning=True)
    trainer = trainer_of(tmp_path, student(), others=[dsp], max_steps=2)
    assert "stay as zeros in the 8-bit model" in caplog.text  # before anything is trained
    trainer.train()
    trainer.save_model(tmp_path / "model")
    mask = trainer.head_mask.by_site()["bert.encoder.layer.0.attention"]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    columns = model.bert.encoder.layer[0].attention.output.dense.weight.qdata.reshape(16, 4, 4)
    assert [bool(columns[:, head].any()) for head in range(4)] == list(mask)
    with pytest.raises(SystemExit, match="has 8-bit weights, out of which heads that are only zeroed cannot be cut"):
        main(["export", "--to", "compact", str(tmp_path / "model"), str(tmp_path / "cut")])
    assert not (tmp_path / "cut").exists()
    leave_compact(tmp_path / "model")
    assert "compact/ is not written: " in caplog.text and not (tmp_path / "model" / "compact").exists()


@pytest.mark.parametrize("options, sentence", [
    ({"input_ranges": "batch"}, "--input-ranges is 'batch'; choose one of token, average."),
    ({"not_to_quantize": "("}, "--not-to-quantize is no regular expression"),
    ({"not_to_quantize": "."}, "The model has no linear layer"),
    ({"quantization_begin": -1.0}, "--quantization-begin is -1.0; give a number of updates"),
])  # fmt: skip
def test_mistakes(options, sentence):
    model = tiny_bert()
    with pytest.raises(HeadPruningError, match=sentence.replace("(", r"\(")):
        open_session(model, [pruner("qat", **options)])
    assert all(type(module).__name__ != "FakeQuantizedLinear" for module in model.modules())


@pytest.fixture(scope="module")
def onnx_file(trained, tmp_path_factory):
    pytest.importorskip("onnxscript", reason="needs onnx")
    file = tmp_path_factory.mktemp("onnx") / "model.onnx"
    main(["export", str(trained["whole"][0]), str(file), "--to", "onnx", "--int8"])
    return file


@pytest.mark.slow
def test_the_onnx_file_computes_with_integers_as_the_model_did(trained, onnx_file):
    import onnx

    from head_pruning.inference.runtimes import onnx_pass, onnx_session

    graph = onnx.load(onnx_file).graph
    integers = [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8 and tensor.dims]
    assert sum(len(tensor.dims) == 2 for tensor in integers) == 13  # all linear layers but the classifier
    model = trained["whole"][1].session.model.eval()
    batch = collate(sentences(64, seed=5))
    batch.pop("labels")
    batch["token_type_ids"] = (torch.arange(batch["input_ids"].shape[1]) > 3).long().expand_as(batch["input_ids"])
    with torch.no_grad():
        expected = model(**batch).logits
    found = torch.from_numpy(onnx_pass(onnx_session(onnx_file), batch)()[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    sure = (expected[:, 0] - expected[:, 1]).abs() > 2e-3
    assert torch.equal(found.argmax(-1)[sure], expected.argmax(-1)[sure]) and sure.any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whole", "compact"])
def test_the_export_says_when_it_has_other_ranges_than_the_model_had(trained, name, tmp_path, capsys):
    pytest.importorskip("onnxscript", reason="needs onnx")
    main(["export", str(trained[name][0]), str(tmp_path / "model.onnx"), "--to", "onnx", "--int8"])
    printed = capsys.readouterr().out
    assert ("not the model that was trained with --input_ranges token" in printed) == (name == "compact")
    assert "session.x64quantprecision" in printed and printed.count("\n") == 1


def test_files_without_zeros(trained, tmp_path, capsys):
    folder = trained["compact"][0]
    main(["export", str(folder), str(tmp_path / "small"), "--to", "compressed"])
    stored, again = load_file(folder / "model.safetensors"), load_compressed(tmp_path / "small")
    assert same(stored, again)
    assert (tmp_path / "small").stat().st_size < (folder / "model.safetensors").stat().st_size
    main(["inspect", str(folder), "--json", "--length", "8"])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["sizes"]["now"]["bytes"] == sum(tensor.nbytes for tensor in stored.values())


@pytest.mark.parametrize("words, sentence", [
    ("--to onnx --int8", "train it with --do-quantization first"),
    ("--to torch-export --int8", "cannot be exported to torch-export-int8; choose one of masked, compact, onnx"),
])  # fmt: skip
def test_what_cannot_be_exported_with_8_bits(tmp_path, words, sentence):
    tiny_bert().save_pretrained(tmp_path / "float")
    with pytest.raises(SystemExit, match=sentence):
        main(["export", str(tmp_path / "float"), str(tmp_path / "model"), *words.split()])
    assert not (tmp_path / "model").exists()


def test_forty_times_counts_no_places():
    """The claim is of the values alone; with a bit for each weight it is less than half of that."""
    found = arithmetic()
    assert found["values"] == pytest.approx(40.0)
    assert found["with bitmask"] == pytest.approx(4 / (0.1 + 1 / 8))
    assert 17 < found["whole encoder"] < found["with bitmask"] and found["whole model"] < found["whole encoder"]
