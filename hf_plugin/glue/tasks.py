"""The nine GLUE tasks: files, columns, labels, metrics."""

from dataclasses import dataclass, replace
from typing import Mapping

from head_pruning import HeadPruningError

HUB_REPOSITORY = "nyu-mll/glue"


@dataclass(frozen=True)
class Split:
    """One split of a task.

    Attributes:
        key: its name among splits of its kind; the task's name, or ``mnli`` and ``mnli-mm``.
        file: its name in GLUE's layout.
        hub: its name on the hub.
        rows: the rows it has in full.
        submission: the name of its prediction file; None for a split with labels.
    """

    key: str
    file: str
    hub: str
    rows: int
    submission: "str | None" = None

    @property
    def labelled(self) -> bool:
        """Whether its rows have labels."""
        return self.submission is None


@dataclass(frozen=True)
class GlueTask:
    """What is fixed about one GLUE task.

    Attributes:
        name: lower case, as in ``--task_name``: ``sst-2``.
        folder: its folder below data/: ``SST-2``.
        columns: the one or two text columns in the TSV header.
        label_column: the label's column there.
        labels: the classes' names, by class number; None for a regression task.
        written: the same classes as TSV and submission files spell them.
        metrics: the keys of its results; the last one ranks models.
        train, validation, test: its splits; MNLI has two for validation and two for test (matched, mismatched).
        hub_config: its configuration name on the hub.
        hub_columns: the text columns there.
        headerless: its labelled files have no header line.
        broken_lines: the official files have lines with too few columns, which every reader leaves out.
    """

    name: str
    folder: str
    columns: tuple[str, ...]
    label_column: str
    labels: "tuple[str, ...] | None"
    written: "tuple[str, ...] | None"
    metrics: tuple[str, ...]
    train: Split
    validation: tuple[Split, ...]
    test: tuple[Split, ...]
    hub_config: str
    hub_columns: tuple[str, ...]
    headerless: bool = False
    broken_lines: bool = False

    @property
    def regression(self) -> bool:
        """Whether the label is a number (STS-B: a similarity of 0 to 5)."""
        return self.labels is None

    @property
    def num_labels(self) -> int:
        """The outputs that a model needs: the classes, or 1."""
        return 1 if self.labels is None else len(self.labels)

    @property
    def id2label(self) -> dict[int, str]:
        """For the model's config, so that a saved model says what its outputs mean; empty for a regression task."""
        return dict(enumerate(self.labels or ()))

    @property
    def label2id(self) -> dict[str, int]:
        """The inverse of :attr:`id2label`."""
        return {label: number for number, label in self.id2label.items()}

    @property
    def main_metric(self) -> str:
        """The key that ranks models."""
        return self.metrics[-1]

    @property
    def splits(self) -> tuple[Split, ...]:
        """All splits, train first."""
        return (self.train, *self.validation, *self.test)

    def ordered_as(self, id2label: Mapping[int, str]) -> "GlueTask":
        """The task with its classes in the order of a fine-tuned model's ``config.id2label``.

        Models that learnt MNLI from the hub have another order than those that learnt it from GLUE's files. The task
        itself is returned where the names (case aside) are not the task's, as in ``LABEL_0``.
        """
        found = [str(id2label[number]).lower() for number in sorted(id2label)]
        if self.labels is None or self.written is None or sorted(found) != sorted(self.labels):
            return self
        order = [self.labels.index(label) for label in found]
        return replace(
            self, labels=tuple(self.labels[i] for i in order), written=tuple(self.written[i] for i in order)
        )


def _task(folder: str, rows: tuple[int, int, int], **fields) -> GlueTask:
    """A task with one validation and one test split of the usual names."""
    name = folder.lower()
    return GlueTask(
        name=name,
        folder=folder,
        train=Split(name, "train.tsv", "train", rows[0]),
        validation=(Split(name, "dev.tsv", "validation", rows[1]),),
        test=(Split(name, "test.tsv", "test", rows[2], f"{folder}.tsv"),),
        hub_config=name.replace("-", ""),
        **fields,
    )


_PAIR = ("sentence1", "sentence2")
_BINARY = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")
_WITH_F1 = ("accuracy", "f1", "combined_score")

