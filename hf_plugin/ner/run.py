"""One run of token classification: fine-tune, prune or both; evaluate, predict, and save what came out."""

import functools
import logging
from typing import Any, Optional, Sequence

from datasets import ClassLabel, Dataset
from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification, EvalPrediction

from head_pruning import HeadPruningError
from head_pruning.files import atomic_path

from ..command_line.arguments import Arguments
from ..command_line.fields import NerArguments
from ..scripts.pieces import load_pieces
from ..scripts.run import TaskRun, start
from ..scripts.tables import read_rows, tokenised
from ..scripts.tokenising import usable_length
from .entities import entity_scores

logger = logging.getLogger(__name__)

#: What has no label: special tokens, padding, the later tokens of a word.
NONE = -100


class NerRun(TaskRun):
    """The steps of one run."""

    in_order = True  # predictions are the rows'
    main_metric = "f1"

    def __init__(self, arguments: Arguments) -> None:
        super().__init__(arguments)
        assert isinstance(arguments.data, NerArguments)  # as run_ner parses them
        self.data, training = arguments.data, arguments.training
        self.words = self.data.text_column_name
        self.tags = self.data.label_column_name or f"{self.data.task_name}_tags"
        cache = arguments.model.cache_dir
        with training.main_process_first(desc="reading"):
            rows = {split: self._read(split, cache) for split in self.splits}
        self.labels: list[str] = []
        tokenizer, model = load_pieces(
            AutoModelForTokenClassification,
            arguments.model,
            configure=lambda config: self._configure(config, rows),
            training=training.do_train,
            takes_new=self.takes_new,
            fits=self.fits,
        )
        length = usable_length(tokenizer, self.data.max_seq_length, tokenizer.num_special_tokens_to_add() + 1)
        with training.main_process_first(desc="tokenising"):
            self.parts = {split: self._tokenised(part, split, tokenizer, length) for split, part in rows.items()}
        self.dataset = self.data.dataset_name or str(self.data.validation_file or self.data.train_file)
        self.trainer = self.build_trainer(
            model=model,
            train_dataset=self.parts.get("train"),
            eval_dataset=self.parts.get("validation"),
            processing_class=tokenizer,
            data_collator=DataCollatorForTokenClassification(
                tokenizer, pad_to_multiple_of=8 if training.fp16 else None
            ),
            compute_metrics=self._scores,
            preprocess_logits_for_metrics=_decided,
        )

    @staticmethod
    def task_name(arguments: Arguments) -> Optional[str]:
        """``ner``, ``pos`` or ``chunk``."""
        assert isinstance(arguments.data, NerArguments)
        return arguments.data.task_name

    def _read(self, split: str, cache: Optional[str]) -> Dataset:
        return read_rows(self.data, split, [self.words, *([self.tags] if split != "test" else [])], cache)

    def _configure(self, config: Any, rows: dict[str, Dataset]) -> None:
        """Settle the labels: the model's own if they are the data's, or all that there is without training."""
        known = [str(config.id2label[number]) for number in sorted(config.id2label)]
        told = next((part for split, part in rows.items() if split != "test"), None)
        names = known if told is None else label_names(told, self.tags)
        self.labels = known if set(names) <= set(known) else names
        if "train" not in rows and self.labels is not known:
            raise HeadPruningError(
                f"The model's labels ({', '.join(known[:4])}) are not those of the data ({', '.join(names[:4])}); "
                "give a model fine-tuned on them, or add --do_train."
            )
        config.num_labels = len(self.labels)
        config.id2label = dict(enumerate(self.labels))
        config.label2id = {label: number for number, label in enumerate(self.labels)}

    def _tokenised(self, rows: Dataset, split: str, tokenizer: Any, length: int) -> Dataset:
        """What the model reads of the rows; warns of words that it does not reach."""
        # What is scored and written is one tag for each word.
        every_token = self.data.label_all_tokens and split == "train"
        settings: dict[str, Any] = {"words": self.words, "length": length, "every_token": every_token}
        rows = self._numbered(rows, split)
        made = tokenised(
            rows,
            functools.partial(encode, **settings),
            tokenizer,
            name=f"{self.data.task_name}-{split}",
            data=self.data,
            cache_dir=self.arguments.model.cache_dir,
            key=(settings, self.labels),
        )
        pairs = zip(rows["numbers"], made["labels"]) if split != "train" else ()
        cut = sum(len(numbers) > sum(label != NONE for label in labels) for numbers, labels in pairs)
        if cut:
            logger.warning(
                "%d rows of %s have words without a tag, beyond --max_seq_length or without a token: they are not "
                "scored, nor written",
                cut,
                split,
            )
        return made

    def _numbered(self, rows: Dataset, split: str) -> Dataset:
        """The rows with their words and the column ``numbers`` of labels; 0 where a test set has none."""
        words = rows[self.words][:]
        for number, sentence in enumerate(words):
            if not isinstance(sentence, list) or not all(isinstance(word, str) for word in sentence):
                raise HeadPruningError(
                    f'Row {number} of {split} has no list of words in {self.words}; give one, such as ["a", "b"].'
                )
        if self.tags not in rows.column_names:
            return Dataset.from_dict({self.words: words, "numbers": [[0] * len(each) for each in words]})
        names, place = tag_names(rows, self.tags), {label: number for number, label in enumerate(self.labels)}
        for number, (sentence, tags) in enumerate(zip(words, names)):
            if len(sentence) != len(tags):
                raise HeadPruningError(
                    f"Row {number} of {split} has {len(sentence)} words and {len(tags)} labels; correct it."
                )
            odd = next((tag for tag in tags if tag not in place), None)
            if odd is not None:
                raise HeadPruningError(
                    f"Row {number} of {split} has the label {odd!r}, which is none of {', '.join(self.labels[:8])}; "
                    "correct it, or train on data that has it."
                )
        return Dataset.from_dict({self.words: words, "numbers": [[place[tag] for tag in tags] for tags in names]})

    def _scores(self, outputs: EvalPrediction) -> dict[str, float]:
        found, wanted = (
            self._tags(outputs.predictions, outputs.label_ids),
            self._tags(outputs.label_ids, outputs.label_ids),
        )
        return entity_scores(found, wanted, by_kind=self.data.return_entity_level_metrics)

    def _tags(self, numbers: Any, labels: Any) -> list[list[str]]:
        return [[self.labels[n] for n, label in zip(*pair) if label != NONE] for pair in zip(numbers, labels)]

    def scores(self) -> dict[str, float]:
        return {**self.trainer.evaluate(), "eval_samples": len(self.parts["validation"])}

    def predict(self) -> None:
        """Write the tags of the test set: a line of tags for each row."""
        outputs = self.trainer.predict(self.parts["test"])
        if self.trainer.is_world_process_zero():
            lines = self._tags(outputs.predictions, outputs.label_ids)
            with atomic_path(self.out / "predictions.txt") as temporary:
                temporary.write_text("".join(f"{' '.join(tags)}\n" for tags in lines), encoding="utf-8")
            logger.info("predictions are in %s", self.out / "predictions.txt")


