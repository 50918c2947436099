"""One sparse pretrained model, locked and fine-tuned on five kinds of task by their scripts."""

import importlib
import json
import shutil

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForTokenClassification

from head_pruning import HeadPruningError
from head_pruning.weights import load_weight_masks
from hf_plugin import mark_compact, prune_heads
from hf_plugin.command_line.arguments import parse
from hf_plugin.command_line.michel import parse_michel
from hf_plugin.glue.michel import run as run_michel
from hf_plugin.ner.entities import entities, entity_scores
from hf_plugin.ner.run import NONE, NerRun
from hf_plugin.swag.run import COLUMNS
from tests.few import few
from tests.hf.script_runs import write_task
from tests.hf.squad_files import WORDS, write_bert, write_squad

TASKS = {
    "classification": "run_glue --task_name CoLA --data_dir data/CoLA --max_seq_length 24",
    "regression": "run_glue --task_name STS-B --data_dir data/STS-B --max_seq_length 24",
    "answers": "run_squad --data_dir data/squad --max_seq_length 48 --max_query_length 12 --doc_stride 16",
    "tokens": "run_ner --train_file data/train.json --validation_file data/dev.json --test_file data/test.jsonl",
    "choice": "run_swag --train_file data/swag.csv --validation_file data/swag.csv",
}
MODULES = {f"run_{name}": f"hf_plugin.{name}.run" for name in ("glue", "squad", "ner", "swag")}
LINE = """--model_name_or_path sparse --pruner_name lock --do_train --do_eval --cache_dir cache --use_cpu
    --disable_tqdm True --max_steps 6 --save_steps 3 --save_total_limit 2 --per_device_train_batch_size 4
    --learning_rate 1e-3 --seed 3 --output_dir""".split()
