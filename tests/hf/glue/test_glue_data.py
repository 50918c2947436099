"""GLUE: files, hub, tokenised data, metrics and prediction files."""

import logging
import math
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
)

from head_pruning import HeadPruningError
from hf_plugin.glue.features import load_task
from hf_plugin.glue.hub import from_hub, hub_split, load_hub
from hf_plugin.glue.metrics import compute_metrics
from hf_plugin.glue.reading import read_split, read_tsv
from hf_plugin.glue.submission import write_predictions
from hf_plugin.glue.tasks import TASKS, find_task
from tests.hf.glue_files import FOLDERS, LABELS, OFFICIAL, hub_table, texts, write_official, write_repository

ROOT = Path(__file__).resolve().parents[3]
REAL = ROOT.parent / "shared" / "data" / "glue"
PAIRS = [folder for folder in FOLDERS if folder not in ("CoLA", "SST-2")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    place = tmp_path_factory.mktemp("data")
    for folder in FOLDERS:
        write_official(place, folder)
    return place


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return write_repository(tmp_path_factory.mktemp("hub") / "glue")


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    place = tmp_path_factory.mktemp("tokenizer")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(20)), *'"abcdefghil', "##a", "'"]
    (place / "vocab.txt").write_text("\n".join(words) + "\n")
    return place


@pytest.fixture
def tokenizer(vocabulary):
    return BertTokenizer.from_pretrained(vocabulary)


@pytest.fixture
def cola(data, tmp_path):
    """A copy of CoLA's folder that may be spoilt."""
    return Path(shutil.copytree(data / "CoLA", tmp_path / "CoLA"))