def tag_names(rows: Dataset, column: str) -> list[list[str]]:
    """The tags of each row by name; numbers without names as they are written."""
    inner = getattr(rows.features[column], "feature", None)
    if isinstance(inner, ClassLabel):
        return [[inner.names[number] for number in tags] for tags in rows[column]]
    if inner is None:
        raise HeadPruningError(f"The column {column} holds no lists of labels; give one label for each word.")
    return [[str(tag) for tag in tags] for tags in rows[column]]


def label_names(rows: Dataset, column: str) -> list[str]:
    """The names of all labels, in their order."""
    inner = getattr(rows.features[column], "feature", None)
    if isinstance(inner, ClassLabel):
        return list(inner.names)
    return sorted({tag for tags in tag_names(rows, column) for tag in tags})


def encode(batch: dict[str, list], tokenizer: Any, *, words: str, length: int, every_token: bool) -> dict[str, list]:
    """Tokens, and the label of each: that of its word on the first token alone, unless ``every_token``."""
    encoded = tokenizer(batch[words], truncation=True, max_length=length, is_split_into_words=True)
    labels = [_spread(encoded.word_ids(row), numbers, every_token) for row, numbers in enumerate(batch["numbers"])]
    return {**encoded, "labels": labels}


def _spread(places: Sequence[Optional[int]], numbers: Sequence[int], every_token: bool) -> list[int]:
    before = [None, *places[:-1]]
    return [
        NONE if place is None or place == last and not every_token else numbers[place]
        for place, last in zip(places, before)
    ]


def _decided(logits: Any, labels: Any) -> Any:
    """The best label of each token: far less to keep than the logits."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def run(arguments: Arguments) -> dict[str, float]:
    """Do all that the arguments ask for; returns the metrics that ``all_results.json`` holds."""
    return start(NerRun, arguments)
