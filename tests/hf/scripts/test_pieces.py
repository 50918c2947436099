"""Models and tokenizers to start from: those that lack something, are damaged, or learnt another task."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
)

from head_pruning import HeadPruningError
from hf_plugin import prune_heads, save_compact
from hf_plugin.command_line.arguments import parse
from hf_plugin.command_line.fields import ModelArguments
from hf_plugin.command_line.michel import parse_michel
from hf_plugin.glue import find_task
from hf_plugin.glue.michel import run as run_michel
from hf_plugin.glue.run import GlueRun, load_pieces, run
from hf_plugin.scripts.models import load_tokenizer
from hf_plugin.squad.run import load_pieces as load_squad_pieces
from hf_plugin.squad.run import run as run_squad
from tests.hf.script_runs import HEADS, TINY, WORDS, write_model, write_task
from tests.hf.squad_files import write_squad

SCRIPTS = ("run_glue", "run_dsp", "run_squad", "run_michel")


def write_gpt2(folder: Path, **tokens: str) -> Path:
    """A tiny GPT-2 classifier whose tokenizer has only the special ``tokens``."""
    words = ["<|endoftext|>", "[UNK]", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **tokens).save_pretrained(folder)
    sizes = {"vocab_size": len(words), "n_embd": 24, "n_layer": 2, "n_head": 12, "n_positions": 64}
    GPT2ForSequenceClassification(GPT2Config(**sizes, eos_token_id=0)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Tasks, and the models to start from."""
    place = tmp_path_factory.mktemp("pieces")
    for folder in ("RTE", "STS-B", "MRPC"):
        write_task(place / "data", folder)
    write_squad(place / "data" / "squad")
    write_model(place / "bert")
    mnli = AutoModelForSequenceClassification.from_pretrained(place / "bert", num_labels=3)
    for folder in ("mnli", "compact"):
        AutoTokenizer.from_pretrained(place / "bert").save_pretrained(place / folder)
    mnli.save_pretrained(place / "mnli")
    prune_heads(mnli, {0: [1, 5], 1: [2]})
    save_compact(mnli, place / "compact")
    write_gpt2(place / "gpt2", eos_token="<|endoftext|>")
    write_gpt2(place / "no_end")
    return place


def start_from(model: str, script: str = "run_glue", task: str = "RTE", *words: str):
    """Run ``script`` from the folder ``model``: two updates of training, or Michel's rounds."""
    out = f"out_{model}_{script}_{task}"
    if script == "run_michel":
        line = ["--model_name_or_path", model, "--task_name", task, "--data_dir", f"data/{task}", "--no_cuda"]
        return run_michel(parse_michel([*line, "--output_dir", out, "--cache_dir", "cache", *words]))
    line = ["--model_name_or_path", model, "--do_train", *TINY, "--max_steps", "2", "--output_dir", out]
    line += ["--cache_dir", "cache", "--overwrite_output_dir", "--save_strategy", "no", *words]
    if script == "run_squad":
        sizes = "--data_dir data/squad --max_seq_length 32 --max_query_length 8 --doc_stride 8".split()
        return run_squad(parse([*line, *sizes], script))
    line += ["--task_name", task, "--data_dir", f"data/{task}"]
    line += "--num_of_heads 6 --use_ste --joint_pruning".split() if script == "run_dsp" else []
    return run(parse(line, script))


def refused(call) -> str:
    """The one sentence that ``call`` is refused with."""
    with pytest.raises(HeadPruningError) as error:
        call()
    sentence = str(error.value)
    assert sentence.endswith(".") and "\n" not in sentence and ". " not in sentence, sentence
    return sentence


class TestTokenizers:
    @pytest.mark.parametrize("script", SCRIPTS)
    def test_a_folder_without_one_is_refused(self, here, tmp_path, script):
        AutoModelForSequenceClassification.from_pretrained("bert").save_pretrained("bare")
        sentence = refused(lambda: start_from("bare", script))
        assert sentence.startswith(
            "bare holds no tokenizer (its vocabulary has only special tokens); give --tokenizer_"
        )

    @pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "t5", "deberta-v2", "flaubert"])
    def test_none_is_made_of_nothing(self, tmp_path, kind):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        assert "--tokenizer_name" in refused(lambda: load_tokenizer(ModelArguments(str(tmp_path))))

    def test_another_folders_will_do(self, here):
        AutoModelForSequenceClassification.from_pretrained("bert").save_pretrained("bare")
        found = load_tokenizer(ModelArguments("bare", tokenizer_name="bert"))
        assert type(found) is BertTokenizer and found.tokenize("w3 w4") == ["w3", "w4"]

    def test_a_damaged_one_is_refused(self, here, tmp_path):
        broken = Path(shutil.copytree("bert", tmp_path / "broken"))
        (broken / "tokenizer.json").write_text('{"version": "1.0", "model": {}}')
        assert refused(lambda: start_from(str(broken))).startswith(f"The tokenizer of {broken} cannot be loaded (")


@pytest.mark.parametrize("script", SCRIPTS)
def test_damaged_weights_are_refused(here, tmp_path, script):
    cut = Path(shutil.copytree("mnli", tmp_path / "cut"))
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[:-100])
    sentence = refused(lambda: start_from(str(cut), script))
    assert sentence.startswith(f"The weights in {cut} are damaged (") and sentence.endswith("); copy them again.")


