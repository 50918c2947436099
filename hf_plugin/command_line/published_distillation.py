"""Distillation as the command lines of Prune Once for All say it: a switch, its defaults, two presets."""

import argparse
from typing import Any, Mapping, Optional

from transformers.hf_argparser import string_to_bool

from head_pruning import HeadPruningError

#: The published names of flags of today.
NAMES = {
    "teacher_name_or_path": "teacher_path",
    "cross_entropy_alpha": "distill_task",
    "knowledge_distillation_alpha": "distill_logits",
}
PRESET = "cross_model_distillation"
#: Under this name stand, among the flags that were set, the published ones, with what each has written.
TYPED = "published_distillation"
_DEFAULTS = {"distill_task": 0.5, "distill_logits": 0.5, "distill_temperature": 1.0}
#: What a preset compares beside the logits.
PRESETS: dict[str, dict[str, Any]] = {
    "distilbert": {"distill_hidden_loss": "cosine", "distill_layers": "last"},
    "tinybert": {"distill_hidden": 1.0, "distill_attention": 1.0, "distill_attention_padding": True},
}
# Weights that add up to 1 but for rounding.
_NOTHING = 1e-9


def preset_name(word: str) -> str:
    """The word as a preset's name."""
    if word.lower() not in PRESETS:
        raise argparse.ArgumentTypeError(f"{word:.80} is none of {', '.join(PRESETS)}")
    return word.lower()


def complete_distillation(given: dict[str, Any], notes: list[str]) -> None:
    """Write today's flags for the published ones and their defaults. Losses of several logits are added up.

    Raises:
        HeadPruningError: the flags contradict each other, or have nothing to say.
    """
    typed = given.pop(TYPED, {})
    on = _switch(given.get("distill"))
    if on is False:
        return _switch_off(given, typed, notes)
    if typed and "distill" not in given:
        raise HeadPruningError(f"--{next(iter(typed))} is read with --distill only; add --distill, or drop it.")
    if on:
        given["distill"] = "logits"
    preset = given.pop(PRESET, None)
    if preset and given["distill"] != "logits":
        raise HeadPruningError(
            f"--{PRESET} {preset} is a preset of --distill logits, but --distill is {given['distill']}; drop one."
        )
    if given.get("distill") == "logits" or "distill" not in given and given.get("distill_logits") is not None:
        given.setdefault("distill_sum", True)
        if "temperature" in given:
            given["distill_temperature"] = given.pop("temperature")
            notes.append("--temperature is read as --distill_temperature.")
        if on or typed:
            _add("--distill", _DEFAULTS, given, notes)
        if preset:
            _add(f"--{PRESET} {preset}", _terms(preset, given, notes), given, notes)


def _switch(word: Optional[str]) -> Optional[bool]:
    """Whether the published switch is on; None where it is not given, or distillers are named."""
    try:
        return None if word is None else string_to_bool(word)
    except argparse.ArgumentTypeError:
        return None


def _switch_off(given: dict[str, Any], typed: Mapping[str, str], notes: list[str]) -> None:
    """Leave out what the published script does not read without a teacher."""
    del given["distill"]
    left = [*typed, *(["temperature"] if "temperature" in given else [])]
    for name in left:
        given.pop(typed.get(name, name), None)
    own = [name for name in given if name.startswith("distill_")]
    if own:
        raise HeadPruningError(f"--distill False and --{own[0]} contradict each other; drop one of them.")
    if left:
        notes.append(f"--distill False: nothing is distilled, so {' and '.join(f'--{f}' for f in left)} are ignored.")


def _terms(preset: str, given: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """What a preset compares beside the logits."""
    if preset != "distilbert":
        return PRESETS[preset]
    task, logits = given["distill_task"], given["distill_logits"]
    weight = 1.0 - task - logits
    if abs(weight) < _NOTHING:
        notes.append(f"--{PRESET} {preset} compares logits alone: {task:g} and {logits:g} leave it 0 of 1.")
        return {}
    if weight < 0:
        raise HeadPruningError(
            f"--{PRESET} {preset} weighs hidden states with what the task loss and the logits leave of 1, but theirs "
            f"are {task:g} and {logits:g}; lower --cross_entropy_alpha or --knowledge_distillation_alpha."
        )
    return {"distill_hidden": weight, **PRESETS[preset]}


def _add(flag: str, values: Mapping[str, Any], given: dict[str, Any], notes: list[str]) -> None:
    """Set what is not set yet, and tell."""
    added = {name: value for name, value in values.items() if name not in given}
    given.update(added)
    if added:
        words = " ".join(f"--{name} {round(v, 9) if type(v) is float else v}" for name, v in added.items())
        notes.append(f"{flag} adds {words}, as in the published script.")
