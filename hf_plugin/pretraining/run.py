"""Pretraining, or preparing a teacher, or pruning a student while its teacher is there: one run."""

import inspect
import logging
from pathlib import Path
from typing import Any, Callable, Optional

import torch
from datasets import Dataset, concatenate_datasets
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForPreTraining
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING, MODEL_FOR_PRETRAINING_MAPPING

from head_pruning import HeadPruningError
from head_pruning.outputs import LastLayer

from ..command_line.arguments import Arguments
from ..command_line.fields import ModelArguments, PretrainingArguments
from ..scripts.models import check_twin, load_model, load_tokenizer
from ..scripts.run import DenseTrainer, PruningTrainer, TaskRun, first_examples, loading, start
from .batches import EpochTold, Masker, Pairs
from .folder import fingerprint, open_pairs, read_about
from .trainer import Pretrains, metrics_of, scores_of

logger = logging.getLogger(__name__)


class _Dense(Pretrains, DenseTrainer):
    pass


class _Pruning(Pretrains, PruningTrainer):
    pass


def model_class(config: Any) -> Any:
    """The auto class of a model's masked words, with the head for the next sentence where there is one.

    Raises:
        HeadPruningError: it has neither.
    """
    both = MODEL_FOR_PRETRAINING_MAPPING.get(type(config), None)
    if both is not None and "next_sentence_label" in inspect.signature(both.forward).parameters:
        return AutoModelForPreTraining
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
        raise HeadPruningError(
            f"A model of the type {config.model_type} has no head that guesses masked words; take one such as BERT."
        )
    logger.info("the model has no head for the next sentence, so masked words alone are learnt")
    return AutoModelForMaskedLM


def load_pieces(
    model_args: ModelArguments,
    takes_new: Callable[[str], Any] = lambda tensor: None,
    fits: Optional[Callable[[nn.Module], Any]] = None,
) -> tuple[Any, Any]:
    """The tokenizer and the model; arguments and errors as of :func:`hf_plugin.glue.run.load_pieces`."""
    name, hub = model_args.model_name_or_path, model_args.hub_options()
    with loading(name):
        config = AutoConfig.from_pretrained(model_args.config_name or name, **hub)
        auto = model_class(config)
        tokenizer = load_tokenizer(model_args)
        if fits is not None:
            check_twin(auto, config, fits)
        model, _ = load_model(auto, name, takes_new, config=config, **hub)
    return tokenizer, model


def last_layer_of(model: nn.Module) -> Optional[nn.Linear]:
    """The layer that makes logits of words; None for models that have none of their own."""
    return getattr(model, "get_output_embeddings", lambda: None)()


def checked_last_layer(model: nn.Module) -> Optional[LastLayer]:
    """The layer, if the model without it gives what the layer makes its logits of; tried on two words."""
    last, was = LastLayer.of(model, last_layer_of), model.training
    if last is None:
        return None
    words = torch.tensor([[1, 2]], device=last.layer.weight.device)
    model.eval()
    try:
        with torch.no_grad():
            whole = model(input_ids=words)
            with last.left_out():
                without = model(input_ids=words)
        found = last.late(next(v for k, v in without.items() if k.endswith("logits")))
        wanted = next(v for k, v in whole.items() if k.endswith("logits"))
        same = not torch.is_tensor(found) and torch.allclose(found.whole(), wanted, rtol=1e-3, atol=1e-4)
    except (RuntimeError, ValueError, TypeError):  # what comes after the layer cannot work with its input
        same = False
    finally:
        model.train(was)
    if not same:
        logger.info("the model works on with its logits, so those of all tokens are made at once")
    return last if same else None