class TestPadding:
    @pytest.mark.parametrize("script", SCRIPTS)
    def test_the_end_token_pads_where_there_is_no_other(self, here, script, caplog):
        with caplog.at_level("INFO"):
            start_from("gpt2", script)
        assert "no padding token, so its end token <|endoftext|> pads" in caplog.text
        if script == "run_dsp":
            saved = AutoModelForSequenceClassification.from_pretrained("out_gpt2_run_dsp_RTE")
            assert saved.config.pad_token_id == 0
            assert AutoTokenizer.from_pretrained("out_gpt2_run_dsp_RTE").pad_token == "<|endoftext|>"

    def test_padding_changes_no_outputs(self, here):
        tokenizer, model, _ = load_pieces(ModelArguments("gpt2"), find_task("rte"))
        batch = tokenizer(["w1 w2 w3 w4", "w5"], padding=True, return_tensors="pt")
        alone = tokenizer(["w5"], return_tensors="pt")
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(**batch).logits[1], model(**alone).logits[0])

    def test_without_both_tokens_it_is_refused(self, here):
        assert "no_end has neither a padding nor an end token" in refused(lambda: start_from("no_end"))


@pytest.mark.slow
class TestAnotherTasksModel:
    @pytest.mark.parametrize("task, outputs", [("RTE", 2), ("MRPC", 2), ("STS-B", 1)])
    @pytest.mark.parametrize("folder", ["mnli", "compact"])
    def test_training_starts_from_it_with_new_outputs(self, here, task, outputs, folder, caplog):
        line = ["--task_name", task, "--data_dir", f"data/{task}", "--model_name_or_path", folder, "--do_train"]
        line += ["--use_cpu", "--cache_dir", "cache", "--output_dir", "never"]
        if folder == "compact" and transformers.__version__.startswith("5.0."):
            assert "3 outputs where" in refused(lambda: GlueRun(parse(line, "run_glue")))
            return
        with caplog.at_level("INFO"):
            weights = [
                GlueRun(parse([*line, "--seed", seed], "run_glue")).trainer.model.state_dict() for seed in "112"
            ]
        assert f"{folder} has 3 outputs but {task} needs {outputs}: its output layer starts anew" in caplog.text
        before = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
        for name, value in weights[0].items():
            assert torch.equal(value, weights[1][name]), name
            if not name.startswith("classifier"):
                assert torch.equal(value, before[name]), name
        head = weights[0]["classifier.weight"]
        assert head.shape == (outputs, 24) and 0.005 < head.std() < 0.05
        assert not torch.equal(head, weights[2]["classifier.weight"])

    def test_a_pruned_model_comes_out(self, here):
        results = start_from("mnli", "run_dsp", "RTE", "--do_eval")
        assert (results["heads_kept"], results["heads_total"]) == (6, HEADS)
        again = refused(lambda: start_from("out_mnli_run_dsp_RTE", "run_dsp", "RTE", "--do_eval"))
        assert "was pruned to 6 of 24 heads already" in again
        more = ["--pruner", "given", "--head_mask_file", "out_mnli_run_dsp_RTE/masks.safetensors", "--do_eval"]
        assert start_from("out_mnli_run_dsp_RTE", "run_glue", "RTE", *more)["heads_kept"] == 6

    def test_without_training_it_is_refused(self, here):
        wanted = "mnli has 3 outputs but RTE needs 2; give a model fine-tuned on RTE."
        assert refused(lambda: start_from("mnli", "run_michel")) == wanted
        line = "--task_name RTE --data_dir data/RTE --model_name_or_path mnli --output_dir never --use_cpu".split()
        for do in ("--do_eval", "--do_predict"):
            assert refused(lambda do=do: run(parse([*line, do], "run_glue"))) == wanted

    def test_only_the_outputs_may_differ(self, here, tmp_path):
        wide = Path(shutil.copytree("mnli", tmp_path / "wide"))
        config = json.loads((wide / "config.json").read_text())
        (wide / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
        sentence = refused(lambda: start_from(str(wide)))
        assert "has the shape (32,) where the configuration says (40,); give the configuration" in sentence

    def test_a_classifier_is_a_start_for_squad(self, here):
        words = ["--model_name_or_path", "mnli", "--output_dir", "never", "--do_train"]
        arguments = parse(words, "run_squad")
        assert load_squad_pieces(arguments.model, arguments.data)[1].qa_outputs.out_features == 2

    def test_outputs_of_other_answers_are_no_start(self, here, tmp_path):
        AutoModelForQuestionAnswering.from_pretrained("bert", num_labels=3).save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained("bert").save_pretrained(tmp_path)
        assert f"{tmp_path} has 3 outputs, but SQuAD" in refused(lambda: start_from(str(tmp_path), "run_squad"))


@pytest.mark.parametrize("missing", ["data/RTE/test.tsv"])
def test_predictions_need_their_file_before_training(here, missing):
    kept = Path(missing).rename("test.tsv")
    try:
        sentence = refused(lambda: start_from("bert", "run_glue", "RTE", "--do_predict"))
        assert sentence.startswith(f"There is no file {missing} to predict") and "prepare.glue --tasks RTE" in sentence
        start_from("bert")  # and without --do_predict none
    finally:
        kept.rename(missing)


def test_predictions_have_the_numbers_of_the_test_file(here):
    rows = Path("data/RTE/test.tsv").read_text()
    header, *lines = rows.splitlines()
    try:
        Path("data/RTE/test.tsv").write_text("\n".join([header, *lines[10:]]) + "\n")
        words = ["--do_predict", "--remove_unused_columns", "False"]
        start_from("bert", "run_glue", "RTE", *words)
    finally:
        Path("data/RTE/test.tsv").write_text(rows)
    written = Path("out_bert_run_glue_RTE/RTE.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in written] == ["index", *(str(i) for i in range(10, 24))]
