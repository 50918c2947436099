"""The run_squad script: the manual's two command lines, both versions of SQuAD, resume, and what it leaves."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from head_pruning import HeadMask, HeadPruningError
from head_pruning.weights import load_weight_masks
from hf_plugin.command_line.arguments import parse
from hf_plugin.squad.metrics import squad_scores
from hf_plugin.squad.reading import read_squad
from hf_plugin.squad.run import load_pieces, run
from tests.hf.manual_lines import PLATON_BERT, PLATON_DEBERTA
from tests.hf.script_runs import ROOT, start, write_model
from tests.hf.squad_files import HEADS, TINY, WORDS, write_squad_place

resumes = pytest.mark.skipif(
    transformers.__version__.startswith("5.0."),
    reason="transformers 5.0 saves LayerNorms under names that it does not know when it resumes",
)
# The manual's schedule is longer than these runs.
SHORT = "--warmup_steps 1 --deltaT 2 --eval_steps 6".split()
DENSE = """--model_name_or_path bert-base-uncased --do_train --do_eval --data_dir data/squad --seed 9
    --overwrite_output_dir""".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_squad_place(tmp_path_factory.mktemp("squad"))


def squad(*words: str) -> dict[str, float]:
    return run(parse(words, "run_squad"))


def answers_score_as_reported(folder: str, results: dict, version: str = "1.1") -> None:
    """The files hold the answers that the metrics are of."""
    rows = read_squad(f"data/squad/dev-v{version}.json", version == "2.0")
    predictions = json.loads(Path(folder, "predictions_.json").read_text())
    nbest = json.loads(Path(folder, "nbest_predictions_.json").read_text())
    assert set(predictions) == set(nbest) == set(rows["id"])
    scores = squad_scores(predictions, dict(zip(rows["id"], rows["answers"])), version_2=version == "2.0")
    assert {name: results[f"eval_{name}"] for name in scores} == pytest.approx(scores)
    stored = json.loads(Path(folder, "all_results.json").read_text())
    assert {name: stored[f"eval_{name}"] for name in scores} == pytest.approx(scores)
    if version == "1.1":
        assert all(nbest[key][0]["text"] == text for key, text in predictions.items())
    else:
        odds = json.loads(Path(folder, "null_odds_.json").read_text())
        assert all((predictions[key] == "") == (odds[key] > 0) for key in odds)


@pytest.mark.parametrize(
    "line", [pytest.param(PLATON_BERT, marks=pytest.mark.slow), PLATON_DEBERTA], ids=["bert", "deberta"]
)
def test_the_manuals_commands(here, line):
    folder = "log/deberta-v3-base/PLATON/"
    results = squad(*line, *TINY, *SHORT)
    answers_score_as_reported(folder, results)
    masks = load_weight_masks(f"{folder}/masks.safetensors")
    kept, total = (sum(int(mask.sum()) for mask in masks.values()), sum(mask.numel() for mask in masks.values()))
    # The original's rule: the k-1 lowest scores go, k = int(n * 0.9).
    assert (
        (results["weights_kept"], results["weights_total"]) == (kept, total) == (total - int(total * 0.9) + 1, total)
    )
    state = load_file(f"{folder}/model.safetensors")
    assert all(not state[name][~mask].any() for name, mask in masks.items())
    model = AutoModelForQuestionAnswering.from_pretrained(folder)
    assert model.config.model_type == ("bert" if line is PLATON_BERT else "deberta-v2")
    assert AutoTokenizer.from_pretrained(folder).is_fast
    history = json.loads(Path(folder, "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_f1" in entry] == [6, 12]
    assert {"predictions_6.json", "predictions_12.json"} <= {path.name for path in Path(folder).iterdir()}
    # The model in the folder is the one that was scored.
    again = ["--model_name_or_path", folder, "--do_eval", "--data_dir", "data/squad", "--output_dir", "again", *TINY]
    again = squad(*again)
    for name in ("eval_exact", "eval_f1", "eval_loss"):
        assert again[name] == pytest.approx(results[name], abs=1e-5)


@pytest.mark.slow
def test_as_a_process(place):
    script = str(ROOT / "hf_plugin" / "run_squad.py")
    process = start(place, script, *PLATON_BERT, *TINY, *SHORT, "--output_dir", "process")
    shown, log = process.communicate(timeout=300)
    assert process.returncode == 0, log[-3000:]
    assert (
        "--warmup_steps (1) is that of the pruner platon; the learning rate's is --optimizer_warmup_steps (0)." in log
    )
    assert "weights are left; masks and densities are in process" in log and "'eval_f1'" in shown
    process = start(place, "-m", "hf_plugin.run_squad", *PLATON_BERT, *TINY, "--predict_file", "gone.json")
    _, log = process.communicate(timeout=300)
    (sentence,) = [line for line in log.splitlines() if line.startswith("error: ")]
    assert process.returncode == 1 and "Traceback" not in log and "gone.json cannot be read" in sentence


@pytest.mark.slow
def test_heads_are_pruned_on_version_2(here):
    words = "--pruner dsp --num_of_heads 8 --joint_pruning --annealing --cooldown_steps 0.5 --initial_temperature 1"
    results = squad(*DENSE, *TINY, *words.split(), "--version_2_with_negative", "--output_dir", "heads")
    answers_score_as_reported("heads", results, "2.0")
    assert results["eval_NoAns_total"] == results["eval_HasAns_total"] == 8
    assert results["eval_best_f1"] >= results["eval_f1"] - 1e-9
    mask = HeadMask.load("heads/masks.safetensors")
    assert mask.kept == results["heads_kept"] == 8 and mask.keep.size == HEADS
    card = Path("heads/README.md").read_text()
    assert f"8 of {HEADS} attention heads" in card and "Results on SQuAD v2.0" in card and "eval_f1" in card


@pytest.mark.slow
def test_heads_and_weights_in_one_run(here):
    words = "--pruner ste --num_of_heads 8 --joint_pruning --pruner_name magnitude --final_threshold 0.5"
    results = squad(*DENSE, *TINY, *words.split(), *SHORT[:2], "--output_dir", "both")
    assert (results["heads_kept"], results["weights_kept"]) == (8, results["weights_total"] // 2 + 1)
    assert HeadMask.load("both/masks.safetensors").kept == 8
    assert len(load_weight_masks("both/masks.safetensors")) > 0
    report = json.loads(Path("both/pruning.json").read_text())
    assert report["heads_kept"] == 8 and "weights" in report
    answers_score_as_reported("both", results)


def test_evaluation_does_not_depend_on_batches_or_their_order(here):
    line = [*DENSE[:2], *DENSE[3:], *TINY]
    scores = [
        squad(*line, "--output_dir", f"order{i}", *more)
        for i, more in enumerate(
            [["--per_device_eval_batch_size", "3"], ["--group_by_length", "--per_device_eval_batch_size", "64"]]
        )
    ]
    files = [json.loads(Path(f"order{i}/predictions_.json").read_text()) for i in range(2)]
    assert files[0] == files[1] and scores[0]["eval_f1"] == scores[1]["eval_f1"]


@pytest.mark.slow
@resumes
def test_a_run_is_gone_on_with(here):
    line = [word for word in DENSE if word != "--overwrite_output_dir"] + [*TINY, "--save_steps", "6"]
    squad(*line, "--output_dir", "all", "--overwrite_output_dir")
    squad(*line, "--output_dir", "part", "--overwrite_output_dir")
    shutil.rmtree("part/checkpoint-12")  # as if it had been stopped after update 6
    Path("part/model.safetensors").unlink()
    squad(*line, "--output_dir", "part")
    first, second = (load_file(f"{name}/model.safetensors") for name in ("all", "part"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    files = [Path(name, "predictions_.json").read_bytes() for name in ("all", "part")]
    assert files[0] == files[1]


@pytest.mark.slow
@resumes
def test_all_checkpoints(here):
    results = squad(*DENSE, *TINY, "--save_steps", "6", "--eval_all_checkpoints", "--output_dir", "checkpoints")
    assert results["eval_12_f1"] == results["eval_f1"] and results["eval_12_loss"] == results["eval_loss"]
    assert results["eval_6_loss"] != results["eval_loss"]
    assert Path("checkpoints/nbest_predictions_6.json").exists()
    with pytest.raises(HeadPruningError, match="^--eval_all_checkpoints scores whole models, "):
        squad(*PLATON_BERT, *TINY, "--eval_all_checkpoints")


def test_files_by_name_and_parts_of_them(here):
    Path("elsewhere").mkdir(exist_ok=True)
    shutil.copy("data/squad/dev-v1.1.json", "elsewhere/other.json")
    more = "--predict_file elsewhere/other.json --train_file dev-v1.1.json --max_train_samples 8 --max_eval_samples 6"
    results = squad(*DENSE, *TINY, "--output_dir", "files", *more.split())
    assert results["train_samples"] >= 8 and results["eval_total"] == 6


@pytest.mark.parametrize("words, sentence", [
    ("--model_type deberta", "bert-base-uncased is of the type bert, not deberta; drop --model_type or give another"),
    ("--data_dir nowhere", "nowhere/train-v1.1.json cannot be read (No such file or directory); give --data_dir the"),
    ("--train_file train-v2.0.json", "data/squad/train-v2.0.json: the question 0-0-1 has no answer; add --version_2"),
    ("--max_seq_length 12", "A window of 12 tokens has no room for text beside a question of 12 and the special tok"),
    ("--model_name_or_path ./nowhere", "./nowhere cannot be loaded ("),
])  # fmt: skip
def test_mistakes_get_one_sentence(here, words, sentence):
    with pytest.raises(HeadPruningError) as refused:
        squad(*DENSE, *TINY, "--output_dir", "mistakes", *words.split())
    assert str(refused.value).startswith(sentence) and str(refused.value).endswith(".")


def test_training_needs_do_train(here):
    line = [word for word in PLATON_BERT if word != "--do_train"]
    with pytest.raises(HeadPruningError, match="add --do_train"):
        squad(*line, *TINY, "--output_dir", "never")


def test_without_a_folder_the_hub_is_asked(here, monkeypatch):
    asked = []

    def load_dataset(repository, split, cache_dir):
        asked.append((repository, split))
        raise ConnectionError("Couldn't reach 'it' on the Hub (offline)")

    monkeypatch.setattr("hf_plugin.squad.reading.load_dataset", load_dataset)
    line = [word for word in DENSE if word not in ("--data_dir", "data/squad")]
    for more, repository in (([], "rajpurkar/squad"), (["--version_2_with_negative"], "rajpurkar/squad_v2")):
        with pytest.raises(HeadPruningError) as refused:
            squad(*line, *TINY, "--output_dir", "hub", *more)
        assert asked[-1] == (repository, "train")
        assert (
            f"loaded from the hub's {repository} (Couldn't reach 'it' on the Hub (offline)); give --data_dir"
            in str(refused.value)
        )


class TestCase:
    """--do_lower_case where the model is cased, uncased, or uncased without saying so."""

    def tokenizer(self, folder: str, *words: str):
        arguments = parse([*DENSE, "--model_name_or_path", folder, "--output_dir", "out", *words], "run_squad")
        return load_pieces(arguments.model, arguments.data)[0]

    @pytest.mark.parametrize("words", [[], ["--do_lower_case"]])
    def test_models_that_say_it_themselves(self, here, caplog, words):
        ids = self.tokenizer("bert-base-uncased", *words)("What Bar", add_special_tokens=False)["input_ids"]
        assert ids == self.tokenizer("bert-base-uncased")("what bar", add_special_tokens=False)["input_ids"]
        assert "do_lower_case" not in caplog.text
        cased = self.tokenizer("microsoft/deberta-v3-base", *words)
        assert cased.tokenize("What Bar") == ["▁What", "▁Bar"]
        assert ("--do_lower_case is ignored: the model's vocabulary has capitals" in caplog.text) == bool(words)

    def test_an_uncased_vocabulary_without_a_word_of_it(self, here, tmp_path):
        write_model(tmp_path / "quiet")
        config = json.loads((tmp_path / "quiet" / "tokenizer_config.json").read_text())
        data = json.loads((tmp_path / "quiet" / "tokenizer.json").read_text())
        data["normalizer"]["lowercase"] = False
        (tmp_path / "quiet" / "tokenizer.json").write_text(json.dumps(data))
        (tmp_path / "quiet" / "tokenizer_config.json").write_text(json.dumps({**config, "do_lower_case": False}))
        assert self.tokenizer(str(tmp_path / "quiet")).tokenize("W3") == ["[UNK]"]
        lowered = self.tokenizer(str(tmp_path / "quiet"), "--do_lower_case")
        assert lowered.tokenize("W3") == ["w3"]
        lowered.save_pretrained(tmp_path / "saved")
        assert AutoTokenizer.from_pretrained(tmp_path / "saved").tokenize("W3") == ["w3"]


@pytest.mark.slow
def test_it_learns(here):
    """The word after another one: a tiny BERT finds it, which it cannot where windows or answers are mixed up."""
    more = "--max_steps 1500 --per_device_train_batch_size 32 --learning_rate 3e-3 --train_file train-v1.1.json"
    results = squad(*DENSE, *TINY, "--output_dir", "learnt", *more.split(), "--predict_file", "train-v1.1.json")
    assert results["eval_exact"] > 90
    predictions = json.loads(Path("learnt/predictions_.json").read_text())
    assert set(" ".join(predictions.values()).lower().split()) <= {f"{w}{e}" for w in WORDS for e in ("", ",", ".")}
    assert np.isfinite(results["eval_loss"])