KINDS = ("O", "B-PER", "I-PER", "B-LOC")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Data of all tasks, and a pretrained model with 80 % zeros in its layers."""
    place = tmp_path_factory.mktemp("tasks")
    write_squad(place / "data" / "squad")
    for task in ("CoLA", "STS-B"):
        write_task(place / "data", task)
    rows = [[WORDS[(i * 3 + j * j) % 40] for j in range(3 + i % 4)] for i in range(16)]
    lines = [
        json.dumps({"tokens": row, "ner_tags": [KINDS[(len(word) + i + j) % 4] for j, word in enumerate(row)]})
        for i, row in enumerate(rows)
    ]
    for name in ("train", "dev"):
        (place / "data" / f"{name}.json").write_text("\n".join(lines) + "\n")
    (place / "data" / "test.jsonl").write_text("\n".join(json.dumps({"tokens": row}) for row in rows) + "\n")
    swag = [f"{a[0]} {a[1]},the,{a[2]},{b[0]},{b[1]},{b[2]},{i % 4}" for i, (a, b) in enumerate(zip(rows, rows[::-1]))]
    (place / "data" / "swag.csv").write_text("sent1,sent2,ending0,ending1,ending2,ending3,label\n" + "\n".join(swag))
    folder = write_bert(place / "sparse")
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if "encoder.layer" in name and weight.dim() > 1 and "LayerNorm" not in name:
            weight[weight.abs() <= weight.abs().flatten().kthvalue(int(0.8 * weight.numel())).values] = 0.0
        elif name.endswith("bias"):
            weight.normal_(std=0.02, generator=torch.Generator().manual_seed(len(name)))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return place


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def run(task: str, out: str, *more: str) -> dict[str, float]:
    script, *line = TASKS[task].split()
    return importlib.import_module(MODULES[script]).run(parse([*line, *LINE, out, *more], script))


def same_zeros(folder) -> None:
    """The zeros of the layers are those of pretraining, everything else was trained, the head is dense."""
    first, then = load_file("sparse/model.safetensors"), load_file(folder / "model.safetensors")
    layers = {name: name.partition("encoder.")[2] for name in then if ".layer." in name and then[name].dim() > 1}
    assert len(layers) == 12
    for name, inner in layers.items():
        before = first[f"encoder.{inner}"]
        assert torch.equal(then[name] == 0, before == 0) and not torch.equal(then[name], before), name
        assert 0.75 < (before == 0).float().mean() < 0.85
    heads = [name for name in then if name.startswith(("classifier", "qa_outputs"))]
    assert len(heads) == 2 and all(then[name].all() for name in heads)
    masks = load_weight_masks(folder / "masks.safetensors")
    assert set(layers) <= set(masks) and not any(name in masks for name in heads)


@pytest.mark.parametrize("task", few(TASKS, "tokens"))
def test_zeros_stay_and_a_resumed_run_ends_bit_equal(here, task):
    results = run(task, task)
    same_zeros(here / task)
    assert results["weights_kept"] < 0.3 * results["weights_total"] and results["eval_loss"] > 0
    if transformers.__version__.startswith("5.0."):
        return  # it saves LayerNorms under names that it does not know when it resumes
    shutil.copytree(here / task, here / f"{task}-again", ignore=shutil.ignore_patterns("checkpoint-6"))
    names = ("model.safetensors", "masks.safetensors")
    for name in names:
        (here / f"{task}-again" / name).unlink()
    run(task, f"{task}-again")
    assert all((here / task / n).read_bytes() == (here / f"{task}-again" / n).read_bytes() for n in names)


@pytest.mark.slow
def test_zeros_stay_in_distillation(here):
    if not (here / "classification").is_dir():
        run("classification", "classification")
    run("classification", "learnt", "--distill", "logits", "--teacher_path", "classification")
    same_zeros(here / "learnt")
    assert json.loads((here / "learnt" / "pruning.json").read_text())["method"] == "lock+logits"


@pytest.mark.slow
def test_tags_of_a_test_set_are_written_and_labels_are_the_models(here):
    run("tokens", "tags", "--do_predict", "--return_entity_level_metrics", "--max_steps", "1")
    lines = (here / "tags" / "predictions.txt").read_text().splitlines()
    rows = [json.loads(line) for line in (here / "data" / "test.jsonl").read_text().splitlines()]
    assert [len(line.split()) for line in lines] == [len(row["tokens"]) for row in rows]
    assert {tag for line in lines for tag in line.split()} <= set(KINDS)
    stored = json.loads((here / "tags" / "all_results.json").read_text())
    assert {"eval_f1", "eval_accuracy", "eval_PER_f1", "eval_LOC_recall"} <= set(stored)
    model = AutoModelForTokenClassification.from_pretrained("tags")
    assert sorted(model.config.id2label.values()) == sorted(KINDS)
    script, *line = TASKS["tokens"].split()
    line = [*line, "--model_name_or_path", "tags", "--do_eval", "--output_dir", "scored", "--use_cpu"]
    again = importlib.import_module("hf_plugin.ner.run").run(parse([*line, "--cache_dir", "cache"], script))
    assert again["eval_loss"] == pytest.approx(stored["eval_loss"], abs=1e-5)


def test_a_word_is_scored_once_and_what_is_cut_off_is_told(here, caplog):
    """With --label_all_tokens too, which is about training."""
    row = json.dumps({"tokens": ["bar.", "bar", "bem"], "ner_tags": ["B-PER", "O", "O"]}) + "\n"
    (here / "data" / "pieces.json").write_text(row)
    flags = "--train_file data/pieces.json --validation_file data/pieces.json --label_all_tokens"
    for length in ("16", "5"):
        caplog.clear()
        line = [*LINE, f"pieces{length}", *flags.split(), "--max_seq_length", length, "--eval_strategy", "no"]
        parts = NerRun(parse(line, "run_ner")).parts
        labels = {split: [label for label in part["labels"][0] if label != NONE] for split, part in parts.items()}
        found = [len(labels["train"]), len(labels["validation"])]
        assert found == ([4, 3] if length == "16" else [3, 2])
        assert ("1 rows of validation have words without a tag" in caplog.text) == (length == "5")


@pytest.mark.parametrize("task, flags, sentence", [
    ("tokens", "--validation_file data/none.json", "There is no file data/none.json; correct its name"),
    ("tokens", "--train_file data/squad", "data/squad ends in none of .json, .jsonl, .csv, .parquet"),
    ("tokens", "--label_column_name pos", "train.json has no column pos; it has tokens, ner_tags, and"),
    ("tokens", "--validation_file data/odd.json", "Row 0 of validation has the label 'B-ORG', which is none of"),
    ("tokens", "--train_file data/short.json", "Row 1 of train has 2 words and 1 labels; correct it"),
    ("tokens", "--max_seq_length 2", "--max_seq_length is 2, but 3 tokens or more are needed"),
    ("choice", "--train_file data/train.json", "train.json has no column sent1; it has tokens, ner_tags"),
    ("choice", "--do_predict", "run_swag.py has no test set, as SWAG's has no labels; drop --do_predict"),
    ("choice", "--train_file data/five.csv", "Row 0 of train has the label 5, which should be one of 0, 1, 2, 3"),
    ("choice", "--train_file data/gap.csv", "Row 1 of train has no text in ending2; give it one"),
    ("tokens", "--train_file data/null.json", "Row 1 of train has no list of words in tokens; give one"),
    ("tokens", "--train_file data/word.json", "Row 0 of train has no list of words in tokens; give one"),
])  # fmt: skip
def test_mistakes_end_in_a_sentence(here, task, flags, sentence):
    for name, rows in (("odd", [["B-ORG", "O"]]), ("short", [["O", "O"], ["O"]])):
        lines = [json.dumps({"tokens": ["bar", "bem"], "ner_tags": tags}) for tags in rows]
        (here / "data" / f"{name}.json").write_text("\n".join(lines) + "\n")
    (here / "data" / "five.csv").write_text("sent1,sent2,ending0,ending1,ending2,ending3,label\na,b,c,d,e,f,5\n")
    (here / "data" / "gap.csv").write_text(f"{','.join(COLUMNS)}\na,b,c,d,e,f,1\na,b,c,d,,f,1\n")
    (here / "data" / "null.json").write_text(f'{lines[0]}\n{{"tokens": null, "ner_tags": []}}\n')
    (here / "data" / "word.json").write_text('{"tokens": ["bar", null], "ner_tags": ["O", "O"]}\n')
    with pytest.raises(HeadPruningError, match=sentence):
        run(task, f"mistake-{abs(hash(flags))}", *flags.split())


# -- 8-bit folders ----------------------------------------------------------------------------------------------------


def _folder(here, kind: str) -> str:
    """What a run starts from: the sparse model, whole or without some of its heads."""
    if kind == "compact" and not (here / kind).is_dir():
        shutil.copytree(here / "sparse", here / kind)
        model = AutoModel.from_pretrained("sparse")
        prune_heads(model, {0: [0], 1: list(range(model.config.num_attention_heads))})
        mark_compact(model)
        model.save_pretrained(here / kind)
    return "sparse" if kind == "whole" else kind


@pytest.mark.parametrize("kind", ["whole", "compact"])
@pytest.mark.parametrize("task", few(TASKS, "tokens"))
def test_an_8_bit_folder_scores_as_it_did_in_training(here, task, kind):
    pytest.importorskip("torchao")
    out, name = f"int8-{task}-{kind}", _folder(here, kind)
    trained = run(task, out, "--model_name_or_path", name, "--do_quantization", "--max_steps", "2")
    script, *line = TASKS[task].split()
    line += ["--model_name_or_path", out, "--cache_dir", "cache", "--use_cpu", "--disable_tqdm", "True"]
    more = [] if task == "choice" else ["--do_predict"]  # it has no test set
    start = importlib.import_module(MODULES[script]).run
    scored = start(parse([*line, "--do_eval", *more, "--output_dir", f"{out}-scored"], script))
    names = {n for n in trained if n.startswith("eval_") and "second" not in n and "runtime" not in n}
    assert len(names) >= 3 and {n: scored[n] for n in names} == {n: trained[n] for n in names}
    for others in ([], ["--pruner_name", "lock"]):
        with pytest.raises(HeadPruningError, match=f"weights in {out} are 8-bit integers, .* start from the model in"):
            start(parse([*line, *others, "--do_train", "--output_dir", f"{out}-refused"], script))
    if task == "classification":
        line = "--task_name CoLA --data_dir data/CoLA --num_of_heads 1 --no_cuda --output_dir refused".split()
        with pytest.raises(HeadPruningError, match=f"weights in {out} are 8-bit integers"):
            run_michel(parse_michel([*line, "--model_name_or_path", out]))


# -- entities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tags, found", [
    ("B-PER I-PER O B-PER", {("PER", 0, 2), ("PER", 3, 4)}),
    ("I-PER I-PER B-PER", {("PER", 0, 2), ("PER", 2, 3)}),  # IOB1
    ("B-PER I-LOC", {("PER", 0, 1), ("LOC", 1, 2)}),
    ("B-PER E-PER S-PER S-LOC", {("PER", 0, 2), ("PER", 2, 3), ("LOC", 3, 4)}),  # IOBES
    ("B-PER L-PER U-PER I-PER", {("PER", 0, 2), ("PER", 2, 3), ("PER", 3, 4)}),  # BILOU
    ("NOUN NOUN B O", {("NOUN", 0, 2), ("B", 2, 3)}),  # kinds alone
    ("O O", set()),
])  # fmt: skip
def test_entities_of_every_scheme(tags, found):
    assert entities(tags.split()) == found


@given(st.lists(st.tuples(st.sampled_from(["PER", "LOC"]), st.integers(1, 3), st.integers(0, 2)), max_size=6))
def test_entities_come_back_from_their_tags(parts):
    tags, wanted = [], set()
    for kind, length, gap in parts:
        wanted.add((kind, len(tags), len(tags) + length))
        tags += [f"B-{kind}", *[f"I-{kind}"] * (length - 1), *["O"] * gap]
    assert entities(tags) == wanted
    assert entity_scores([tags], [tags])["f1"] == (1.0 if parts else 0.0)


def test_scores_count_whole_entities():
    wanted, found = [["B-PER", "I-PER", "O", "B-LOC"]], [["B-PER", "O", "O", "B-LOC"]]
    scores = entity_scores(found, wanted, by_kind=True)
    assert (scores["precision"], scores["recall"], scores["f1"], scores["accuracy"]) == (0.5, 0.5, 0.5, 0.75)
    assert (scores["LOC_f1"], scores["PER_recall"]) == (1.0, 0.0)
