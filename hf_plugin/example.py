"""Inputs of the right shape for a transformers model, made of random numbers."""

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel

from head_pruning import HeadPruningError


def example_inputs(model: PreTrainedModel, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Keyword arguments of a forward pass, always the same for the same shape.

    Args:
        model: for text, images (their size is the configuration's), sound, or several of these.
        batch: examples.
        length: tokens of source and target, or frames of a sound; an image has what it has.

    Raises:
        HeadPruningError: the model takes something else, or not so many tokens.
    """
    config = model.config
    takes = inspect.signature(model.forward).parameters
    draw = torch.Generator().manual_seed(0)
    made: dict[str, torch.Tensor] = {}
    main = model.main_input_name
    if "input_ids" in takes and (main == "input_ids" or getattr(config, "text_config", None) is not None):
        text = getattr(config, "text_config", None) or getattr(config, "encoder", None) or config
        _check_length(text, length)
        words = _value(text, "vocab_size", "src_vocab_size")
        # The first few are special in most vocabularies.
        made["input_ids"] = torch.randint(min(5, words - 1), words, (batch, length), generator=draw)
        if "attention_mask" in takes:
            made["attention_mask"] = torch.ones_like(made["input_ids"])
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


def _value(config: Any, *names: str) -> Any:
    return next(value for name in names if (value := getattr(config, name, None)) is not None)


def _check_length(config: Any, length: int) -> None:
    longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if isinstance(longest, int) and 0 < longest < length:
        raise HeadPruningError(f"The model has {longest} positions; --length {length} is more, give less.")


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
