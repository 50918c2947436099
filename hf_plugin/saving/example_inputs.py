"""Inputs of the right shape for a transformers model, made of random numbers."""

import inspect
from typing import Any, Optional

import torch
from transformers import PreTrainedModel

from head_pruning import HeadPruningError

# How configurations call the tokens that they have positions for.
_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len")
CHOICES = 4  # of an example of a multiple choice


def longest(model: PreTrainedModel) -> Optional[int]:
    """The tokens of :func:`example_inputs` that a model has positions for; None: any number, or it reads no text."""
    config, takes = model.config, inspect.signature(model.forward).parameters
    limits: list[Any] = []
    if _reads_text(model):
        text = _text_config(config)
        limits += [next((value for name in _LIMITS if (value := getattr(text, name, None))), None), _numbered(model)]
    if config.is_encoder_decoder and "decoder_input_ids" in takes:
        limits.append(getattr(config, "max_target_positions", None))  # of what a sound is transcribed to
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def _reads_text(model: PreTrainedModel) -> bool:
    known = model.main_input_name == "input_ids" or getattr(model.config, "text_config", None) is not None
    return known and "input_ids" in inspect.signature(model.forward).parameters


def _text_config(config: Any) -> Any:
    return getattr(config, "text_config", None) or getattr(config, "encoder", None) or config


def _numbered(model: PreTrainedModel) -> Optional[int]:
    """The positions of models like RoBERTa, which count them from the one after padding; None for others."""
    modules = {name: module for name, module in model.named_modules() if name.endswith("position_embeddings")}
    tables = [module for module in modules.values() if isinstance(getattr(module, "padding_idx", None), int)]
    counts = [table.weight.shape[0] - table.padding_idx - 1 for table in tables if hasattr(table, "weight")]
    return min(counts, default=None)


def example_inputs(model: PreTrainedModel, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Keyword arguments of a forward pass, always the same for the same shape.

    Args:
        model: for text, images (their size is the configuration's), sound, or several of these.
        batch: examples.
        length: tokens of source and target, or of each choice, or frames of a sound; an image has what it has.

    Raises:
        HeadPruningError: the model takes something else, or not so many tokens.
    """
    config = model.config
    takes = inspect.signature(model.forward).parameters
    draw = torch.Generator().manual_seed(0)
    made: dict[str, torch.Tensor] = {}
    main = model.main_input_name
    limit = longest(model)
    if limit is not None and length > limit:
        raise HeadPruningError(f"The model has {limit} positions; --length {length} is more, give less.")
    if _reads_text(model):
        words = _value(_text_config(config), "vocab_size", "src_vocab_size")
        # The first few are special in most vocabularies.
        choices = (CHOICES,) if type(model).__name__.endswith("ForMultipleChoice") else ()
        made["input_ids"] = torch.randint(min(5, words - 1), words, (batch, *choices, length), generator=draw)
        if "attention_mask" in takes:
            made["attention_mask"] = torch.ones_like(made["input_ids"])
        types = _second_half(model, made["input_ids"]) if "token_type_ids" in takes else None
        if types is not None:
            made["token_type_ids"] = types
    if main == "pixel_values" or ("pixel_values" in takes and getattr(config, "vision_config", None) is not None):
        made["pixel_values"] = torch.randn(batch, *_image(config), generator=draw).to(model.dtype)
    if main == "input_values":
        # So many samples give one frame each; the first needs a little more.
        ratio = getattr(config, "inputs_to_logits_ratio", 1)
        samples = length * ratio + ratio // 4
        made["input_values"] = torch.randn(batch, samples, generator=draw).to(model.dtype)
    if main == "input_features":
        made["input_features"] = torch.randn(batch, *_features(config, length), generator=draw).to(model.dtype)
    if not made:
        raise HeadPruningError(
            f"It is not known what {type(model).__name__} reads ({main}); text, images and sounds are."
        )
    if config.is_encoder_decoder and "decoder_input_ids" in takes:
        words = _value(getattr(config, "decoder", None) or config, "vocab_size", "tgt_vocab_size")
        made["decoder_input_ids"] = torch.randint(min(5, words - 1), words, (batch, length), generator=draw)
    return made


def _second_half(model: PreTrainedModel, ids: torch.Tensor) -> Optional[torch.Tensor]:
    """Token types for ``ids``, as of pairs: 1 in the second half. None for a model that tells no types apart.

    Where ``forward`` takes types but the model has no embeddings for them (GPT-2, XLM), they are more words.
    """
    config = _text_config(model.config)
    second = (torch.arange(ids.shape[-1]) >= ids.shape[-1] / 2).long().expand(ids.shape)
    several = getattr(config, "type_vocab_sizes", None)  # TAPAS, which has one type for each column, row, rank ...
    if several:
        return torch.stack([second.clamp(max=size - 1) for size in several], dim=-1)
    # Funnel and XLNet compare the types of two tokens instead of embedding them.
    compares = any(name.endswith("seg_embed") for name, _ in model.named_parameters())
    return second.contiguous() if compares or (getattr(config, "type_vocab_size", None) or 0) > 1 else None


def _value(config: Any, *names: str) -> Any:
    return next(value for name in names if (value := getattr(config, name, None)) is not None)


def _image(config: Any) -> tuple[int, int, int]:
    vision = getattr(config, "vision_config", None) or config
    size = getattr(vision, "image_size", None) or 224
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return getattr(vision, "num_channels", 3), height, width


def _features(config: Any, length: int) -> tuple[int, int]:
    """Whisper reads bins x frames, all frames it has; others read frames x bins."""
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        return config.num_mel_bins, 2 * config.max_source_positions
    return length, _value(config, "input_feat_per_channel", "feature_size", "num_mel_bins")
