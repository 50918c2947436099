"""The manual of GPP and DFD: its two command lines, and what they leave."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from head_pruning import HeadMask, HeadPruningError
from hf_plugin import run_GDbert_glue, run_glue
from hf_plugin.command_line.arguments import parse
from hf_plugin.heads.masking import head_mask
from tests.hf.manual_lines import GPP, GPP_TEACHER
from tests.hf.script_runs import write_place

SHORT = "--data_dir data/CoLA --use_cpu --disable_tqdm True --save_strategy no --seed 3".split()


def test_the_lines_mean_what_the_manual_says():
    arguments = parse(GPP, "run_GDbert_glue")
    gpp, dfd = arguments.pruners
    assert (gpp.name, gpp.units, gpp.target) == ("gpp", "both", 0.5)
    assert (gpp.config.prepruning_finetune_epochs, gpp.config.prune_epochs, gpp.config.retrain_lr_factor) == (0, 20, 1)
    assert (dfd.name, dfd.config.teacher_path, dfd.config.window_size, dfd.config.flooding_b) == (
        "dfd", "base/cola", 3, 0.01,
    )  # fmt: skip
    training = arguments.training
    assert (training.eval_strategy.value, training.num_train_epochs, training.learning_rate) == ("epoch", 32, 2e-5)
    slower = parse([*GPP, "--retrain_learning_rate", "1e-5", "--do_finetune"], "run_GDbert_glue")
    assert slower.pruners[0].config.retrain_lr_factor == 0.5
    for rate in ("0", "-1e-5", "nan", "inf"):
        with pytest.raises(HeadPruningError, match="--retrain_learning_rate is .*; it must be a number above 0"):
            parse([*GPP, f"--retrain_learning_rate={rate}"], "run_GDbert_glue")
    for more, words in (("learning_rate", "a factor on --learning_rate, which"), ("retrain_lr_factor", "drop one of")):
        with pytest.raises(HeadPruningError, match=words):
            parse([*GPP, "--retrain_learning_rate", "1e-5", f"--{more}", "0"], "run_GDbert_glue")
    assert any("--do_finetune is ignored" in note for note in slower.notes)
    plain = parse("--model_name_or_path m --task_name cola --output_dir o --do_train".split(), "run_GDbert_glue")
    assert [p.name for p in plain.pruners] == ["gpp"] and plain.pruners[0].config.prune_epochs == 10
    assert plain.training.num_train_epochs == 32
    teacher = parse(GPP_TEACHER, "run_glue")
    assert teacher.model.model_name_or_path == "bert-base-uncased" and not teacher.pruners
    assert any("bert-unbase-cased is read as bert-base-uncased" in note for note in teacher.notes)
    with pytest.raises(HeadPruningError, match="target.sparsity is 1.0"):
        parse([*GPP, "--target_sparsity", "1.0"], "run_GDbert_glue")


PLAIN = "--model_name_or_path bert-base-uncased --task_name cola --output_dir plain --do_train".split()


@pytest.mark.parametrize("words, names", [
    ("--do_distill --teacher_model_path t --distill logits", ["dfd", "logits"]),
    ("--distill logits --do_distill --teacher_model_path t", ["dfd", "logits"]),
    ("--distill dfd --do_distill", ["dfd"]),
    ("--do_distill False --distill logits", ["logits"]),
    ("--teacher_model_path t --distill_logits 1", ["logits"]),
])  # fmt: skip
def test_do_distill_stands_beside_distillers_that_are_named(words, names):
    pruners = parse([*PLAIN, *words.split()], "run_GDbert_glue").pruners
    assert [p.name for p in pruners if p.kind == "distils"] == names


@pytest.mark.parametrize("more", ["", "--do_distill False"])
def test_a_teacher_without_do_distill_is_refused(more):
    with pytest.raises(HeadPruningError, match="^--teacher_model_path is read with --do_distill only; add"):
        parse([*PLAIN, "--teacher_model_path", "t", *more.split()], "run_GDbert_glue")


def test_the_defaults_train_and_the_report_has_the_target_in_force(tmp_path, monkeypatch, capsys):
    write_place(tmp_path / "place", "CoLA")
    monkeypatch.chdir(tmp_path / "place")
    few = ["--max_train_samples", "8", "--per_device_train_batch_size", "8"]
    monkeypatch.setattr("sys.argv", ["run_GDbert_glue", *PLAIN, *SHORT, *few])
    run_GDbert_glue.main()
    report = json.loads((tmp_path / "place/plain/pruning.json").read_text())
    assert report["options"]["target_sparsity"] == report["sparsity"]["units_removed"] == 0.5
    state = json.loads((tmp_path / "place/plain/trainer_state.json").read_text())
    assert (state["global_step"], state["epoch"]) == (32, 32.0)
    card = (tmp_path / "place/plain/README.md").read_text()
    assert "| target_sparsity | 0.5 |" in card


def test_both_lines_run(tmp_path, monkeypatch, capsys):
    write_place(tmp_path / "place", "CoLA")
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setattr("sys.argv", ["run_glue", *GPP_TEACHER, *SHORT, "--num_train_epochs", "1"])
    run_glue.main()
    monkeypatch.setattr("sys.argv", ["run_GDbert_glue", *GPP, *SHORT, "--max_steps", "32", "--learning_rate", "1e-4"])
    capsys.readouterr()
    run_GDbert_glue.main()
    told = json.loads((tmp_path / "place" / "gpp/cola/all_results.json").read_text())
    assert (told["heads_kept"], told["heads_total"], told["units_kept"], told["units_total"]) == (12, 24, 32, 64)
    mask = HeadMask.load("gpp/cola/masks.safetensors")
    small, dense = (
        AutoModelForSequenceClassification.from_pretrained(f"gpp/cola{part}").eval() for part in ("/compact", "")
    )
    words = torch.arange(5, 17).reshape(2, 6)
    with torch.no_grad(), head_mask(dense, mask):
        torch.testing.assert_close(small(words).logits, dense(words).logits, rtol=0, atol=1e-5)
    printed = capsys.readouterr().out
    assert "12 of 24 heads and 32 of 64 units, the others are cut out" in printed and "of the MACs' bound" in printed
    stored = json.loads((tmp_path / "place" / "gpp/cola/compact/benchmark.json").read_text())
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (dense, small)]
    assert [told["parameters"] for told in stored["models"]] == sizes and stored["mac_bound"] > 1
    report = json.loads((tmp_path / "place" / "gpp/cola/pruning.json").read_text())
    assert report["method"] == "gpp+dfd" and report["sparsity"]["units_removed"] == 0.5
