"""From a model's scores for starts and ends to the answers' texts."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from head_pruning import HeadPruningError
from head_pruning.files import write_json

from .features import ragged

_CHUNK = 1024


@dataclass
class Answers:
    """The answers to a dataset, by question id.

    Attributes:
        predictions: the answer; "" for none.
        nbest: the best answers, best first, each with ``text``, ``probability``, ``start_logit`` and ``end_logit``.
        null_odds: by how much the score of no answer exceeds that of the best answer; empty for v1.1.
        answered: the best answer even where none is preferred; empty for v1.1.
    """

    predictions: dict[str, str] = field(default_factory=dict)
    nbest: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    null_odds: dict[str, float] = field(default_factory=dict)
    answered: dict[str, str] = field(default_factory=dict)

    def write(self, folder: "str | Path", name: str = "", with_nbest: bool = True) -> Path:
        """Write ``predictions_NAME.json``, ``nbest_predictions_NAME.json`` and, for v2.0, ``null_odds_NAME.json``.

        Returns:
            The first one's path.
        """
        folder = Path(folder)
        write_json(folder / f"predictions_{name}.json", self.predictions)
        if with_nbest:
            write_json(folder / f"nbest_predictions_{name}.json", self.nbest)
        if self.null_odds:
            write_json(folder / f"null_odds_{name}.json", self.null_odds)
        return folder / f"predictions_{name}.json"


def find_answers(
    rows: Dataset,
    features: Dataset,
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    *,
    n_best_size: int = 20,
    max_answer_length: int = 30,
    version_2: bool = False,
    null_score_diff_threshold: float = 0.0,
) -> Answers:
    """The best answers to all questions.

    In every window the ``n_best_size`` best starts are tried with as many best ends. A token that several windows show
    may start an answer only in the one that shows it with the most context. An answer's score is the sum of both
    logits; answers of the same text count once, with their best score.

    Args:
        rows: the questions, as ``read_squad`` returns them.
        features: their windows, as ``make_features(..., with_text=True)`` returns them.
        start_logits: of shape (windows, tokens of the longest window or more); what is beyond a window is not read.
        end_logits: likewise.
        n_best_size: also how many answers are listed.
        max_answer_length: tokens.
        version_2: there may be no answer: it scores as the null answer does in the window where that is least.
        null_score_diff_threshold: no answer is given where its score beats the best answer's by more than this.

    Raises:
        HeadPruningError: the logits do not fit the windows or are not finite.
    """
    windows = _Windows(features, start_logits, end_logits)
    found = windows.candidates(n_best_size, max_answer_length)
    nothing = windows.null_scores(len(rows)) if version_2 else None
    example = windows.example[found.window]
    order = np.lexsort((-found.score, example))
    bounds = np.searchsorted(example[order], np.arange(len(rows) + 1))
    begins, ends = windows.begins[found.start].tolist(), windows.ends[found.end].tolist()
    start_logit, end_logit = found.start_logit.tolist(), found.end_logit.tolist()
    answers = Answers()
    for i, (question, context) in enumerate(zip(rows["id"], rows["context"])):
        listed: dict[str, tuple[float, float]] = {}
        for k in order[bounds[i] : bounds[i + 1]].tolist():
            text = context[begins[k] : ends[k]].strip()
            if text and text not in listed:
                listed[text] = (start_logit[k], end_logit[k])
                if len(listed) == n_best_size:
                    break
        best = next(iter(listed), "")
        answers.predictions[question] = best
        if nothing is not None:
            null = tuple(nothing[i].tolist())
            odds = sum(null) - sum(listed[best]) if listed else 0.0
            answers.answered[question], answers.null_odds[question] = best, odds
            if odds > null_score_diff_threshold:
                answers.predictions[question] = ""
            listed[""] = null
        answers.nbest[question] = _with_probabilities(listed or {"": (0.0, 0.0)})
    return answers


def _with_probabilities(listed: dict[str, tuple[float, float]]) -> list[dict[str, Any]]:
    ordered = sorted(listed.items(), key=lambda item: -sum(item[1]))
    top = sum(ordered[0][1])
    weights = [math.exp(sum(logits) - top) for _, logits in ordered]
    total = sum(weights)
    return [
        {"text": text, "probability": weight / total, "start_logit": start, "end_logit": end}
        for (text, (start, end)), weight in zip(ordered, weights)
    ]


@dataclass(frozen=True)
class _Candidates:
    """Pairs of a start and an end token, as arrays: window, places in the flat columns of tokens, logits, score."""

    window: np.ndarray
    start: np.ndarray
    end: np.ndarray
    start_logit: np.ndarray
    end_logit: np.ndarray

    @property
    def score(self) -> np.ndarray:
        return self.start_logit + self.end_logit


class _Windows:
    """The windows' columns as arrays, beside the logits."""

    def __init__(self, features: Dataset, start_logits: np.ndarray, end_logits: np.ndarray) -> None:
        self.begins, self.offsets = ragged(features, "starts")
        self.ends, _ = ragged(features, "ends")
        self.example, self.first, self.null = (np.asarray(features[name][:]) for name in ("example", "first", "null"))
        self.tokens = np.diff(self.offsets)
        self.logits = [np.asarray(logits, dtype=np.float64) for logits in (start_logits, end_logits)]
        widest = int((self.first + self.tokens).max(initial=0))
        for logits in self.logits:
            if logits.ndim != 2 or len(logits) != len(features) or logits.shape[1] < widest:
                raise HeadPruningError(
                    f"The model's outputs of shape {logits.shape} do not fit {len(features)} windows of up to "
                    f"{widest} tokens; load it with AutoModelForQuestionAnswering."
                )
        places = np.arange(self.logits[0].shape[1])
        self.text = (places >= self.first[:, None]) & (places < (self.first + self.tokens)[:, None])
        #: Where an answer may start: of several windows with a token, in that with the most context.
        self.begin = np.zeros_like(self.text)
        self.begin[self.text] = ragged(features, "most_context")[0]
        if any(not np.isfinite(logits[self.text]).all() for logits in self.logits):
            raise HeadPruningError("The model's outputs for SQuAD are not finite; lower the learning rate.")

    def null_scores(self, rows: int) -> np.ndarray:
        """Start and end logit of the null answer, of shape (rows, 2), in each question's window of the least sum."""
        windows = np.arange(len(self.example))
        pairs = np.stack([logits[windows, self.null] for logits in self.logits], axis=1)
        order = np.lexsort((pairs.sum(axis=1), self.example))
        return pairs[order[np.searchsorted(self.example[order], np.arange(rows))]]

    def candidates(self, count: int, longest: int) -> _Candidates:
        """All pairs of the ``count`` best starts and ends that make an answer."""
        parts = [self._pairs(slice(i, i + _CHUNK), count, longest) for i in range(0, len(self.example), _CHUNK)]
        window, start, end = (np.concatenate(columns) for columns in zip(*parts))
        shift = self.offsets[:-1][window] - self.first[window]
        return _Candidates(
            window, start + shift, end + shift, self.logits[0][window, start], self.logits[1][window, end]
        )

    def _pairs(self, part: slice, count: int, longest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        text, begin = self.text[part], self.begin[part]
        starts = np.where(begin, self.logits[0][part], -np.inf)
        ends = np.where(text, self.logits[1][part], -np.inf)
        count = min(count, text.shape[1])
        best_starts, best_ends = (np.argpartition(-scores, count - 1, axis=1)[:, :count] for scores in (starts, ends))
        row = np.arange(len(text))[:, None]
        length = best_ends[:, None, :] - best_starts[:, :, None]
        fits = (length >= 0) & (length < longest) & begin[row, best_starts][:, :, None] & text[row, best_ends][:, None]
        window, i, j = np.nonzero(fits)
        start, end = best_starts[window, i], best_ends[window, j]
        # Where no pair fits, the best single token is better than no answer.
        alone = np.flatnonzero(begin.any(axis=1) & ~fits.any(axis=(1, 2)))
        token = (starts[alone] + ends[alone]).argmax(axis=1)
        return (
            np.concatenate([window, alone]) + part.start,
            np.concatenate([start, token]),
            np.concatenate([end, token]),
        )
