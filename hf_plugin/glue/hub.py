"""GLUE as the Hugging Face hub lays it out: one configuration per task, class numbers in the hub's own order."""

from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, load_dataset

from head_pruning import HeadPruningError

from .reading import SCORES, make_dataset
from .tasks import HUB_REPOSITORY, GlueTask, Split


def load_hub(task: GlueTask, repository: str = HUB_REPOSITORY, cache_dir: "str | None" = None) -> DatasetDict:
    """All splits of ``task`` as the hub has them, from its cache when it cannot be reached.

    Args:
        task: the task.
        repository: a dataset's name on the hub, or a folder that holds a copy of one.
        cache_dir: where ``datasets`` keeps them; None for its default.

    Raises:
        HeadPruningError: they can neither be downloaded nor found in the cache.
    """
    try:
        return load_dataset(repository, task.hub_config, cache_dir=cache_dir)
    except Exception as error:  # the network libraries beneath share no base class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0].rstrip(".")
        raise HeadPruningError(
            f"{task.folder} cannot be loaded from the hub's {repository} ({reason}); give --data_dir with a folder "
            f"of GLUE's TSV files, which python -m prepare.glue --tasks {task.folder} --from FOLDER makes of a copy."
        ) from error


def hub_split(task: GlueTask, split: Split, tables: DatasetDict, repository: str = HUB_REPOSITORY) -> Dataset:
    """One split of what :func:`load_hub` returned, in our form; see :func:`from_hub`."""
    if split.hub not in tables:
        raise HeadPruningError(
            f"{repository} has no split {split.hub} of {task.folder}; "
            f"give --data_dir with a folder of GLUE's TSV files."
        )
    return from_hub(task, split, tables[split.hub], f"The split {split.hub} of {task.folder} in {repository}")


def from_hub(task: GlueTask, split: Split, table: Dataset, place: str) -> Dataset:
    """A split in the hub's columns, turned into the form of ``read_tsv``.

    Class numbers go over by the classes' names. A test split's ``idx`` is the index in GLUE's file. ``place`` names
    the split in errors.

    Raises:
        HeadPruningError: a column is missing, there are no rows, or a label is unknown.
    """
    wanted = [*task.hub_columns, *(["label"] if split.labelled else [])]
    missing = [name for name in wanted if name not in table.column_names]
    if missing:
        raise HeadPruningError(
            f"{place} has no column {missing[0]!r}; it should have the hub's columns {', '.join(wanted)}."
        )
    if not len(table):
        raise HeadPruningError(f"{place} has no rows; get it again.")
    texts = [table[name][:] for name in task.hub_columns]
    if split.labelled:
        return make_dataset(task, texts, _labels(task, table, place))
    return make_dataset(task, texts, None, table["idx"][:] if "idx" in table.column_names else None)


def _labels(task: GlueTask, table: Dataset, place: str) -> list[Any]:
    values = table["label"][:]
    if task.labels is None:
        wrong = [value for value in values if value is None or not SCORES[0] <= value <= SCORES[1]]
        if wrong:
            raise HeadPruningError(f"{place} has the label {wrong[0]}, no number from 0 to 5; get it again.")
        return values
    feature = table.features["label"]
    numbers = {label: number for number, label in [*enumerate(task.labels), *enumerate(task.written or ())]}
    # A number without a name is safe only where the files' own spelling is that number.
    names = feature.names if isinstance(feature, ClassLabel) else None
    spellings = {
        value: names[value] if names and 0 <= value < len(names) else str(value) for value in dict.fromkeys(values)
    }
    unknown = next((value for value, spelling in spellings.items() if spelling not in numbers), None)
    if unknown is not None:
        raise HeadPruningError(
            f"{place} has the label {unknown!r}, which names none of {', '.join(task.labels)}; get it again "
            f"with the classes' names in its features."
        )
    return [numbers[spellings[value]] for value in values]
