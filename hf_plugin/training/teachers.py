"""Loading the model that a run learns from."""

from typing import Any, Optional

import torch
import transformers
from torch import nn
from transformers import AutoConfig

from head_pruning import HeadPruningError, UnitMap
from head_pruning.errors import one_line
from head_pruning.outputs import ATTENTIONS

from ..mapping.unit_map import unit_map as map_units
from .attention import ask_for_probabilities, switch_to_eager


def load_teacher(
    student: nn.Module, path: str, needs: "frozenset[str]", **options: Any
) -> tuple[nn.Module, Optional[UnitMap]]:
    """The model in a folder or on the hub, of the class that it was saved as, for ``student`` to learn from.

    Args:
        student: the model that is trained.
        path: folder or hub name.
        needs: what distillers look at; attention probabilities need eager attention.
        **options: for ``from_pretrained``.

    Returns:
        The model, and its unit map where ``needs`` is not empty.

    Raises:
        HeadPruningError: it cannot be loaded, or reads other tokens or names other classes than the student.
    """
    try:
        config = AutoConfig.from_pretrained(path, **options)
        kind: Any = getattr(transformers, next(iter(config.architectures or ()), ""), None) or type(student)
        model = kind.from_pretrained(path, dtype=torch.float32, **options)
    except Exception as error:  # each class fails in its own way with damaged files
        reason = one_line(error)[:300].rstrip(".")
        raise HeadPruningError(
            f"The teacher {path} cannot be loaded ({reason}); give --teacher_path the folder or the hub name of a "
            "trained model."
        ) from error
    _check_tokens_and_classes(path, model.config, getattr(student, "config", None))
    unit_map = map_units(model) if needs else None
    if unit_map is not None and ATTENTIONS in needs:
        switch_to_eager(model)
        ask_for_probabilities(model, unit_map)
    return model, unit_map


def _check_tokens_and_classes(path: str, theirs: Any, ours: Any) -> None:
    if ours is None:
        return
    sizes = [getattr(config, "vocab_size", None) for config in (ours, theirs)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise HeadPruningError(
            f"The teacher {path} has a vocabulary of {sizes[1]} tokens and the model to train one of {sizes[0]}, so "
            "they cannot read the same batches; take a teacher with the same tokenizer."
        )
    names = [list(config.id2label.values()) for config in (ours, theirs)]
    if sorted(names[0]) == sorted(names[1]) and names[0] != names[1]:
        raise HeadPruningError(
            f"The teacher {path} has the classes in the order {', '.join(names[1])} and the model to train "
            f"{', '.join(names[0])}; fine-tune the teacher with the same script, or start from the teacher."
        )
