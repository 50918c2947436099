"""The scores of SQuAD, by the definitions of its official evaluation: exact match and F1 of word overlap, in percent.

Before they are compared, answers lose their case, punctuation (ASCII), the words a, an and the, and extra spaces.
"""

import re
import string
from collections import Counter
from typing import Mapping, Optional, Sequence

from head_pruning import HeadPruningError

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalized(text: str) -> str:
    """``text`` as it is compared."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, truth: str) -> float:
    """1 if both are the same after normalisation, else 0."""
    return float(normalized(answer) == normalized(truth))


def word_f1(answer: str, truth: str, version_2: bool = False) -> float:
    """F1 of the words (with their counts) of ``answer`` against those of ``truth``, 0 to 1.

    Without words on a side it is 0 in v1.1; in v2.0 it is 1 if neither has words.
    """
    mine, theirs = Counter(normalized(answer).split()), Counter(normalized(truth).split())
    if version_2 and (not mine or not theirs):
        return float(mine == theirs)
    common = (mine & theirs).total()
    return 2.0 * common / (mine.total() + theirs.total()) if common else 0.0


def squad_scores(
    predictions: Mapping[str, str],
    truths: Mapping[str, Sequence[str]],
    *,
    version_2: bool = False,
    null_odds: Optional[Mapping[str, float]] = None,
    answered: Optional[Mapping[str, str]] = None,
) -> dict[str, float]:
    """Score a whole dataset.

    Args:
        predictions: answer by question id; "" for no answer.
        truths: the answers that count as right, by question id; none for an unanswerable question.
        version_2: score as SQuAD v2.0 does.
        null_odds: how much the model prefers no answer, by question id (v2.0).
        answered: the answers it would give if it always answered; default: ``predictions``.

    Returns:
        ``exact`` and ``f1`` in percent, ``total`` questions. For v2.0 the same of the questions that have an answer
        (``HasAns_``) and of those that have none (``NoAns_``), where there are any; and with ``null_odds``
        ``best_exact`` and ``best_f1``, what could be reached with the thresholds ``best_exact_thresh`` and
        ``best_f1_thresh``: ``answered`` counts where the odds are at most the threshold, else no answer.

    Raises:
        HeadPruningError: there are no questions, or one was not answered.
    """
    missing = next((question for question in truths if question not in predictions), None)
    if missing is not None or not truths:
        cause = "there are no questions" if missing is None else f"the question {missing} was not answered"
        raise HeadPruningError(f"SQuAD cannot be scored: {cause}; score a whole file.")
    exact, f1 = _raw_scores(predictions, truths, version_2)
    groups = {"": list(truths)}
    if version_2:
        groups["HasAns_"] = [question for question, answers in truths.items() if answers]
        groups["NoAns_"] = [question for question, answers in truths.items() if not answers]
    scores: dict[str, float] = {}
    for name, questions in groups.items():
        if questions:
            scores[f"{name}exact"] = 100.0 * sum(exact[question] for question in questions) / len(questions)
            scores[f"{name}f1"] = 100.0 * sum(f1[question] for question in questions) / len(questions)
            scores[f"{name}total"] = len(questions)
    if version_2 and null_odds is not None:
        answered = predictions if answered is None else answered
        for name, raw in zip(("exact", "f1"), _raw_scores(answered, truths, version_2)):
            best, threshold = best_threshold(raw, answered, truths, null_odds)
            scores[f"best_{name}"], scores[f"best_{name}_thresh"] = best, threshold
    return scores


def best_threshold(
    scores: Mapping[str, float],
    answered: Mapping[str, str],
    truths: Mapping[str, Sequence[str]],
    null_odds: Mapping[str, float],
) -> tuple[float, float]:
    """The best score in percent that a threshold on the odds reaches, and the lowest such threshold; 0 if to answer
    nothing at all is as good.

    Questions are answered in the order of their odds: each answer to a question that has one brings its score, each
    to one that has none loses the point that silence had.
    """
    current = best = float(sum(not answers for answers in truths.values()))
    threshold = 0.0
    for question in sorted(truths, key=null_odds.__getitem__):
        if truths[question]:
            current += scores[question]
        elif answered[question]:
            current -= 1.0
        if current > best:
            best, threshold = current, null_odds[question]
    return 100.0 * best / len(truths), threshold


def _raw_scores(
    predictions: Mapping[str, str], truths: Mapping[str, Sequence[str]], version_2: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """Exact match and F1 of each question: the best over its answers."""
    exact, f1 = {}, {}
    for question, answers in truths.items():
        if version_2:  # an answer without words is none
            answers = [answer for answer in answers if normalized(answer)]
        golds = answers or [""]
        exact[question] = max(exact_match(predictions[question], gold) for gold in golds)
        f1[question] = max(word_f1(predictions[question], gold, version_2) for gold in golds)
    return exact, f1