def _one_sentence(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert message.endswith(".") and "\n" not in message and ". " not in message, message
    return message


@pytest.mark.parametrize(
    ("spelling", "name"),
    [("MNLI", "mnli"), ("mnli", "mnli"), ("sst-2", "sst-2"), ("SST2", "sst-2"), ("stsb", "sts-b"), ("STS_B", "sts-b")]
    + [("CoLA", "cola"), ("cola", "cola"), ("MRPC", "mrpc"), ("qqp", "qqp"), ("QNLI", "qnli"), ("rte", "rte")],
)
def test_a_task_is_found_under_its_usual_spellings(spelling, name):
    assert find_task(spelling).name == name


def test_there_are_nine_tasks_and_another_name_lists_them():
    assert [task.folder for task in TASKS.values()] == FOLDERS
    with pytest.raises(HeadPruningError, match="no task 'snli'.*CoLA, SST-2") as error:
        find_task("snli")
    _one_sentence(error)


def test_classes_have_the_order_of_the_original_processors():
    orders = {name: task.written for name, task in TASKS.items() if task.written not in (None, ("0", "1"))}
    both = ("entailment", "not_entailment")
    assert orders == {"mnli": ("contradiction", "entailment", "neutral"), "qnli": both, "rte": both}
    assert TASKS["mnli"].id2label == {0: "contradiction", 1: "entailment", 2: "neutral"}
    assert TASKS["mnli"].label2id == {"contradiction": 0, "entailment": 1, "neutral": 2}
    assert TASKS["sts-b"].id2label == {} and TASKS["sts-b"].num_labels == 1 and TASKS["mnli"].num_labels == 3


def test_the_order_of_a_fine_tuned_model_can_be_taken_over(data):
    task = TASKS["mnli"]
    other = task.ordered_as({0: "ENTAILMENT", 1: "NEUTRAL", 2: "CONTRADICTION"})
    assert other.labels == other.written == ("entailment", "neutral", "contradiction")
    assert read_split(other, other.train, data / "MNLI")["label"][:3] == [1, 2, 0]
    assert task.ordered_as({0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}) is task
    reverse = TASKS["cola"].ordered_as({0: "acceptable", 1: "unacceptable"})
    assert reverse.written == ("1", "0")


def _columns(folder, stem, labelled):
    pairs = texts(folder, stem)
    columns = {"sentence1": [a for a, _ in pairs]}
    if folder in PAIRS:
        columns["sentence2"] = [b for _, b in pairs]
    if labelled:
        written = TASKS[folder.lower()].written
        numbers = [np.float32(text) if written is None else written.index(text) for text in LABELS[folder]]
        columns["label"] = numbers
    return {**columns, "idx": list(range(len(pairs)))}


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_official_file_is_read(data, folder):
    task = find_task(folder)
    assert [split.file for split in task.splits] == [f"{stem}.tsv" for stem in OFFICIAL[folder]]
    for split, stem in zip(task.splits, OFFICIAL[folder], strict=True):
        found = read_split(task, split, data / folder)
        assert found.to_dict() == _columns(folder, stem, split.labelled)
        if split.labelled and task.labels:
            assert found.features["label"].names == list(task.labels)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_hub_and_the_files_give_the_same(data, repository, folder, tmp_path):
    task = find_task(folder)
    tables = load_hub(task, str(repository), str(tmp_path))
    for split in task.splits:
        ours = hub_split(task, split, tables, str(repository))
        theirs = read_split(task, split, data / folder)
        assert ours.to_dict() == theirs.to_dict() and ours.features == theirs.features


def test_mnli_of_the_hub_has_its_classes_numbered_anew():
    assert hub_table("MNLI", "train")["label"][:3] == [1, 2, 0]
    task = TASKS["mnli"]
    assert from_hub(task, task.train, hub_table("MNLI", "train"), "It")["label"][:3] == [2, 0, 1]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_task_is_tokenised_without_padding(data, tokenizer, folder, tmp_path):
    found = load_task(folder, tokenizer=tokenizer, data_dir=data / folder, cache_dir=tmp_path, max_seq_length=8)
    task = find_task(folder)
    keys = ["mnli", "mnli-mm"] if folder == "MNLI" else [task.name]
    assert found.task is task and list(found.validation) == keys and list(found.test) == keys
    splits = [found.train, *found.validation.values(), *found.test.values()]
    for split, stem in zip(splits, OFFICIAL[folder], strict=True):
        for row, (first, second) in zip(split, texts(folder, stem), strict=True):
            pair = (first, second) if folder in PAIRS else (first,)
            expected = tokenizer(*pair, truncation=True, max_length=8)
            assert row["input_ids"] == expected["input_ids"] and len(row["input_ids"]) <= 8
            assert row["attention_mask"] == [1] * len(row["input_ids"])
        assert set(split.column_names) - {"label"} == {"input_ids", "token_type_ids", "attention_mask"}
        assert ("label" in split.column_names) is not stem.startswith("test")
    assert list(found.train["label"]) == _columns(folder, "train", True)["label"]


def test_the_hub_is_loaded_where_no_folder_is_given(data, repository, tokenizer, tmp_path):
    arguments = {"tokenizer": tokenizer, "cache_dir": tmp_path}
    ours = load_task("mnli", repository=str(repository), **arguments)
    theirs = load_task("mnli", data_dir=data / "MNLI", **arguments)
    assert ours.train.to_dict() == theirs.train.to_dict()
    assert ours.validation["mnli-mm"].to_dict() == theirs.validation["mnli-mm"].to_dict()
    assert list(ours.test) == ["mnli", "mnli-mm"] and "label" not in ours.test["mnli"].column_names


def test_only_the_splits_asked_for_are_read_and_test_files_may_be_missing(cola, tokenizer, tmp_path):
    (cola / "test.tsv").unlink()
    found = load_task("cola", tokenizer=tokenizer, data_dir=cola, cache_dir=tmp_path)
    assert len(found.train) == 6 and found.test == found.ids == {}
    (cola / "train.tsv").unlink()
    found = load_task("cola", tokenizer=tokenizer, data_dir=cola, cache_dir=tmp_path, splits=["validation"])
    assert found.train is None and list(found.validation) == ["cola"] and found.test == {}
    with pytest.raises(HeadPruningError, match="no split 'dev'") as error:
        load_task("cola", tokenizer=tokenizer, data_dir=cola, splits=("dev",))
    _one_sentence(error)


def test_a_test_file_that_was_asked_for_must_be_there(data, tokenizer, tmp_path):
    mnli = Path(shutil.copytree(data / "MNLI", tmp_path / "MNLI"))
    (mnli / "test_matched.tsv").unlink()
    arguments = {"tokenizer": tokenizer, "data_dir": mnli, "cache_dir": tmp_path / "cache"}
    assert list(load_task("mnli", **arguments).test) == ["mnli-mm"]
    for splits in (["test"], ["train", "test"]):
        with pytest.raises(HeadPruningError, match=r"no file .*test_matched\.tsv to predict.*--tasks MNLI") as error:
            load_task("mnli", splits=splits, **{**arguments, "cache_dir": tmp_path / "none"})
        assert "--do_predict" in _one_sentence(error)
    assert not (tmp_path / "none").exists()  # said before anything is tokenised


def test_rows_keep_the_numbers_that_glue_knows_them_by(data, repository, tokenizer, tmp_path):
    for folder in FOLDERS:
        place = tmp_path / folder
        shutil.copytree(data / folder, place)
        for split in find_task(folder).test:
            header, *rows = (place / split.file).read_bytes().rstrip(b"\n").split(b"\n")
            (place / split.file).write_bytes(b"\n".join([header, *reversed(rows[2:])]))
        found = load_task(folder, tokenizer=tokenizer, data_dir=place, cache_dir=tmp_path, splits=["test"])
        assert set(map(tuple, found.ids.values())) == {(5, 4, 3, 2)} and list(found.ids) == list(found.test)
        assert not {"idx", "index", "id"} & set(next(iter(found.test.values())).column_names)
    task = TASKS["rte"]
    table = hub_table("RTE", "test").select([4, 1])
    assert from_hub(task, task.test[0], table, "It")["idx"][:] == [4, 1]
    assert from_hub(task, task.test[0], table.remove_columns("idx"), "It")["idx"][:] == [0, 1]
    path = write_predictions(task, "rte", [0, 1], tmp_path, [4, 1])
    assert path.read_text() == "index\tprediction\n4\tentailment\n1\tnot_entailment\n"
    with pytest.raises(HeadPruningError, match=r"2 predictions for 1 rows of test\.tsv") as error:
        write_predictions(task, "rte", [0, 1], tmp_path, [4])
    _one_sentence(error)


@pytest.mark.parametrize(
    ("folder", "content", "expected"),
    [
        ("QQP", "id\tquestion1\tquestion2\n0\ta\tb\n1\ta\n2\ta\tb\n", "line 3, has 2 columns where 3 belong"),
        ("RTE", "index\tsentence1\tsentence2\nx\ta\tb\n", "line 2, has the index 'x', which should be a number"),
        ("RTE", "index\tsentence1\tsentence2\n7\ta\tb\n7\ta\tb\n", "line 3, has the index 7, as a line before it"),
    ],
)
def test_a_test_file_is_read_whole_or_not_at_all(tmp_path, folder, content, expected):
    (tmp_path / "test.tsv").write_text(content)
    task = find_task(folder)
    with pytest.raises(HeadPruningError, match=expected) as error:
        read_split(task, task.test[0], tmp_path)
    _one_sentence(error)


@pytest.mark.parametrize(
    ("task", "folder", "expected"),
    [
        ("CoLA", "SST-2", r"SST-2/ is the folder of SST-2, but the task is CoLA; .* or --task_name SST-2\."),
        ("WNLI", "RTE", "is the folder of RTE, but the task is WNLI"),
    ],
)
def test_the_folder_of_another_task_is_refused(data, tokenizer, tmp_path, task, folder, expected):
    with pytest.raises(HeadPruningError, match=expected) as error:
        load_task(task, tokenizer=tokenizer, data_dir=f"{data / folder}/", cache_dir=tmp_path)
    _one_sentence(error)


@pytest.mark.parametrize(
    ("task", "folder", "stem"), [("CoLA", "RTE", "test"), ("SST-2", "QNLI", "test"), ("RTE", "MRPC", "dev")]
)
def test_the_columns_of_another_task_are_refused(data, task, folder, stem):
    with pytest.raises(
        HeadPruningError, match=rf"{stem}\.tsv is another task's: it has the columns .*{task}"
    ) as error:
        read_tsv(data / folder / f"{stem}.tsv", find_task(task), labelled=stem == "dev")
    _one_sentence(error)


def _files(place):
    return {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}


def test_the_cache_is_used_until_something_changes_and_the_data_stay_untouched(cola, tokenizer, tmp_path):
    cache = tmp_path / "cache"
    before = _files(cola)

    def load(**changes):
        options = {"tokenizer": tokenizer, "data_dir": cola, "cache_dir": cache, "splits": ["train"], **changes}
        load_task("cola", **options)
        return _files(cache)

    first = load()
    assert len(first) == 1 and load() == first and _files(cola) == before
    again = load(overwrite_cache=True)
    assert again.keys() == first.keys() and again != first
    assert len(load(max_seq_length=6)) == 2
    tokenizer.add_tokens(["CoLA"])
    assert len(load()) == 3
    (cola / "train.tsv").write_text("gj04\t1\t\tw1 w2\n")
    assert len(load()) == 4


# Whether a connection is opened is seen best by a process of its own.
ALONE = """
import sys
tried = []
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        tried.append((event, arguments))
sys.addaudithook(watch)
from transformers import BertTokenizer
from hf_plugin.glue.features import load_task
data, cache, vocabulary = sys.argv[1:]
found = load_task("MNLI", tokenizer=BertTokenizer.from_pretrained(vocabulary), data_dir=data, cache_dir=cache)
assert len(found.train) == 6 and not tried, tried
"""


def test_the_tokenizer_stays_as_it_was(cola, vocabulary, tmp_path):
    # It is saved with the model, and would be another one where the cache has the data.
    own = BertTokenizer.from_pretrained(vocabulary)
    load_task("CoLA", tokenizer=own, data_dir=cola, cache_dir=tmp_path, max_seq_length=9)
    assert own.backend_tokenizer.truncation is None and own.backend_tokenizer.padding is None


def test_files_need_no_network_and_processes_share_the_cache(data, vocabulary, tokenizer, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in environment.items() if not name.endswith("_OFFLINE")}
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", ALONE, str(data / "MNLI"), str(cache), str(vocabulary)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "home" / "datasets").exists()
    before = _files(cache)
    load_task("MNLI", tokenizer=tokenizer, data_dir=data / "MNLI", cache_dir=cache)
    assert len(before) == 5 and _files(cache) == before


def test_a_repository_without_the_task_gives_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(HeadPruningError, match=r"RTE cannot be loaded.*--data_dir") as error:
        load_hub(TASKS["rte"], str(tmp_path / "empty"), str(tmp_path / "cache"))
    _one_sentence(error)


SPOILT = {
    "a missing file": ("CoLA", None, r"no file .*train\.tsv.*prepare\.glue --tasks CoLA"),
    "an empty file": ("CoLA", "", r"train\.tsv has no rows"),
    "blank lines only": ("CoLA", "\n\n\n", r"train\.tsv has no rows"),
    "a header only": ("RTE", "index\tsentence1\tsentence2\tlabel\n", r"train\.tsv has no rows"),
    "too few columns": ("CoLA", "gj04\t1\t\tw1\ngj04\t1\tw2\n", r"train\.tsv, line 2, has 3 columns where 4 belong"),
    "too many columns": ("SST-2", "sentence\tlabel\nw1\tw2\t1\n", r"line 2, has 3 columns where 2 belong"),
    "a wrong first line": ("CoLA", "w1 w2\t1\n", r"line 1, has 2 columns where 4 belong \(source, label"),
    "an unknown column": ("RTE", "index\tpremise\tsentence2\tlabel\n", r"no column 'sentence1' in its first line"),
    "an unlabelled file": ("SST-2", "index\tsentence\n0\tw1\n", r"no column 'label' in its first line"),
    "an unknown label": ("CoLA", "gj04\t1\t\tw1\n\ngj04\t2\t\tw2\n", r"line 3, has the label '2'.*one of 0, 1"),
    "a name for a label": ("QNLI", "question\tsentence\tlabel\na\tb\tmaybe\n", r"line 2.*one of entailment, not_ent"),
    "no number": ("STS-B", "sentence1\tsentence2\tscore\na\tb\thigh\n", r"line 2.*'high'.*number from 0 to 5"),
    "a score above 5": ("STS-B", "sentence1\tsentence2\tscore\na\tb\t5.1\n", r"line 2.*'5.1'.*number from 0 to 5"),
    "no finite score": ("STS-B", "sentence1\tsentence2\tscore\na\tb\tnan\n", r"line 2.*'nan'.*number from 0 to 5"),
    "another encoding": ("CoLA", b"gj04\t1\t\tw1\ngj04\t1\t\tnaiv\xe9\n", r"line 2, is not UTF-8"),
    "broken lines only": ("QQP", "question1\tquestion2\tis_duplicate\nw1\n", r"train\.tsv has no rows"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_file_is_named_with_its_line(tmp_path, case):
    folder, content, expected = SPOILT[case]
    if content is not None:
        (tmp_path / "train.tsv").write_bytes(content if isinstance(content, bytes) else content.encode())
    task = find_task(folder)
    with pytest.raises(HeadPruningError, match=expected) as error:
        read_split(task, task.train, tmp_path)
    assert str(tmp_path) in _one_sentence(error)


def test_official_qqp_files_are_read_without_their_broken_lines(tmp_path, caplog):
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
    lines = [header, "0\t1\t2\tw1\tw2\t1", "1\t3\t4\tw3", "\tw4\t0", "2\t5\t6\tw5\tw6\t0"]
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n")
    found = read_tsv(tmp_path / "train.tsv", TASKS["qqp"])
    assert list(found["sentence1"]) == ["w1", "w5"] and list(found["idx"]) == [0, 1]
    assert "2 lines of a wrong number of columns left out (first: 3)" in caplog.text


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_bytes("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\tw1\tw2\r\n".encode("utf-8-sig"))
    assert read_tsv(path, TASKS["mrpc"]).to_dict() == {
        "sentence1": ["w1"],
        "sentence2": ["w2"],
        "label": [1],
        "idx": [0],
    }
    path.write_bytes("Quality\t#1 String\t#2 String\r\n".encode("utf-8-sig") + b"0\tw1\tw2\r\n")
    assert list(read_tsv(path, TASKS["mrpc"])["sentence1"]) == ["w1"]


@pytest.mark.parametrize(
    "content",
    ["index\tsentence\n7\tw1 w2\n", "7\tw1 w2\n", "gj04\t1\t\tw1 w2\n", "w1 w2\n", "\ufeffgj04\t1\t*\tw1 w2"],
)
def test_cola_test_files_are_read_with_and_without_a_header(tmp_path, content):
    (tmp_path / "test.tsv").write_text(content)
    task = TASKS["cola"]
    idx = 7 if "7\t" in content else 0
    assert read_split(task, task.test[0], tmp_path).to_dict() == {"sentence1": ["w1 w2"], "idx": [idx]}


def test_cola_train_files_may_have_a_header(tmp_path):
    (tmp_path / "train.tsv").write_text("sentence\tlabel\nw1\t0\n")
    assert read_tsv(tmp_path / "train.tsv", TASKS["cola"]).to_dict() == {"sentence1": ["w1"], "label": [0], "idx": [0]}


def test_labels_of_the_hub_are_refused_where_they_say_nothing():
    task = TASKS["mnli"]
    table = hub_table("MNLI", "train")
    bare = table.cast_column("label", table.features["idx"])
    for wrong, expected in [
        (bare, "has the label 1, which names none of contradiction, entailment, neutral"),
        (hub_table("MNLI", "test_matched"), "has the label -1, which names none of"),
        (table.remove_columns("premise"), "no column 'premise'"),
        (table.select([]), "has no rows"),
        (table.remove_columns("label"), "no column 'label'"),
    ]:
        with pytest.raises(HeadPruningError, match=expected) as error:
            from_hub(task, task.train, wrong, "The copy")
        assert _one_sentence(error).startswith("The copy")
    with pytest.raises(HeadPruningError, match="has the label -1.0, no number from 0 to 5"):
        from_hub(TASKS["sts-b"], TASKS["sts-b"].train, hub_table("STS-B", "test"), "The copy")
    cola = hub_table("CoLA", "train")
    assert list(
        from_hub(TASKS["cola"], TASKS["cola"].train, cola.cast_column("label", cola.features["idx"]), "")["label"]
    ) == [int(label) for label in LABELS["CoLA"]]


def test_lengths_are_held_to_what_the_tokenizer_can_do(data, tokenizer, tmp_path, caplog):
    tokenizer.model_max_length = 6
    arguments = {"tokenizer": tokenizer, "data_dir": data / "RTE", "cache_dir": tmp_path}
    found = load_task("rte", max_seq_length=128, splits=["train"], **arguments)
    assert max(map(len, found.train["input_ids"])) == 6 and "6 is used" in caplog.text
    with pytest.raises(HeadPruningError, match="max_seq_length is 4, but RTE needs 5 tokens or more") as error:
        load_task("rte", max_seq_length=4, **arguments)
    _one_sentence(error)


def test_a_cache_that_cannot_be_written_gives_one_sentence(data, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HeadPruningError, match=r"cannot be written to .*file.*--cache_dir") as error:
        load_task("cola", tokenizer=tokenizer, data_dir=data / "CoLA", cache_dir=tmp_path / "file")
    _one_sentence(error)


@pytest.mark.parametrize("folder", ["CoLA", "SST-2", "MRPC", "STS-B", "RTE", "WNLI"])
def test_real_files_are_read_whole(folder):
    if not (REAL / folder).is_dir():
        pytest.skip(f"there is no {REAL / folder}")
    task = find_task(folder)
    for split in task.splits:
        found = read_split(task, split, REAL / folder)
        assert len(found) == split.rows and all(found["sentence1"])
    if folder == "MRPC":
        assert np.bincount(read_split(task, task.train, REAL / folder)["label"]).tolist() == [1194, 2474]


def test_real_mnli_rows_are_read_with_all_three_classes():
    path = REAL / "MNLI" / "dev_subset.tsv"
    if not path.is_file():
        pytest.skip(f"there is no {path}")
    found = read_tsv(path, TASKS["mnli"])
    assert len(found) == 7723
    lines = path.read_text(encoding="utf-8").split("\n")[1:7724]
    assert [TASKS["mnli"].labels[label] for label in found["label"]] == [line.split("\t")[-1] for line in lines]


def _score(name, outputs, labels):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return compute_metrics(find_task(name))(EvalPrediction(predictions=outputs, label_ids=np.asarray(labels)))


def _logits(classes, width=2):
    return np.eye(width, dtype=np.float32)[classes] - 0.5


# 2 true positives, 1 false negative, 1 false positive, 1 true negative.
CLASSES, TRUTH = [1, 1, 0, 1, 0], [1, 1, 1, 0, 0]


@pytest.mark.parametrize("name", ["sst-2", "qnli", "rte", "wnli"])
def test_accuracy_by_hand(name):
    assert _score(name, _logits(CLASSES), TRUTH) == {"accuracy": 0.6}


def test_mnli_has_three_classes():
    assert _score("mnli", _logits([0, 1, 2, 2], 3), [0, 1, 2, 0]) == {"accuracy": 0.75}


@pytest.mark.parametrize("name", ["mrpc", "qqp"])
def test_accuracy_and_f1_by_hand(name):
    expected = {"accuracy": 0.6, "f1": 2 / 3, "combined_score": (0.6 + 2 / 3) / 2}
    assert _score(name, _logits(CLASSES), TRUTH) == pytest.approx(expected)


def test_f1_follows_the_class_where_the_order_is_another():
    task = TASKS["mrpc"].ordered_as({0: "equivalent", 1: "not_equivalent"})
    outputs, labels = _logits(CLASSES)[:, ::-1], 1 - np.array(TRUTH)
    found = compute_metrics(task)(EvalPrediction(predictions=outputs, label_ids=labels))
    assert found == pytest.approx(_score("mrpc", _logits(CLASSES), TRUTH))


def test_matthews_correlation_by_hand():
    # (2*1 - 1*1) / sqrt(3 * 3 * 2 * 2)
    assert _score("cola", _logits(CLASSES), TRUTH) == pytest.approx({"matthews_correlation": 1 / 6})


def test_correlations_by_hand():
    # Deviations (-5, -2, 7)/3 and (-1, 0, 1): 4 / sqrt(26/3 * 2); the ranks agree.
    pearson = 4 / math.sqrt(52 / 3)
    expected = {"pearson": pearson, "spearmanr": 1.0, "combined_score": (pearson + 1) / 2}
    assert _score("sts-b", np.array([[0.0], [1.0], [4.0]]), [1.0, 2.0, 3.0]) == pytest.approx(expected)


def test_metrics_agree_with_the_libraries():
    draw = np.random.default_rng(0)
    outputs, labels = draw.normal(size=(200, 2)), draw.integers(0, 2, 200)
    classes = outputs.argmax(1)
    assert _score("cola", (outputs, "hidden states"), labels) == pytest.approx(
        {"matthews_correlation": sklearn_metrics.matthews_corrcoef(labels, classes)}
    )
    found = _score("qqp", outputs, labels)
    assert found["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(labels, classes))
    assert found["f1"] == pytest.approx(sklearn_metrics.f1_score(labels, classes))
    scores, truth = draw.normal(size=(200, 1)).astype(np.float32), draw.uniform(0, 5, 200).astype(np.float32)
    found = _score("sts-b", scores, truth)
    assert found["pearson"] == pytest.approx(stats.pearsonr(scores[:, 0], truth)[0], abs=1e-6)
    assert found["spearmanr"] == pytest.approx(stats.spearmanr(scores[:, 0], truth)[0])
    assert found["combined_score"] == pytest.approx((found["pearson"] + found["spearmanr"]) / 2)


@pytest.mark.parametrize("name", TASKS)
def test_the_keys_are_the_tasks_and_the_last_one_ranks(name):
    task = TASKS[name]
    width = task.num_labels
    outputs = np.random.default_rng(1).normal(size=(30, width))
    found = _score(name, outputs, np.arange(30) % max(width, 2))
    assert tuple(found) == task.metrics and task.main_metric in found
    assert all(type(value) is float for value in found.values())


@pytest.mark.parametrize("truth", [[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
@pytest.mark.parametrize("answer", [0, 1])
def test_constant_classes_score_without_a_warning(truth, answer):
    outputs = _logits([answer] * 4)
    assert _score("cola", outputs, truth) == {"matthews_correlation": 0.0}
    found = _score("mrpc", outputs, truth)
    right = sum(label == answer for label in truth)
    f1 = 2 * right / (4 + sum(truth)) if answer else 0.0
    assert found == pytest.approx({"accuracy": right / 4, "f1": f1, "combined_score": (right / 4 + f1) / 2})


def test_constant_scores_count_nothing_and_are_logged_once(caplog):
    zero = {"pearson": 0.0, "spearmanr": 0.0, "combined_score": 0.0}
    with caplog.at_level(logging.WARNING):
        assert _score("sts-b", np.full((3, 1), 2.5, np.float32), [1.0, 2.0, 3.0]) == zero
    assert len(caplog.records) == 1 and "undefined" in caplog.text
    assert _score("sts-b", np.array([[1.0], [2.0]]), [3.0, 3.0]) == zero


@pytest.mark.parametrize(
    ("name", "outputs", "labels", "expected"),
    [
        ("mnli", _logits([0, 1]), [0, 1], r"MNLI needs outputs of shape \(rows, 3\).*num_labels=3"),
        ("sts-b", _logits([0, 1]), [0, 1], r"STS-B needs outputs of shape \(rows, 1\).*num_labels=1"),
        ("cola", np.array([[0.0, np.nan]]), [0], "CoLA are not finite"),
        ("sts-b", np.array([[np.inf]]), [0], "STS-B are not finite"),
        ("cola", _logits([0, 1]), [0], "2 predictions for 1 labels"),
        ("cola", np.array([0, 2]), [0, 1], "no class numbers below 2"),
        ("cola", np.array([0.5, 1.0]), [0, 1], "no class numbers below 2"),
    ],
)
def test_outputs_that_do_not_fit_are_refused(name, outputs, labels, expected):
    with pytest.raises(HeadPruningError, match=expected) as error:
        _score(name, outputs, labels)
    _one_sentence(error)


SUBMISSIONS = {
    "cola": ["CoLA.tsv"],
    "sst-2": ["SST-2.tsv"],
    "mrpc": ["MRPC.tsv"],
    "sts-b": ["STS-B.tsv"],
    "qqp": ["QQP.tsv"],
    "mnli": ["MNLI-m.tsv", "MNLI-mm.tsv"],
    "qnli": ["QNLI.tsv"],
    "rte": ["RTE.tsv"],
    "wnli": ["WNLI.tsv"],
}


@pytest.mark.parametrize("name", SUBMISSIONS)
def test_prediction_files_say_what_the_model_said(name, tmp_path):
    task = TASKS[name]
    for split, file in zip(task.test, SUBMISSIONS[name], strict=True):
        outputs = np.random.default_rng(2).normal(2.5, 2.0, size=(50, task.num_labels))
        path = write_predictions(task, split.key, outputs, tmp_path / "made")
        assert path == tmp_path / "made" / file
        header, *lines = path.read_text().split("\n")[:-1]
        assert header == "index\tprediction" and len(lines) == 50
        indices, values = zip(*(line.split("\t") for line in lines))
        assert list(indices) == [str(i) for i in range(50)]
        if name == "sts-b":
            np.testing.assert_allclose([float(value) for value in values], outputs[:, 0].clip(0, 5), atol=5e-4)
            assert {"0.000", "5.000"} < set(values) and all(len(value.partition(".")[2]) == 3 for value in values)
        else:
            assert [task.written.index(value) for value in values] == outputs.argmax(1).tolist()
        decided = outputs[:, 0] if name == "sts-b" else outputs.argmax(1)
        again = write_predictions(task, split.key, decided, tmp_path / "again")
        assert again.read_text() == path.read_text()
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == sorted(SUBMISSIONS[name])


def test_prediction_files_spell_classes_as_glue_does(tmp_path):
    assert write_predictions(TASKS["mnli"], "mnli-mm", [2, 0], tmp_path).read_text().split()[2:] == [
        *("0", "neutral"),
        *("1", "contradiction"),
    ]
    assert write_predictions(TASKS["wnli"], "wnli", [1, 0], tmp_path).read_text().split()[2:] == ["0", "1", "1", "0"]
    reverse = TASKS["cola"].ordered_as({0: "acceptable", 1: "unacceptable"})
    assert write_predictions(reverse, "cola", [1, 0], tmp_path).read_text().split()[2:] == ["0", "0", "1", "1"]


def test_prediction_files_that_glue_would_refuse_are_warned_of(tmp_path, caplog):
    write_predictions(TASKS["wnli"], "wnli", np.zeros(146, int), tmp_path)
    assert not caplog.records
    write_predictions(TASKS["wnli"], "wnli", np.zeros(10, int), tmp_path)
    assert "test.tsv has 146 rows, but there are 10 predictions" in caplog.text
    before = (tmp_path / "WNLI.tsv").read_text()
    with pytest.raises(HeadPruningError, match="no test split 'mnli-mm'; choose one of wnli") as error:
        write_predictions(TASKS["wnli"], "mnli-mm", [0], tmp_path)
    _one_sentence(error)
    with pytest.raises(HeadPruningError, match="no class numbers"):
        write_predictions(TASKS["wnli"], "wnli", [7], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["WNLI.tsv"] and (tmp_path / "WNLI.tsv").read_text() == before


@pytest.mark.parametrize("folder", ["CoLA", "STS-B", "MNLI"])
def test_a_trainer_learns_scores_and_predicts(data, tokenizer, folder, tmp_path):
    found = load_task(folder, tokenizer=tokenizer, data_dir=data / folder, cache_dir=tmp_path, max_seq_length=16)
    task = found.task
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    labels = {"id2label": task.id2label, "label2id": task.label2id} if task.labels else {"num_labels": 1}
    model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes, **labels))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path / "out"), max_steps=2, report_to=[], use_cpu=True),
        train_dataset=found.train,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_metrics(task),
    )
    trainer.train()
    for key, rows in found.validation.items():
        result = trainer.evaluate(rows, metric_key_prefix=f"eval_{key}")
        assert math.isfinite(result[f"eval_{key}_{task.main_metric}"])
    key, rows = next(iter(found.test.items()))
    path = write_predictions(task, key, trainer.predict(rows).predictions, tmp_path / "out")
    assert len(path.read_text().splitlines()) == 7
