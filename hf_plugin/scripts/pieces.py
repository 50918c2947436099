"""The tokenizer and the model of a task that needs nothing special of them."""

from typing import Any, Callable

from torch import nn
from transformers import AutoConfig

from head_pruning import HeadPruningError

from ..command_line.fields import ModelArguments
from .models import check_twin, give_padding, load_model, load_tokenizer
from .run import loading


def load_pieces(
    auto: Any,
    model_args: ModelArguments,
    *,
    configure: Callable[[Any], None] = lambda config: None,
    training: bool,
    takes_new: Callable[[str], Any],
    fits: Callable[[nn.Module], Any],
) -> tuple[Any, Any]:
    """The tokenizer and the model; the head of a task that the model never learnt starts anew.

    Args:
        auto: the class of the model, such as ``AutoModelForTokenClassification``.
        model_args: the names.
        configure: writes what the task says into the configuration.
        training: whether the model will be trained, so that outputs of another number may start anew.
        takes_new: see :func:`hf_plugin.scripts.models.load_model`.
        fits: see :func:`hf_plugin.scripts.models.check_twin`.

    Raises:
        HeadPruningError: either cannot be loaded or does not fit the task, or the tokenizer cannot pad.
    """
    name, hub = model_args.model_name_or_path, model_args.hub_options()
    with loading(name):
        config = AutoConfig.from_pretrained(model_args.config_name or name, **hub)
        configure(config)
        tokenizer = load_tokenizer(model_args)
        check_twin(auto, config, fits)
        model, outputs = load_model(auto, name, takes_new, config=config, **hub)
    if outputs is not None and not training:
        raise HeadPruningError(f"{name} has {outputs} outputs, the task others; give a model fine-tuned on it.")
    if not tokenizer.is_fast:
        raise HeadPruningError(f"The tokenizer of {name} does not tell which token is of which word; give a fast one.")
    give_padding(tokenizer, model)
    return tokenizer, model