_COLA = _task(
    "CoLA",
    (8551, 1043, 1063),
    columns=("sentence",),
    label_column="label",
    labels=("unacceptable", "acceptable"),
    written=_BINARY,
    metrics=("matthews_correlation",),
    hub_columns=("sentence",),
    headerless=True,
)
_SST2 = _task(
    "SST-2",
    (67349, 872, 1821),
    columns=("sentence",),
    label_column="label",
    labels=("negative", "positive"),
    written=_BINARY,
    metrics=("accuracy",),
    hub_columns=("sentence",),
)
_MRPC = _task(
    "MRPC",
    (3668, 408, 1725),
    columns=("#1 String", "#2 String"),
    label_column="Quality",
    labels=("not_equivalent", "equivalent"),
    written=_BINARY,
    metrics=_WITH_F1,
    hub_columns=_PAIR,
)
_STSB = _task(
    "STS-B",
    (5749, 1500, 1379),
    columns=_PAIR,
    label_column="score",
    labels=None,
    written=None,
    metrics=("pearson", "spearmanr", "combined_score"),
    hub_columns=_PAIR,
)
_QQP = _task(
    "QQP",
    (363846, 40430, 390965),
    columns=("question1", "question2"),
    label_column="is_duplicate",
    labels=("not_duplicate", "duplicate"),
    written=_BINARY,
    metrics=_WITH_F1,
    hub_columns=("question1", "question2"),
    broken_lines=True,
)
_MNLI = GlueTask(
    name="mnli",
    folder="MNLI",
    columns=_PAIR,
    label_column="gold_label",
    labels=("contradiction", "entailment", "neutral"),
    written=("contradiction", "entailment", "neutral"),
    metrics=("accuracy",),
    train=Split("mnli", "train.tsv", "train", 392702),
    validation=(
        Split("mnli", "dev_matched.tsv", "validation_matched", 9815),
        Split("mnli-mm", "dev_mismatched.tsv", "validation_mismatched", 9832),
    ),
    test=(
        Split("mnli", "test_matched.tsv", "test_matched", 9796, "MNLI-m.tsv"),
        Split("mnli-mm", "test_mismatched.tsv", "test_mismatched", 9847, "MNLI-mm.tsv"),
    ),
    hub_config="mnli",
    hub_columns=("premise", "hypothesis"),
)
_QNLI = _task(
    "QNLI",
    (104743, 5463, 5463),
    columns=("question", "sentence"),
    label_column="label",
    labels=_ENTAILMENT,
    written=_ENTAILMENT,
    metrics=("accuracy",),
    hub_columns=("question", "sentence"),
)
_RTE = _task(
    "RTE",
    (2490, 277, 3000),
    columns=_PAIR,
    label_column="label",
    labels=_ENTAILMENT,
    written=_ENTAILMENT,
    metrics=("accuracy",),
    hub_columns=_PAIR,
)
_WNLI = _task(
    "WNLI",
    (635, 71, 146),
    columns=_PAIR,
    label_column="label",
    labels=("not_entailment", "entailment"),
    written=_BINARY,
    metrics=("accuracy",),
    hub_columns=_PAIR,
)

TASKS: dict[str, GlueTask] = {
    task.name: task for task in (_COLA, _SST2, _MRPC, _STSB, _QQP, _MNLI, _QNLI, _RTE, _WNLI)
}
"""The nine tasks by name."""


def plain_name(name: str) -> str:
    """``name`` in lower case without hyphens, underscores and spaces: all spellings of a task in one."""
    return "".join(letter for letter in name.lower() if letter not in "-_ ")


def find_task(name: "str | GlueTask") -> GlueTask:
    """The task of that name in any usual spelling (``MNLI``, ``sst2``, ``STS-B``), or ``name`` if it is a task.

    Raises:
        HeadPruningError: GLUE has no such task.
    """
    if isinstance(name, GlueTask):
        return name
    for task in TASKS.values():
        if plain_name(task.name) == plain_name(name):
            return task
    known = ", ".join(task.folder for task in TASKS.values())
    raise HeadPruningError(f"GLUE has no task {name!r}; choose one of {known}.")
