"""Loading a run's tokenizer; what is missing or damaged is said in one sentence."""

import logging
from typing import Any

from transformers import AutoTokenizer

from head_pruning import HeadPruningError

from .script_arguments import ModelArguments

logger = logging.getLogger(__name__)

#: What SentencePiece puts before a word; tokenizers made of nothing may have it beside their special tokens.
_WORD_MARK = "\u2581"


def load_tokenizer(model_args: ModelArguments, **options: Any) -> Any:
    """The tokenizer that the arguments name; ``options`` go to ``from_pretrained``.

    Raises:
        HeadPruningError: it cannot be loaded, or there is none.
    """
    name = model_args.tokenizer_name or model_args.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **model_args.hub_options(), **options)
    except Exception as error:  # each class of tokenizers fails in its own way without its files, or with damaged ones
        raise HeadPruningError(
            f"The tokenizer of {name} cannot be loaded ({_reason(error)}); give --tokenizer_name with the folder or "
            f"the hub name of one."
        ) from error
    # Where a folder has no tokenizer transformers makes one that reads every word as unknown.
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    if not any(token.strip(_WORD_MARK) for token in tokenizer.get_vocab() if token not in special):
        raise HeadPruningError(
            f"{name} holds no tokenizer (its vocabulary has only special tokens); give --tokenizer_name with the "
            f"folder or the hub name of one."
        )
    return tokenizer


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
    return (" ".join(str(error).split()) or type(error).__name__)[:300].rstrip(".")
