"""Writing a GLUE split as the TSV file that GLUE's own archives hold."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from hf_plugin.glue.tasks import GlueTask, Split

if TYPE_CHECKING:
    from datasets import Dataset

_PARSES = "sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse"
_MNLI = f"index promptID pairID genre {_PARSES} sentence1 sentence2"
_STSB = "index genre filename year old_index source1 source2 sentence1 sentence2"
# The official columns: train, validation, test.
_HEADERS = {
    "cola": ("source label mark sentence", "source label mark sentence", "index sentence"),
    "sst-2": ("sentence label", "sentence label", "index sentence"),
    "mrpc": ("Quality,#1 ID,#2 ID,#1 String,#2 String",) * 2 + ("index,#1 ID,#2 ID,#1 String,#2 String",),
    "sts-b": (f"{_STSB} score", f"{_STSB} score", _STSB),
    "qqp": ("id qid1 qid2 question1 question2 is_duplicate",) * 2 + ("id question1 question2",),
    "mnli": (f"{_MNLI} label1 gold_label", f"{_MNLI} label1 label2 label3 label4 label5 gold_label", _MNLI),
    "qnli": ("index question sentence label",) * 2 + ("index question sentence",),
    "rte": ("index sentence1 sentence2 label",) * 2 + ("index sentence1 sentence2",),
    "wnli": ("index sentence1 sentence2 label",) * 2 + ("index sentence1 sentence2",),
}


def header(task: GlueTask, split: Split) -> list[str]:
    """The names of the official columns of a split, in order (CoLA's labelled files do not show theirs)."""
    kind = 2 if not split.labelled else int(split is not task.train)
    names = _HEADERS[task.name][kind]
    return names.split("," if "," in names else " ")


def tsv_lines(task: GlueTask, split: Split, rows: Dataset) -> Iterator[str]:
    """The lines of the official file, without line ends, for ``rows`` in the form of ``read_tsv``.

    Columns that ``rows`` cannot fill (parses, sources, ...) are empty. A tab or line end in a text becomes a space.
    """
    names = header(task, split)
    if not (task.headerless and split.labelled):
        yield "\t".join(names)
    texts = [names.index(column) for column in task.columns]
    label = names.index(task.label_column) if split.labelled else None
    numbered = names[0] in ("index", "id")
    columns = rows.to_dict()
    for number in range(len(rows)):
        fields = [""] * len(names)
        if numbered:
            fields[0] = str(columns["idx"][number])
        for i, position in enumerate(texts, start=1):
            fields[position] = re.sub(r"[\t\r\n]", " ", columns[f"sentence{i}"][number])
        if label is not None:
            value = columns["label"][number]
            fields[label] = f"{value:.3f}" if task.written is None else task.written[value]
        yield "\t".join(fields)
