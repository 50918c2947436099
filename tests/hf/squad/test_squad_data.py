"""SQuAD's questions, read and cut into windows."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from head_pruning import HeadPruningError
from hf_plugin.squad.features import TEXT_COLUMNS, make_features, most_context, ragged
from hf_plugin.squad.reading import FEATURES, VERSIONS, from_squad_hub, read_squad
from tests.hf.squad_files import write_bert, write_deberta, write_squad

REAL = Path(__file__).resolve().parents[4] / "shared" / "data"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    place = tmp_path_factory.mktemp("tokenizers")
    folders = {"bert": write_bert(place / "bert"), "deberta": write_deberta(place / "deberta")}
    return {name: AutoTokenizer.from_pretrained(folder) for name, folder in folders.items()}


def questions(*rows: tuple[str, str, str]) -> Dataset:
    """Question, context and answer (found by its text; none if empty) of each row."""
    columns = {name: [] for name in FEATURES}
    for i, (question, context, answer) in enumerate(rows):
        columns["id"].append(f"q{i}")
        columns["question"].append(question)
        columns["context"].append(context)
        columns["answers"].append([answer] if answer else [])
        columns["starts"].append([context.index(answer)] if answer else [])
    return Dataset.from_dict(columns, features=FEATURES)


# -- reading ---------------------------------------------------------------------------------------------------------


def test_files_of_both_versions(tmp_path):
    place = write_squad(tmp_path, "1.1")
    rows = read_squad(place / "dev-v1.1.json", False)
    data = json.loads((place / "dev-v1.1.json").read_text())
    asked = [
        (question["id"], question["question"], paragraph["context"], question["answers"][0]["text"])
        for article in data["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]
    assert [(row["id"], row["question"], row["context"], row["answers"][0]) for row in rows] == asked
    assert all(row["context"].startswith(row["answers"][0], row["starts"][0]) for row in rows)
    write_squad(tmp_path, "2.0")
    answers = read_squad(tmp_path / "dev-v2.0.json", True)["answers"][:]
    assert answers.count([]) == len(answers) // 2


def _changed(change):
    def spoil(path):
        data = json.loads(path.read_text())
        change(data["data"][0]["paragraphs"][0]["qas"])
        path.write_text(json.dumps(data))

    return spoil


@pytest.mark.parametrize("spoil, sentence", [
    (lambda path: path.unlink(), "cannot be read (No such file or directory); give --data_dir the folder that "),
    (lambda path: path.write_text(path.read_text()[:-9]), "is damaged (Expecting "),
    (lambda path: path.write_bytes(b"\xff\xfe{}"), "is damaged ('utf-8' codec can't decode"),
    (lambda path: path.write_text('{"rows": []}'), "is not in SQuAD's layout (data, paragraphs, qas, answers; the "),
    (lambda path: path.write_text("[]"), "is not in SQuAD's layout"),
    (lambda path: path.write_text('{"data": []}'), "has no questions"),
    (_changed(lambda asked: asked[0]["answers"][0].update(answer_start=1)), ": the answer '"),
    (_changed(lambda asked: asked[0]["answers"][0].update(text="elsewhere")), ": the answer 'elsewhere' of the quest"),
    (_changed(lambda asked: asked[0]["answers"][0].pop("text")), "is not in SQuAD's layout"),
    (_changed(lambda asked: asked[0].update(answers=[])), ": the question 1-0-0 has no answer; add --version_2_with"),
    (_changed(lambda asked: asked[1].update(id=asked[0]["id"])), "has two questions with the id 1-0-0; give them"),
])  # fmt: skip
def test_bad_files_give_one_sentence(tmp_path, spoil, sentence):
    path = write_squad(tmp_path) / "dev-v1.1.json"
    spoil(path)
    with pytest.raises(HeadPruningError) as refused:
        read_squad(path, False)
    message = str(refused.value)
    assert message.startswith((f"{path} {sentence}", f"{path}{sentence}")) and message.endswith(".")
    assert "\n" not in message and ". " not in message.replace(str(path), "")


def test_blank_answers_are_left_out(tmp_path, caplog):
    path = write_squad(tmp_path) / "dev-v1.1.json"
    whole = read_squad(path, False)["id"][:]
    _changed(lambda asked: asked[1]["answers"][0].update(text=""))(path)
    assert read_squad(path, False)["id"][:] == [key for key in whole if key != "1-0-1"]
    assert "1 questions with a blank answer left out (first: 1-0-1)" in caplog.text


def test_the_hubs_columns(tmp_path):
    rows = read_squad(write_squad(tmp_path, "2.0") / "dev-v2.0.json", True)
    answers = [{"text": a, "answer_start": s} for a, s in zip(rows["answers"], rows["starts"])]
    table = rows.remove_columns(["answers", "starts"]).add_column("answers", answers)
    assert from_squad_hub(table, VERSIONS["2.0"], "It").to_dict() == rows.to_dict()
    with pytest.raises(HeadPruningError, match="^It has no column 'answers'; it should have the hub's columns id, "):
        from_squad_hub(table.remove_columns("answers"), VERSIONS["2.0"], "It")
    with pytest.raises(HeadPruningError, match="^It: the question 1-0-1 has no answer; add --version_2_with_negative"):
        from_squad_hub(table, VERSIONS["1.1"], "It")


def test_real_files():
    if not (REAL / "squad").is_dir():
        pytest.skip(f"there is no {REAL / 'squad'}")
    for version in VERSIONS.values():
        rows = read_squad(REAL / "squad" / version.files[1], version.unanswerable)
        assert len(rows) == version.rows[1]


# -- windows ---------------------------------------------------------------------------------------------------------

SHORT = {"max_seq_length": 16, "doc_stride": 4, "max_query_length": 5}


def windows(rows, tokenizer, cache, **options):
    return make_features(rows, tokenizer, cache_dir=cache, **{**SHORT, "with_text": True, **options})


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 20))
def test_the_window_with_the_most_context(tokens, room, step):
    """The rule of the published script, token by token."""
    begins = range(0, -(-max(0, tokens - room) // min(step, room)) * min(step, room) + 1, min(step, room))
    windows = [(begin, min(begin + room, tokens)) for begin in begins]
    found = most_context(windows)
    for token in range(tokens):
        scores = {
            number: min(token - begin, stop - 1 - token) + 0.01 * (stop - begin)
            for number, (begin, stop) in enumerate(windows)
            if begin <= token < stop
        }
        assert found[token] == max(scores, key=scores.get), (token, scores)
    assert set(found) == set(range(len(windows)))  # no window is without a start


def test_a_paragraph_says_where_its_tokens_have_the_most_context(tokenizers, tmp_path):
    text = "bar bem bil bon dar dem dil don far fem fil fon gar gem gil"
    features = windows(questions(("what follows bar ?", text, "")), tokenizers["bert"], tmp_path)
    by_begin = sorted(features, key=lambda row: row["starts"][0])
    assert [row["starts"][0] // 4 for row in by_begin] == [0, 4, 8]
    # Words 4 to 8 stand in the first two windows (0-8, 4-12), 8 in all three, 9 to 12 in the last two (8-14).
    assert [row["most_context"] for row in by_begin] == [
        [1, 1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1],
    ]  # fmt: skip


def test_windows_start_every_stride_and_hold_the_answer(tokenizers, tmp_path):
    text = "bar bem bil bon dar dem dil don far fem fil fon gar gem gil"
    rows = questions(("what follows bar ?", text, "don far"), ("bar", "bar.", ""))
    features = windows(rows, tokenizers["bert"], tmp_path)
    show = tokenizers["bert"].convert_ids_to_tokens
    words = text.split()
    # 16 - 4 of the question - 3 special ones leave 9 for the text.
    assert [" ".join(show(row["input_ids"])) for row in features] == [
        *(f"[CLS] what follows bar ? [SEP] {' '.join(words[i : i + 9])} [SEP]" for i in (0, 4)),
        f"[CLS] what follows bar ? [SEP] {' '.join(words[8:])} [SEP]",
        "[CLS] bar [SEP] bar . [SEP]",
    ]
    assert features["token_type_ids"][0] == [0] * 6 + [1] * 10
    # "don far" are words 7 and 8: whole in the first two windows, cut in the third.
    assert features["start_positions"][:] == [6 + 7, 6 + 3, 0, 0]
    assert features["end_positions"][:] == [6 + 8, 6 + 4, 0, 0]
    assert features["example"][:] == [0, 0, 0, 1] and features["null"][:] == [0] * 4
    assert features["first"][:] == [6, 6, 6, 3]
    assert [text[begin:end] for begin, end in zip(features["starts"][1], features["ends"][1])] == words[4:13]
    assert windows(rows, tokenizers["bert"], tmp_path, with_text=False).column_names == [
        *("input_ids", "token_type_ids", "start_positions", "end_positions")
    ]


@pytest.mark.parametrize("stride, begins", [(9, [0, 9]), (40, [0, 9]), (6, [0, 6])])
def test_windows_leave_no_gap(tokenizers, tmp_path, stride, begins):
    words = "bar bem bil bon dar dem dil don far fem fil fon gar gem gil".split()
    rows = questions(("what follows bar ?", " ".join(words), ""))
    features = windows(rows, tokenizers["bert"], tmp_path, doc_stride=stride)
    starts = sorted(min(row) for row in features["starts"])
    assert starts == [4 * begin for begin in begins]
    assert {start for row in features["starts"] for start in row} == {4 * i for i in range(15)}


def test_long_questions_are_cut(tokenizers, tmp_path):
    rows = questions(("   what follows bar bem bil bon dar ?", "dar dem", "dem"))
    (row,) = windows(rows, tokenizers["bert"], tmp_path)
    shown = tokenizers["bert"].convert_ids_to_tokens(row["input_ids"])
    assert shown == "[CLS] what follows bar bem bil [SEP] dar dem [SEP]".split()


@pytest.mark.parametrize("name", ["bert", "deberta"])
def test_answers_come_back_out_of_their_tokens(tokenizers, tmp_path, name):
    rows = read_squad(write_squad(tmp_path / "data", train=60) / "train-v1.1.json", False)
    features = make_features(
        rows, tokenizers[name], max_seq_length=48, doc_stride=16, max_query_length=12, with_text=True,
        cache_dir=tmp_path,
    )  # fmt: skip
    found = set()
    for row in features:
        if row["start_positions"] == row["null"]:
            continue
        asked = rows[row["example"]]
        begin = row["starts"][row["start_positions"] - row["first"]]
        end = row["ends"][row["end_positions"] - row["first"]]
        assert asked["context"][begin:end].strip() == asked["answers"][0]
        found.add(row["example"])
    assert found == set(range(60)) and len(features) > 60
    lengths = [len(ids) for ids in features["input_ids"]]
    assert lengths == sorted(lengths, reverse=True) and max(lengths) == 48
    assert ("token_type_ids" in features.column_names) == ("token_type_ids" in tokenizers[name].model_input_names)


def test_the_cache(tokenizers, tmp_path, monkeypatch):
    rows = questions(("what ?", "bar bem", "bem"), ("what ?", "bar bem", "bar"))
    first = windows(rows, tokenizers["bert"], tmp_path)
    (file,) = (tmp_path / "squad-tokenised").iterdir()
    before = file.stat().st_mtime_ns
    assert windows(rows, tokenizers["bert"], tmp_path).to_dict() == first.to_dict()
    assert file.stat().st_mtime_ns == before
    windows(rows, tokenizers["bert"], tmp_path, overwrite_cache=True)
    assert file.stat().st_mtime_ns > before
    for other in ({"doc_stride": 3}, {"max_query_length": 3}, {"with_text": False}, {"max_seq_length": 15}):
        windows(rows, tokenizers["bert"], tmp_path, **other)
    windows(rows, tokenizers["deberta"], tmp_path)
    windows(rows.select([0]), tokenizers["bert"], tmp_path)
    assert len(list((tmp_path / "squad-tokenised").iterdir())) == 7


def test_a_length_saved_with_the_tokenizer_does_not_cut(tokenizers, tmp_path):
    saved = AutoTokenizer.from_pretrained(tokenizers["bert"].name_or_path)
    saved.backend_tokenizer.enable_truncation(4)
    saved.backend_tokenizer.enable_padding(length=9)
    rows = questions(("what follows bar ?", "bar bem bil bon dar dem", "dem"))
    ours, theirs = (windows(rows, tok, tmp_path) for tok in (saved, tokenizers["bert"]))
    assert ours.to_dict() == theirs.to_dict()
    assert saved.backend_tokenizer.truncation["max_length"] == 4  # left as it was


@pytest.mark.parametrize("options, sentence", [
    ({"max_seq_length": 8}, "A window of 8 tokens has no room for text beside a question of 5 and the special tokens; "
     "raise --max_seq_length to 9 or more, or lower --max_query_length."),
])  # fmt: skip
def test_windows_without_room_are_refused(tokenizers, tmp_path, options, sentence):
    with pytest.raises(HeadPruningError) as refused:
        windows(questions(("what ?", "bar", "bar")), tokenizers["bert"], tmp_path, **options)
    assert str(refused.value) == sentence
    assert len(windows(questions(("what ?", "bar", "bar")), tokenizers["bert"], tmp_path, max_seq_length=9)) == 1


@pytest.mark.slow
def test_slow_tokenizers_are_refused(tmp_path):
    from transformers import CanineTokenizer

    with pytest.raises(HeadPruningError, match="^CanineTokenizer cannot tell where in the text its tokens stand; "):
        windows(questions(("what ?", "bar", "bar")), CanineTokenizer(), tmp_path)


def test_ragged_columns_follow_a_selection():
    dataset = Dataset.from_dict({"x": [[1, 2], [], [3]]}).select([2, 0])
    values, offsets = ragged(dataset, "x")
    assert values.tolist() == [3, 1, 2] and offsets.tolist() == [0, 1, 3]


def test_as_many_windows_as_the_published_script_makes(tmp_path):
    """The published BERT code reports 10833 of SQuAD v1.1's dev set with the usual lengths."""
    if not (REAL / "squad").is_dir() or not (REAL / "gte-small-fp16").is_dir():
        pytest.skip(f"there is no {REAL / 'squad'} or no {REAL / 'gte-small-fp16'}, whose vocabulary is BERT's")
    rows = read_squad(REAL / "squad" / "dev-v1.1.json", False)
    tokenizer = AutoTokenizer.from_pretrained(REAL / "gte-small-fp16")
    features = make_features(rows, tokenizer, with_text=True, cache_dir=tmp_path)
    assert len(features) == 10833
    places = random.Random(0).sample(range(len(features)), 300)
    same = 0
    for row in features.select(places):
        if row["start_positions"] != row["null"]:
            asked = rows[row["example"]]
            begin = row["starts"][row["start_positions"] - row["first"]]
            end = row["ends"][row["end_positions"] - row["first"]]
            assert asked["answers"][0] in asked["context"][begin:end]  # a token may be more than the answer
            same += asked["answers"][0] == asked["context"][begin:end]
    assert same > 250
    assert set(TEXT_COLUMNS) < set(features.column_names)
    assert np.unique(features["example"][:]).size == len(rows)
