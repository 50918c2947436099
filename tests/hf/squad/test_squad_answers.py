"""From logits to answers, n-best lists and the odds of no answer."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from head_pruning import HeadPruningError
from hf_plugin.squad.answers import find_answers
from hf_plugin.squad.features import make_features
from hf_plugin.squad.reading import FEATURES, read_squad
from tests.hf.squad_files import write_bert, write_squad

REAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "squad" / "dev-v1.1.json"
WORDS = "bar bem bil bon dar dem dil don far fem fil fon gar gem gil".split()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(write_bert(tmp_path_factory.mktemp("model") / "bert"))


def asked(*contexts: str) -> Dataset:
    values = {"id": [f"q{i}" for i in range(len(contexts))], "question": ["what ?"] * len(contexts)}
    values |= {"context": list(contexts), "answers": [[]] * len(contexts), "starts": [[]] * len(contexts)}
    return Dataset.from_dict(values, features=FEATURES)


class Case:
    """One text of 15 words in windows of 9, and a question of 2 tokens: [CLS] what ? [SEP] text [SEP]."""

    def __init__(self, tokenizer, cache, *contexts):
        self.rows = asked(*(contexts or (" ".join(WORDS),)))
        self.windows = make_features(
            self.rows, tokenizer, max_seq_length=14, doc_stride=4, max_query_length=4, with_text=True, cache_dir=cache
        )
        shape = (len(self.windows), 16)  # padded further than the longest
        self.start, self.end = np.full(shape, -5.0), np.full(shape, -5.0)
        self.start[:, 14:] = self.end[:, 14:] = 100.0  # never to be read

    def put(self, window: int, begin: int, end: int, score: float) -> None:
        """Let the answer of words ``begin`` to ``end`` (of the window) score so much."""
        self.start[window, 4 + begin] = self.end[window, 4 + end] = score / 2

    def find(self, **options):
        return find_answers(self.rows, self.windows, self.start, self.end, **options)


@pytest.fixture
def case(tokenizer, tmp_path):
    return Case(tokenizer, tmp_path)


def texts(answers) -> list[str]:
    return [entry["text"] for entry in answers.nbest["q0"]]


def test_the_best_answer_of_all_windows(case):
    assert [min(row) // 4 for row in case.windows["starts"]] == [0, 4, 8]
    case.put(0, 2, 3, 4)
    case.put(2, 5, 5, 6)
    answers = case.find()
    assert answers.predictions == {"q0": "gem"} and not answers.null_odds and not answers.answered
    assert texts(answers)[:2] == ["gem", "bil bon"]
    first, second = answers.nbest["q0"][:2]
    assert (first["start_logit"], first["end_logit"], second["start_logit"]) == (3, 3, 2)
    assert first["probability"] / second["probability"] == pytest.approx(math.exp(2))
    assert sum(entry["probability"] for entry in answers.nbest["q0"]) == pytest.approx(1)


def test_an_answer_starts_in_the_window_with_the_most_context(case):
    # The tenth word is the sixth of the second window and the second of the third.
    case.put(2, 1, 2, 8)
    assert "fem fil" not in texts(case.find())
    case.put(1, 5, 6, 6)
    (answer,) = [entry for entry in case.find().nbest["q0"] if entry["text"] == "fem fil"]
    assert case.find().predictions["q0"] == "fem fil" and (answer["start_logit"], answer["end_logit"]) == (3, 3)
    # Only the start must have the most context: "fil fon" ends where the third window has more.
    case.start[1, 4 + 6], case.end[1, 4 + 7] = 9, 9
    assert case.find().predictions["q0"] == "fil fon"


def test_the_same_words_of_two_windows_count_once(tokenizer, tmp_path):
    case = Case(tokenizer, tmp_path, " ".join([*WORDS[:13], "bem", "bil"]))
    case.put(0, 1, 2, 4)
    case.put(2, 5, 6, 7)
    found = texts(case.find())
    assert found[0] == "bem bil" and found.count("bem bil") == 1 and len(found) == len(set(found)) == 20


def test_a_long_real_paragraph(tokenizer, tmp_path):
    """Each token starts answers in one window only: that of the published rule, written out."""
    if not REAL.is_file():
        pytest.skip(f"there is no {REAL}")
    rows = read_squad(REAL, False)
    rows = rows.select([max(range(len(rows)), key=lambda i: len(rows["context"][i]))])
    windows = make_features(
        rows, tokenizer, max_seq_length=96, doc_stride=32, max_query_length=20, with_text=True, cache_dir=tmp_path
    )
    assert len(windows) > 15
    by_begin = sorted(range(len(windows)), key=lambda i: windows[i]["starts"][0])
    shown: dict[int, list[tuple[float, int, int]]] = {}
    for i in by_begin:
        starts = windows[i]["starts"]
        for place, begin in enumerate(starts):
            context = min(place, len(starts) - 1 - place) + 0.01 * len(starts)
            shown.setdefault(begin, []).append((context, i, windows[i]["first"] + place))
    assert max(map(len, shown.values())) == 3
    start, end = np.full((2, len(windows), 96), -9.0)
    draw = np.random.default_rng(0)
    several = [begin for begin, places in shown.items() if len(places) > 1]
    for begin in draw.choice(several, 20, replace=False):
        best = max(shown[begin], key=lambda found: found[0])  # the first of equals
        for context, i, place in shown[begin]:
            start[i, place] = end[i, place] = 5.0
            (answer, *_) = find_answers(rows, windows, start, end).nbest[rows["id"][0]]
            end_of = windows[i]["ends"][place - windows[i]["first"]]
            mine = (context, i, place) == best
            assert (answer["text"] == rows["context"][0][begin:end_of] and answer["start_logit"] == 5.0) == mine
            start[i, place] = end[i, place] = -9.0


def test_lengths_and_numbers(case):
    case.put(0, 0, 5, 8)
    assert case.find().predictions["q0"] == "bar bem bil bon dar dem"
    assert case.find(max_answer_length=6).predictions["q0"] == "bar bem bil bon dar dem"
    assert case.find(max_answer_length=5).predictions["q0"] != "bar bem bil bon dar dem"
    assert len(case.find(n_best_size=3).nbest["q0"]) == 3
    assert all(len(text.split()) == 1 for text in texts(case.find(max_answer_length=1)))


def test_an_end_before_its_start_is_no_answer(case):
    case.start[0, 4 + 8], case.end[0, 4] = 9, 9
    (answer,) = case.find(n_best_size=1).nbest["q0"]
    assert answer["text"] in WORDS  # no pair fits, so the best single word is given
    for window in (1, 2):
        case.start[window], case.end[window] = -90, -90
    case.start[0, 4 + 4] = case.end[0, 4 + 4] = 4
    assert case.find(n_best_size=1).predictions["q0"] == "dar"


def test_no_answer(case):
    case.put(0, 2, 2, 4)
    for window, score in enumerate((9.0, 2.5, 8.0)):  # the least of the windows counts
        case.start[window, 0], case.end[window, 0] = score - 1, 1
    answers = case.find(version_2=True)
    assert answers.null_odds == {"q0": -1.5} and answers.predictions == answers.answered == {"q0": "bil"}
    assert texts(answers)[:2] == ["bil", ""] and len(texts(answers)) == 21
    assert answers.nbest["q0"][1]["start_logit"] == 1.5
    silent = case.find(version_2=True, null_score_diff_threshold=-2)
    assert silent.predictions == {"q0": ""} and silent.answered == {"q0": "bil"}
    assert case.find(version_2=True, null_score_diff_threshold=-1.5).predictions == {"q0": "bil"}  # not above it


def test_several_questions_and_an_empty_text(tokenizer, tmp_path):
    case = Case(tokenizer, tmp_path, "bar bem", "  ", "dar dem dil")
    by_example = {row["example"]: i for i, row in enumerate(case.windows)}
    case.put(by_example[0], 1, 1, 3)
    case.put(by_example[2], 0, 1, 3)
    answers = case.find(version_2=True, null_score_diff_threshold=50)
    assert answers.predictions == {"q0": "bem", "q1": "", "q2": "dar dem"} and answers.null_odds["q1"] == 0
    assert answers.nbest["q1"] == [{"text": "", "probability": 1.0, "start_logit": -5.0, "end_logit": -5.0}]
    assert case.find().predictions["q1"] == ""


def test_against_a_search_through_all_pairs(tokenizer, tmp_path):
    rows = read_squad(write_squad(tmp_path / "data", dev=40) / "dev-v1.1.json", False)
    windows = make_features(
        rows, tokenizer, max_seq_length=48, doc_stride=16, max_query_length=12, with_text=True, cache_dir=tmp_path
    )
    draw = np.random.default_rng(0)
    start, end = draw.normal(size=(2, len(windows), 48))
    answers = find_answers(rows, windows, start, end, n_best_size=7, max_answer_length=5)
    expected: dict[str, dict[str, float]] = {key: {} for key in rows["id"]}
    for i, window in enumerate(windows):
        places = range(window["first"], window["first"] + len(window["starts"]))
        allowed = [place for place in places if window["most_context"][place - window["first"]]]
        starts = sorted(allowed, key=lambda place: -start[i, place])[:7]
        ends = sorted(places, key=lambda place: -end[i, place])[:7]
        pairs = [(a, b) for a in starts for b in ends if a <= b < a + 5]
        pairs = pairs or [max(((place, place) for place in allowed), key=lambda p: start[i, p[0]] + end[i, p[0]])]
        listed = expected[rows[window["example"]]["id"]]
        for a, b in pairs:
            context = rows[window["example"]]["context"]
            text = context[window["starts"][a - window["first"]] : window["ends"][b - window["first"]]]
            listed[text] = max(listed.get(text, -math.inf), start[i, a] + end[i, b])
    for key, listed in expected.items():
        best = sorted(listed.items(), key=lambda item: -item[1])[:7]
        found = [(entry["text"], entry["start_logit"] + entry["end_logit"]) for entry in answers.nbest[key]]
        assert [text for text, _ in found] == [text for text, _ in best]
        assert [score for _, score in found] == pytest.approx([score for _, score in best])
        assert answers.predictions[key] == best[0][0]


def test_files(case, tmp_path):
    answers = case.find()
    assert answers.write(tmp_path / "out", "12", with_nbest=False) == tmp_path / "out" / "predictions_12.json"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["predictions_12.json"]
    case.find(version_2=True).write(tmp_path / "out")
    names = {"predictions_12.json", "predictions_.json", "nbest_predictions_.json", "null_odds_.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert json.loads((tmp_path / "out" / "predictions_12.json").read_text()) == answers.predictions


def test_outputs_that_do_not_fit(case):
    with pytest.raises(HeadPruningError, match=r"outputs of shape \(3, 9\) do not fit 3 windows of up to 13 tokens; "):
        find_answers(case.rows, case.windows, case.start[:, :9], case.end[:, :9])
    case.start[1, 7] = math.nan
    with pytest.raises(HeadPruningError, match="^The model's outputs for SQuAD are not finite; lower the learning"):
        case.find()
