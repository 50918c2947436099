"""What the command line and the files tell is checked before a model's weights are loaded."""

import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from head_pruning import HeadPruningError
from hf_plugin import open_session, pruner
from hf_plugin.command_line.arguments import parse
from hf_plugin.command_line.michel import parse_michel
from hf_plugin.glue.michel import run as run_michel
from hf_plugin.glue.run import run as run_glue
from hf_plugin.squad.run import run as run_squad
from tests.hf.script_runs import TINY, write_place
from tests.hf.squad_files import write_bert, write_squad
from tests.hf.tiny import tiny_bert

GLUE = "--model_name_or_path bert-base-uncased --task_name MRPC --data_dir data/MRPC --cache_dir cache --do_train"
MICHEL = "--model_name_or_path bert-base-uncased --task_name MRPC --data_dir data/MRPC --cache_dir cache --no_cuda"
SQUAD = "--model_name_or_path squad-bert --data_dir data/squad --do_train --do_eval --cache_dir cache"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = write_place(tmp_path_factory.mktemp("cheap"), "MRPC", "RTE")
    write_squad(place / "data/squad")
    write_bert(place / "squad-bert")
    return place


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    """Loading any weights would be too late."""

    def load(cls, *args, **options):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(load))


def emptied(name: str, keep: int) -> None:
    path = Path(name)
    shutil.copy(path, f"{name}.whole")
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:keep]), encoding="utf-8")


HEADS = "99 heads"
PRUNERS = [
    ("--pruner dsp --num_of_heads 99 --joint_pruning", HEADS),
    ("--pruner random --num_of_heads 99", HEADS),
    ("--pruner ste --num_of_heads 3 --min_heads_per_layer 9 --joint_pruning", "min-heads-per-layer 9"),
    ("--pruner platon --final_threshold 0.5 --weights_include nowhere", "No trainable weight"),
]


@pytest.mark.parametrize("flags, words", PRUNERS)
@pytest.mark.parametrize("script", ["run_glue", "run_squad"])
def test_options_that_fit_no_such_model(here, script, flags, words):
    line, run = (GLUE, run_glue) if script == "run_glue" else (SQUAD, run_squad)
    with pytest.raises(HeadPruningError, match=words):
        run(parse([*line.split(), *flags.split(), "--output_dir", "out", *TINY], script))


def test_more_heads_per_round_than_there_are(here):
    with pytest.raises(HeadPruningError, match="99 heads per round is not possible with 24 heads"):
        run_michel(parse_michel([*MICHEL.split(), "--num_of_heads", "99", "--output_dir", "michel"]))


@pytest.mark.parametrize("lines", [0, 1])
@pytest.mark.parametrize("script", ["glue", "michel"])
def test_empty_files(here, script, lines):
    emptied("data/MRPC/train.tsv", lines)
    try:
        with pytest.raises(HeadPruningError, match="train.tsv (has|holds) no "):
            if script == "glue":
                run_glue(parse([*GLUE.split(), "--output_dir", "empty", *TINY], "run_glue"))
            else:
                run_michel(parse_michel([*MICHEL.split(), "--output_dir", "empty-michel"]))
    finally:
        shutil.move("data/MRPC/train.tsv.whole", "data/MRPC/train.tsv")


def test_an_empty_file_of_questions(here):
    path = Path("data/squad/train-v1.1.json")
    whole = path.read_text()
    try:
        path.write_text("")
        with pytest.raises(HeadPruningError, match="train-v1.1.json"):
            run_squad(parse([*SQUAD.split(), "--output_dir", "no-questions", *TINY], "run_squad"))
    finally:
        path.write_text(whole)


@pytest.mark.parametrize("task, words", [("RTE", "is the folder of MRPC"), ("MRCP", "GLUE has no task 'MRCP'")])
def test_a_wrong_task(here, task, words):
    with pytest.raises(HeadPruningError, match=words):
        run_glue(parse([*GLUE.split(), "--task_name", task, "--output_dir", "wrong", *TINY], "run_glue"))
    with pytest.raises(HeadPruningError, match=words):
        run_michel(parse_michel([*MICHEL.split(), "--task_name", task, "--output_dir", "wrong-michel"]))


def test_sentences_of_python_name_arguments():
    with pytest.raises(HeadPruningError, match=r"^num_of_heads is 2.5; it must be a whole number"):
        pruner("dsp", num_of_heads=2.5)
    session = open_session(
        tiny_bert(), [pruner("dsp", num_of_heads=3, annealing=True, cooldown_steps=0.5, joint_pruning=True)]
    )
    with pytest.raises(HeadPruningError, match="set session.total_steps before the first update"):
        session.before_update(0)