class PretrainingRun(TaskRun):
    """The steps of one run on segment pairs."""

    main_metric = "perplexity"
    dense_trainer, pruning_trainer = _Dense, _Pruning

    def __init__(self, arguments: Arguments) -> None:
        super().__init__(arguments)
        assert isinstance(arguments.data, PretrainingArguments)  # as run_pretraining parses them
        data, training = arguments.data, arguments.training
        if "test" in self.splits:
            raise HeadPruningError("There is nothing to predict in pretraining; drop --do_predict.")
        if training.label_smoothing_factor:
            raise HeadPruningError("The losses of pretraining smooth no labels; drop --label_smoothing_factor.")
        if not 0 < data.mlm_probability <= 1 or not 0 <= data.validation_split_percentage < 100:
            raise HeadPruningError(
                f"--mlm_probability {data.mlm_probability:g} must be above 0 and at most 1, and "
                f"--validation_split_percentage {data.validation_split_percentage:g} from 0 to below 100; correct it."
            )
        about = read_about(data.data_dir)
        self.dataset = f"segment pairs of {Path(data.data_dir).name}"
        tokenizer, model = load_pieces(arguments.model, self.takes_new, self.fits)
        _check_fit(data.data_dir, about, tokenizer, model)
        to_train, to_validate = split_pairs(data.data_dir, about, data.validation_split_percentage)
        if not len(to_train) or "validation" in self.splits and not len(to_validate):
            raise HeadPruningError(
                f"{data.data_dir} has {len(to_train) + len(to_validate)} pairs, too few for "
                f"--validation_split_percentage {data.validation_split_percentage:g}; make them of more documents, or "
                "with fewer --shards of at least four each."
            )
        train = Pairs(first_examples(to_train, data.max_train_samples), changing=True)
        validation = Pairs(first_examples(to_validate, data.max_eval_samples))
        training.remove_unused_columns = False
        if training.ddp_find_unused_parameters is None:
            training.ddp_find_unused_parameters = False  # all of them take part
        self.trainer = self.build_trainer(
            model=model,
            train_dataset=train,
            eval_dataset=validation if "validation" in self.splits else None,
            processing_class=tokenizer,
            data_collator=Masker(
                tokenizer,
                list(inspect.signature(model.forward).parameters),
                seed=training.seed,
                probability=data.mlm_probability,
                whole_words=data.whole_word_mask,
                multiple=8 if training.fp16 or training.bf16 else 1,
            ),
            compute_metrics=metrics_of,
            preprocess_logits_for_metrics=scores_of,
            callbacks=[EpochTold(train)],
        )
        # A data-parallel wrapper looks for unused parameters in what the model gives, a compiler at its code.
        if not (training.ddp_find_unused_parameters or training.torch_compile):
            self.trainer.last_layer = checked_last_layer(model)

    def scores(self) -> dict[str, float]:
        """Those of the pairs that were kept back."""
        return {**self.trainer.evaluate(metric_key_prefix="eval"), "eval_samples": len(self.trainer.eval_dataset)}


def split_pairs(folder: "str | Path", about: dict[str, Any], percentage: float) -> tuple[Dataset, Dataset]:
    """The pairs to train on, and those to validate with, which share no document.

    Args:
        folder: of the pairs.
        about: what :func:`~hf_plugin.pretraining.folder.read_about` read there.
        percentage: that the pairs were made with; 0: all are to train on. In folders of earlier versions, where the
            second segments of both may be of the same documents: of the pairs, the last ones.

    Raises:
        HeadPruningError: the pairs were made with another percentage, or a file is damaged.
    """
    table, own = open_pairs(folder, about), about.get("validation_percentage", 0.0)
    if about["format"] == 1:
        if percentage:
            logger.warning(
                "the pairs in %s were made by an earlier version: some random second segments to train on are of "
                "documents to validate with; make them anew with python -m prepare.wikipedia to part them",
                folder,
            )
        kept = round(len(table) * (1 - percentage / 100))
        return table.select(range(kept)), table.select(range(kept, len(table)))
    back = open_pairs(folder, about, validation=True)
    if not percentage:
        return concatenate_datasets([table, back]), back.select([])
    if percentage != own:
        raise HeadPruningError(
            f"{folder} was made to validate with {own:g} % of its documents, not {percentage:g}; give "
            f"--validation_split_percentage {own:g}, or make pairs with python -m prepare.wikipedia "
            f"--validation_split_percentage {percentage:g} in another folder."
        )
    return table, back


def _check_fit(folder: "str | Path", about: dict[str, Any], tokenizer: Any, model: Any) -> None:
    """Raise HeadPruningError where the pairs are of another tokenizer, or longer than the model reads."""
    if fingerprint(tokenizer) != about["tokenizer"]:
        raise HeadPruningError(
            f"{folder} was made with another tokenizer than the model's; make pairs of it with python -m "
            "prepare.wikipedia --tokenizer, or give --tokenizer_name."
        )
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or 10**9)
    if about["max_length"] > longest:
        raise HeadPruningError(
            f"{folder} has pairs of up to {about['max_length']} tokens, but the model reads {longest}; make shorter "
            "ones with python -m prepare.wikipedia --max_seq_length."
        )
    if len(tokenizer) > model.config.vocab_size:
        raise HeadPruningError(
            f"The tokenizer has {len(tokenizer)} words, the model {model.config.vocab_size}; take those that belong "
            "together."
        )


def run(arguments: Arguments) -> dict[str, float]:
    """Do all that the arguments ask for; returns the metrics that ``all_results.json`` holds."""
    return start(PretrainingRun, arguments)
