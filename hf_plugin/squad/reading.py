"""SQuAD's questions: out of its JSON files, or out of the hub's tables."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Sequence

from datasets import Dataset, Features, Value, load_dataset

from head_pruning import HeadPruningError
from head_pruning.errors import one_line
from head_pruning.files import parse_json

logger = logging.getLogger(__name__)

FEATURES = Features(
    {
        "id": Value("string"),
        "question": Value("string"),
        "context": Value("string"),
        "answers": [Value("string")],
        "starts": [Value("int32")],
    }
)


@dataclass(frozen=True)
class SquadVersion:
    """What is fixed about SQuAD v1.1 or v2.0.

    Attributes:
        number: ``1.1`` or ``2.0``.
        unanswerable: whether some questions have no answer in their text.
        repository: the dataset on the hub.
        rows: the questions of train and dev.
        sha256: of train and dev as their makers publish them.
    """

    number: str
    unanswerable: bool
    repository: str
    rows: tuple[int, int]
    sha256: tuple[str, str]

    @property
    def files(self) -> tuple[str, str]:
        """The official names of train and dev."""
        return f"train-v{self.number}.json", f"dev-v{self.number}.json"


VERSIONS = {
    version.number: version
    for version in (
        SquadVersion(
            "1.1",
            False,
            "rajpurkar/squad",
            (87599, 10570),
            (
                "3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955",
                "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9",
            ),
        ),
        SquadVersion(
            "2.0",
            True,
            "rajpurkar/squad_v2",
            (130319, 11873),
            (
                "68dcfbb971bd3e96d5b46c7177b16c1a4e7d4bdef19fb204502738552dede002",
                "80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8",
            ),
        ),
    )
}
SPLITS = ("train", "validation")


def read_squad(path: "str | Path", unanswerable: bool) -> Dataset:
    """Read a file in SQuAD's JSON layout.

    Args:
        path: the file.
        unanswerable: whether questions without an answer may occur (v2.0).

    Returns:
        One row per question: ``id``, ``question``, ``context``, ``answers`` (texts; empty if unanswerable) and
        ``starts`` (the characters of the context at which they begin).

    Raises:
        HeadPruningError: the file is missing or damaged, has another layout or no questions, two questions share an
            id, an answer does not stand in its context, or a question has none although ``unanswerable`` is False.
    """
    path = Path(path)
    try:
        data = parse_json(path.read_bytes())
    except OSError as error:
        raise HeadPruningError(
            f"{path} cannot be read ({error.strerror}); give --data_dir the folder that python -m prepare.squad "
            f"writes."
        ) from error
    except ValueError as error:
        raise HeadPruningError(
            f"{path} is damaged ({one_line(error)}); get it again with python -m prepare.squad."
        ) from error
    try:
        rows = list(_questions(data))
    except (KeyError, TypeError, AttributeError) as error:
        raise HeadPruningError(
            f"{path} is not in SQuAD's layout (data, paragraphs, qas, answers; the first lack: {error}); get it again "
            f"with python -m prepare.squad."
        ) from error
    return _checked(rows, str(path), unanswerable)


def _questions(data: Any) -> Iterator[dict[str, Any]]:
    for article in data["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                answers = [] if question.get("is_impossible") else question["answers"]
                yield {
                    "id": str(question["id"]),
                    "question": str(question["question"]),
                    "context": paragraph["context"],
                    "answers": [answer["text"] for answer in answers],
                    "starts": [answer["answer_start"] for answer in answers],
                }


def hub_table(
    version: SquadVersion, split: str, repository: "str | None" = None, cache_dir: "str | None" = None
) -> Dataset:
    """One split (``train`` or ``validation``) as the hub has it, from its cache when it cannot be reached.

    Args:
        version: which of the two.
        split: its name on the hub.
        repository: a dataset's name on the hub, or a folder that holds a copy of one; default: the version's.
        cache_dir: where ``datasets`` keeps it; None for its default.

    Raises:
        HeadPruningError: it can neither be downloaded nor found in the cache.
    """
    repository = repository or version.repository
    try:
        return load_dataset(repository, split=split, cache_dir=cache_dir)
    except Exception as error:  # the network libraries beneath share no base class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0].rstrip(".")
        raise HeadPruningError(
            f"SQuAD v{version.number} cannot be loaded from the hub's {repository} ({reason}); give --data_dir with "
            f"{' and '.join(version.files)}, which python -m prepare.squad makes."
        ) from error


def from_squad_hub(table: Dataset, version: SquadVersion, place: str) -> Dataset:
    """A split in the hub's columns, turned into the form of :func:`read_squad`; ``place`` names it in errors."""
    wanted = ("id", "question", "context", "answers")
    missing = [name for name in wanted if name not in table.column_names]
    if missing:
        raise HeadPruningError(
            f"{place} has no column {missing[0]!r}; it should have the hub's columns {', '.join(wanted)}."
        )
    rows = [
        {
            "id": row["id"],
            "question": row["question"],
            "context": row["context"],
            "answers": list(row["answers"]["text"]),
            "starts": list(row["answers"]["answer_start"]),
        }
        for row in table
    ]
    return _checked(rows, place, version.unanswerable)


def _checked(rows: Sequence[dict[str, Any]], place: str, unanswerable: bool) -> Dataset:
    if not rows:
        raise HeadPruningError(f"{place} has no questions; get it again with python -m prepare.squad.")
    seen: set[str] = set()
    blank = []
    for row in rows:
        if row["id"] in seen:
            raise HeadPruningError(f"{place} has two questions with the id {row['id']}; give them different ids.")
        seen.add(row["id"])
        if not row["answers"] and not unanswerable:
            raise HeadPruningError(
                f"{place}: the question {row['id']} has no answer; add --version_2_with_negative if this is SQuAD "
                f"v2.0."
            )
        for text, start in zip(row["answers"], row["starts"], strict=True):
            if not _stands_at(row["context"], text, start):
                raise HeadPruningError(
                    f"{place}: the answer {text!r} of the question {row['id']} does not stand at character {start} of "
                    f"its context; correct it, or get the file again with python -m prepare.squad."
                )
        if any(not text.strip() for text in row["answers"]):
            blank.append(row["id"])
    if blank:
        logger.warning("%s: %d questions with a blank answer left out (first: %s).", place, len(blank), blank[0])
        left_out = set(blank)
        rows = [row for row in rows if row["id"] not in left_out]
    columns = {name: [row[name] for row in rows] for name in FEATURES}
    return Dataset.from_dict(columns, features=FEATURES)


def _stands_at(context: str, text: Any, start: Any) -> bool:
    return isinstance(text, str) and isinstance(start, int) and start >= 0 and context.startswith(text, start)
