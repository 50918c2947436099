"""Methods that train gates alone, on models with parts that were never trained."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from head_pruning import HeadPruningError
from hf_plugin.command_line.arguments import parse
from hf_plugin.glue.run import run as run_glue
from hf_plugin.squad.run import run as run_squad
from tests.hf.script_runs import TINY, write_place
from tests.hf.squad_files import write_bert, write_squad

GLUE = "--model_name_or_path bert-base-uncased --task_name MRPC --data_dir data/MRPC --cache_dir cache --do_train"
SQUAD = "--model_name_or_path squad-bert --data_dir data/squad --do_train --cache_dir cache"
SCHEDULE = "--annealing --initial_temperature 1 --cooldown_steps 0.5"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = write_place(tmp_path_factory.mktemp("frozen"), "MRPC")
    write_squad(place / "data/squad")
    write_bert(place / "squad-bert")
    base = place / "bert-base-uncased"
    AutoModelForSequenceClassification.from_pretrained(base).save_pretrained(place / "fine-tuned")
    AutoTokenizer.from_pretrained(base).save_pretrained(place / "fine-tuned")
    return place


@pytest.mark.parametrize("script, words, method", [
    ("run_glue", "--num_of_heads 3", "head_sensitivity"),
    ("run_dsp", f"--num_of_heads 3 {SCHEDULE}", "dsp"),
    ("run_voita", "--l0_penalty 0.1", "voita"),
])  # fmt: skip
def test_a_new_head_that_would_never_be_trained_is_refused(here, script, words, method):
    with pytest.raises(HeadPruningError) as refused:
        run_glue(parse([*GLUE.split(), *words.split(), "--output_dir", "out", *TINY], script))
    assert str(refused.value) == (
        f"{method} would train gates alone and leave the model as it is, but classifier.bias is not in "
        "bert-base-uncased and was never trained; add --joint_pruning to train the model too, or fine-tune it on the "
        "task first and start from the outcome."
    )


def test_answers_to_questions_too(here):
    with pytest.raises(HeadPruningError, match="but qa_outputs.bias is not in squad-bert and was never"):
        run_squad(parse([*SQUAD.split(), "--num_of_heads", "3", "--output_dir", "squad", *TINY], "run_squad"))


@pytest.mark.parametrize("method, words", [("head_sensitivity", "--joint_pruning"), ("random", "--pruner random")])
def test_methods_that_train_the_model_take_it(here, method, words):
    more = ["--num_of_heads", "3", "--output_dir", method, *TINY, "--max_steps", "2"]
    assert run_glue(parse([*GLUE.split(), *words.split(), *more], "run_glue"))["heads_kept"] == 3


def test_a_fine_tuned_model_stays_as_it_is(here):
    more = f"--num_of_heads 3 {SCHEDULE} --model_name_or_path fine-tuned --output_dir pipelined"
    assert run_glue(parse([*GLUE.split(), *more.split(), *TINY], "run_dsp"))["heads_kept"] == 3
    models = [AutoModelForSequenceClassification.from_pretrained(folder) for folder in ("fine-tuned", "pipelined")]
    first, last = (model.classifier.weight for model in models)
    assert torch.equal(first, last)
