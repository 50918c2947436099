"""One run of multiple choice: fine-tune, prune or both; evaluate, and save what came out."""

import functools
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoModelForMultipleChoice, DataCollatorForMultipleChoice, EvalPrediction

from head_pruning import HeadPruningError

from ..command_line.arguments import Arguments
from ..command_line.fields import SwagArguments
from ..scripts.pieces import load_pieces
from ..scripts.run import TaskRun, start
from ..scripts.tables import read_rows, tokenised
from ..scripts.tokenising import usable_length

#: What a row has: a sentence, the beginning of the next, its endings, the number of the right one.
ENDINGS = tuple(f"ending{i}" for i in range(4))
COLUMNS = ("sent1", "sent2", *ENDINGS, "label")


class SwagRun(TaskRun):
    """The steps of one run."""

    main_metric = "accuracy"

    def __init__(self, arguments: Arguments) -> None:
        super().__init__(arguments)
        assert isinstance(arguments.data, SwagArguments)  # as run_swag parses them
        data, training, cache = arguments.data, arguments.training, arguments.model.cache_dir
        if training.do_predict:
            raise HeadPruningError("run_swag.py has no test set, as SWAG's has no labels; drop --do_predict.")
        with training.main_process_first(desc="reading"):
            rows = {split: self._checked(read_rows(data, split, COLUMNS, cache), split) for split in self.splits}
        tokenizer, model = load_pieces(
            AutoModelForMultipleChoice,
            arguments.model,
            training=training.do_train,
            takes_new=self.takes_new,
            fits=self.fits,
        )
        length = usable_length(tokenizer, data.max_seq_length, tokenizer.num_special_tokens_to_add(pair=True) + 2)
        with training.main_process_first(desc="tokenising"):
            self.parts = {
                split: tokenised(
                    part,
                    functools.partial(encode, length=length),
                    tokenizer,
                    name=f"swag-{split}",
                    data=data,
                    cache_dir=cache,
                    key=length,
                )
                for split, part in rows.items()
            }
        self.dataset = data.dataset_name or str(data.validation_file or data.train_file)
        self.trainer = self.build_trainer(
            model=model,
            train_dataset=self.parts.get("train"),
            eval_dataset=self.parts.get("validation"),
            processing_class=tokenizer,
            data_collator=DataCollatorForMultipleChoice(tokenizer, pad_to_multiple_of=8 if training.fp16 else None),
            compute_metrics=_accuracy,
        )

    @staticmethod
    def _checked(rows: Dataset, split: str) -> Dataset:
        for column in COLUMNS[:-1]:
            empty = next((number for number, text in enumerate(rows[column]) if not isinstance(text, str)), None)
            if empty is not None:
                raise HeadPruningError(f"Row {empty} of {split} has no text in {column}; give it one.")
        for number, label in enumerate(rows["label"]):
            if label not in range(len(ENDINGS)):
                raise HeadPruningError(
                    f"Row {number} of {split} has the label {label!r}, which should be one of "
                    f"{', '.join(map(str, range(len(ENDINGS))))}; correct it."
                )
        return rows

    def scores(self) -> dict[str, float]:
        return {**self.trainer.evaluate(), "eval_samples": len(self.parts["validation"])}


def encode(batch: dict[str, list], tokenizer: Any, *, length: int) -> dict[str, list]:
    """Each row as one list of tokens per ending: the sentence, then the beginning with that ending."""
    firsts = [text for text in batch["sent1"] for _ in ENDINGS]
    seconds = [f"{begin} {batch[ending][row]}" for row, begin in enumerate(batch["sent2"]) for ending in ENDINGS]
    encoded = tokenizer(firsts, seconds, truncation=True, max_length=length)
    many = len(ENDINGS)
    cut = {name: [values[i : i + many] for i in range(0, len(values), many)] for name, values in encoded.items()}
    return {**cut, "labels": batch["label"]}


def _accuracy(outputs: EvalPrediction) -> dict[str, float]:
    logits = outputs.predictions[0] if isinstance(outputs.predictions, tuple) else outputs.predictions
    return {"accuracy": float((np.asarray(logits).argmax(-1) == outputs.label_ids).mean())}


def run(arguments: Arguments) -> dict[str, float]:
    """Do all that the arguments ask for; returns the metrics that ``all_results.json`` holds."""
    return start(SwagRun, arguments)
