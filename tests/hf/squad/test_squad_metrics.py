"""SQuAD's scores: cases by hand, and real questions answered by a simple program, against the official definition."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from head_pruning import HeadPruningError
from hf_plugin.squad.metrics import best_threshold, exact_match, normalized, squad_scores, word_f1
from hf_plugin.squad.reading import read_squad

REAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "squad"


@pytest.mark.parametrize("text, expected", [
    ("The  Denver\tBroncos!", "denver broncos"),
    ("an apple a day", "apple day"),
    ("Theatre-goers' anthem", "theatregoers anthem"),
    ("A.", ""),
    ("the-the", "thethe"),  # punctuation goes first
    ("«Égal»", "«égal»"),  # other marks than ASCII's stay
    ("$1,000.50", "100050"),
])  # fmt: skip
def test_normalisation(text, expected):
    assert normalized(text) == expected


@pytest.mark.parametrize("answer, truth, exact, f1, f1_of_v2", [
    ("Denver Broncos", "the denver broncos.", 1, 1, 1),
    ("Denver", "Denver Broncos", 0, 2 / 3, 2 / 3),
    ("to be or not to be", "to be to be to", 0, 2 * 4 / 11, 2 * 4 / 11),
    ("Carolina", "Denver", 0, 0, 0),
    ("the", "a", 1, 0, 1),  # no words on either side
    ("", "", 1, 0, 1),
    ("", "Denver", 0, 0, 0),
])  # fmt: skip
def test_one_answer(answer, truth, exact, f1, f1_of_v2):
    assert exact_match(answer, truth) == exact
    assert word_f1(answer, truth) == pytest.approx(f1)
    assert word_f1(answer, truth, version_2=True) == pytest.approx(f1_of_v2)


TRUTHS = {"a": ["Denver Broncos", "Broncos"], "b": ["gold"], "c": [], "d": []}


def test_a_dataset_of_v1():
    scores = squad_scores({"a": "broncos", "b": "the gold ring"}, {key: TRUTHS[key] for key in "ab"})
    assert scores == {"exact": 50.0, "f1": pytest.approx(100 * (1 + 2 / 3) / 2), "total": 2}


def test_a_dataset_of_v2():
    predictions = {"a": "Denver Broncos", "b": "", "c": "", "d": "a ring"}
    scores = squad_scores(predictions, TRUTHS, version_2=True)
    assert scores == {
        **{"exact": 50.0, "f1": 50.0, "total": 4},
        **{"HasAns_exact": 50.0, "HasAns_f1": 50.0, "HasAns_total": 2},
        **{"NoAns_exact": 50.0, "NoAns_f1": 50.0, "NoAns_total": 2},
    }


def test_the_best_threshold():
    answered = {"a": "Broncos", "b": "gold ring", "c": "ring", "d": "ring"}
    odds = {"a": -3.0, "c": -2.0, "b": 0.5, "d": 4.0}
    # Silence scores 2 of 4; then a brings 1, c costs 1, b brings 0 (exact) or 2/3 (F1), d costs 1.
    scores = squad_scores(dict.fromkeys(TRUTHS, ""), TRUTHS, version_2=True, null_odds=odds, answered=answered)
    assert (scores["best_exact"], scores["best_exact_thresh"]) == (75.0, -3.0)
    assert (scores["best_f1"], scores["best_f1_thresh"]) == (75.0, -3.0)
    odds["b"] = -2.5
    raw = {"a": 1.0, "b": 2 / 3, "c": 0.0, "d": 0.0}
    assert best_threshold(raw, answered, TRUTHS, odds) == (pytest.approx(100 * (3 + 2 / 3) / 4), -2.5)
    # What the threshold promises is what answering by it scores.
    final = {key: answered[key] if odds[key] <= -2.5 else "" for key in TRUTHS}
    assert squad_scores(final, TRUTHS, version_2=True)["f1"] == pytest.approx(100 * (3 + 2 / 3) / 4)


@pytest.mark.parametrize("predictions, truths", [({}, {}), ({"a": "x"}, {"a": ["x"], "b": ["y"]})])
def test_a_part_is_refused(predictions, truths):
    with pytest.raises(HeadPruningError, match="^SQuAD cannot be scored: .*; score a whole file.$"):
        squad_scores(predictions, truths)


def guess(question: str, context: str) -> str:
    """The longest run of capitalised words or numbers in the sentence that shares most words with the question."""
    asked = set(re.findall(r"\w+", question.lower()))
    sentences = re.split(r"(?<=[.!?])\s+", context)
    best = max(sentences, key=lambda sentence: len(asked & set(re.findall(r"\w+", sentence.lower()))))
    word = r"[A-Z0-9][\w,.$%'-]*"
    runs = re.findall(rf"(?:(?:the |a |an )?(?:{word})(?: (?:of|the|and) (?=[A-Z0-9])| (?=[A-Z0-9])|))+", best)
    runs = [run.strip() for run in runs if not set(re.findall(r"\w+", run.lower())) <= asked] or [best]
    return max(runs, key=len)


def guesses(version_2: bool) -> tuple[dict, dict, dict]:
    """The program's answers, its odds of no answer, and the right answers of SQuAD's dev set."""
    path = REAL / f"dev-v{'2.0' if version_2 else '1.1'}.json"
    if not path.is_file():
        pytest.skip(f"there is no {path}")
    rows = read_squad(path, version_2)
    answers, odds = {}, {}
    for row in rows:
        key = row["id"]
        answers[key] = guess(row["question"], row["context"])
        shared = set(row["question"].lower().split()) & set(row["context"].lower().split())
        odds[key] = round(3 - len(shared) + len(answers[key]) / 50, 3)
    return answers, odds, dict(zip(rows["id"], rows["answers"]))


# What transformers 5.0's port of the official script says of the same answers (and torchmetrics 1.x of v1.1's).
OFFICIAL = {"exact": 12.06244087038789, "f1": 21.87055846681059, "total": 10570}
OFFICIAL_2 = {
    **{"exact": 7.074875768550493, "f1": 12.06515901935938, "total": 11873},
    **{"HasAns_exact": 11.470985155195681, "HasAns_f1": 21.465862523086, "HasAns_total": 5928},
    **{"NoAns_exact": 2.6913372582001682, "NoAns_f1": 2.6913372582001682, "NoAns_total": 5945},
    **{"best_exact": 50.07159100480081, "best_exact_thresh": 0.0},
    **{"best_f1": 50.07970720427555, "best_f1_thresh": -17.44},
}


def test_real_answers_to_v1():
    answers, _, truths = guesses(False)
    assert squad_scores(answers, truths) == pytest.approx(OFFICIAL, rel=1e-12)


def test_real_answers_to_v2():
    answers, odds, truths = guesses(True)
    assert squad_scores(answers, truths, version_2=True, null_odds=odds) == pytest.approx(OFFICIAL_2, rel=1e-12)


def test_real_answers_against_the_port_of_the_official_script():
    official = pytest.importorskip(
        "transformers.data.metrics.squad_metrics", reason="this version of transformers no longer has the script"
    )
    answers, odds, truths = guesses(True)
    examples = [
        SimpleNamespace(qas_id=key, answers=[{"text": text} for text in texts]) for key, texts in truths.items()
    ]
    theirs = official.squad_evaluate(examples, answers, odds, no_answer_probability_threshold=1e9)
    ours = squad_scores(answers, truths, version_2=True, null_odds=odds)
    assert ours == pytest.approx(dict(theirs), rel=1e-12)
