"""Loading a run's tokenizer and model; what is missing, damaged or does not fit is said in one sentence."""

import copy
import logging
import pickle
from typing import Any, Callable, Optional

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer

from head_pruning import HeadPruningError
from head_pruning.errors import one_line
from head_pruning.quantization.engine.linears import CURE_OF_INTEGERS

from ..command_line.fields import ModelArguments

logger = logging.getLogger(__name__)

#: What SentencePiece puts before a word; tokenizers made of nothing may have it beside their special tokens.
_WORD_MARK = "\u2581"


def load_tokenizer(model_args: ModelArguments, flag: str = "--tokenizer_name", **options: Any) -> Any:
    """The tokenizer that the arguments name; ``options`` go to ``from_pretrained``, ``flag`` names another.

    Raises:
        HeadPruningError: it cannot be loaded, or there is none.
    """
    name = model_args.tokenizer_name or model_args.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **model_args.hub_options(), **options)
    except Exception as error:  # each class of tokenizers fails in its own way without its files, or with damaged ones
        raise HeadPruningError(
            f"The tokenizer of {name} cannot be loaded ({_reason(error)}); give {flag} with the folder or the hub "
            "name of one."
        ) from error
    # Where a folder has no tokenizer transformers makes one that reads every word as unknown.
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    if not any(token.strip(_WORD_MARK) for token in tokenizer.get_vocab() if token not in special):
        raise HeadPruningError(
            f"{name} holds no tokenizer (its vocabulary has only special tokens); give {flag} with the folder "
            "or the hub name of one."
        )
    return tokenizer


def check_twin(auto: Any, config: Any, fits: Callable[[nn.Module], Any]) -> None:
    """Try what is to be done to a model on one without weights, before its weights are loaded.

    Args:
        auto: a class with ``from_config``, such as ``AutoModelForSequenceClassification``.
        config: the model's configuration.
        fits: called with the model, on the meta device; raises HeadPruningError for what does not fit it. What it logs
            is not shown: the same is done to the model itself later.
    """
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with torch.device("meta"):
            twin = auto.from_config(copy.deepcopy(config))
        fits(twin)
    except HeadPruningError:
        raise
    except (NotImplementedError, RuntimeError):  # it computes with values while it is built; checked later, then
        return
    finally:
        logging.disable(before)


def refuse_stored_integers(config: Any, name: str) -> None:
    """Raise HeadPruningError if the model ``name`` of this configuration is stored with torchao's 8-bit weights."""
    if (getattr(config, "quantization_config", None) or {}).get("quant_method") == "torchao":
        raise HeadPruningError(f"The weights in {name} are 8-bit integers, {CURE_OF_INTEGERS}")


def load_model(
    auto: Any, name: str, takes_new: Callable[[str], Any] = lambda tensor: None, **options: Any
) -> tuple[Any, Optional[int]]:
    """A model in float32, and how many outputs its stored head has where the configuration wants another number.

    The layer of such a head that gives the outputs is initialised anew, with torch's random numbers.

    Args:
        auto: a class with ``from_pretrained``, such as ``AutoModelForSequenceClassification``.
        name: the model's folder or hub name.
        takes_new: called with the name of a tensor that is not in the files, so that it starts anew; raises
            HeadPruningError where the whole model must have been trained.
        options: for ``from_pretrained``.

    Raises:
        HeadPruningError: the weights are damaged, others than the head's do not fit the configuration, or
            ``takes_new`` says no.
    """
    try:
        # A model saved in half precision is trained in float32 (--fp16 and --bf16 mix precisions themselves).
        model, report = auto.from_pretrained(
            name, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True, **options
        )
    except (SafetensorError, pickle.UnpicklingError, EOFError) as error:
        raise HeadPruningError(f"The weights in {name} are damaged ({_reason(error)}); copy them again.") from error
    body = f"{model.base_model_prefix}."
    outputs = None
    for tensor, stored, wanted in sorted(report["mismatched_keys"]):
        if tensor.startswith(body) or stored[1:] != wanted[1:]:
            raise HeadPruningError(
                f"{tensor} in {name} has the shape {tuple(stored)} where the configuration says {tuple(wanted)}; give "
                f"the configuration that belongs to the weights."
            )
        outputs = stored[0]
    _check_outputs(model, name)
    new = sorted({*report["missing_keys"], *(tensor for tensor, *_ in report["mismatched_keys"])})
    if new:
        takes_new(new[0])
    return model, outputs


def _check_outputs(model: nn.Module, name: str) -> None:
    """Raise HeadPruningError where transformers 5.0 put outputs of any number into a compact model."""
    for path, module in model.named_modules():
        inside = path.startswith(f"{model.base_model_prefix}.")
        # Subclasses of other libraries pack their weights.
        if type(module) is nn.Linear and not inside and len(module.weight) != module.out_features:
            raise HeadPruningError(
                f"{name} has {len(module.weight)} outputs where {module.out_features} belong, which transformers "
                f"{transformers.__version__} cannot start anew in a compact model; upgrade transformers."
            )


def give_padding(tokenizer: Any, model: Any) -> None:
    """Let the tokenizer pad, with its end token if it has no other, and tell the model what it pads with.

    Raises:
        HeadPruningError: it has neither token.
    """
    if tokenizer.pad_token is not None:
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        return
    if tokenizer.eos_token is None:
        raise HeadPruningError(
            f"The tokenizer of {tokenizer.name_or_path} has neither a padding nor an end token, so batches cannot be "
            f"padded; add a pad_token to its tokenizer_config.json."
        )
    logger.info("the tokenizer has no padding token, so its end token %s pads", tokenizer.eos_token)
    tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id


def _reason(error: Exception) -> str:
    return one_line(error)[:300].rstrip(".")
