"""Loading the model that a run learns from: a checkpoint of fairseq."""

import copy
from typing import Optional

from fairseq import checkpoint_utils
from fairseq.models import FairseqEncoderDecoderModel, FairseqEncoderModel, FairseqLanguageModel
from fairseq.tasks import FairseqTask
from fairseq.tasks.fairseq_task import StatefulContainer
from torch import nn

from head_pruning import HeadPruningError, UnitMap
from head_pruning.errors import one_line
from head_pruning.outputs import ATTENTIONS, HIDDEN_STATES

from .checkpoints.stored import load_checkpoint
from .modules.attention import UnfusedAttention, give_probabilities
from .modules.unit_map import unit_map

_KINDS = (FairseqEncoderDecoderModel, FairseqEncoderModel, FairseqLanguageModel)


def load_teacher(
    task: FairseqTask, student: nn.Module, path: str, needs: frozenset
) -> tuple[nn.Module, Optional[UnitMap]]:
    """The model of a checkpoint, dense or pruned, for ``student`` to learn from.

    Args:
        task: the student's; its dictionaries are the teacher's too.
        student: the model that is trained.
        path: the checkpoint.
        needs: what distillers look at.

    Returns:
        The model, and its unit map where ``needs`` is not empty.

    Raises:
        HeadPruningError: it cannot be loaded, has other dictionaries, gives no logits, or hidden states that cannot be
            compared with the student's.
    """
    own = copy.copy(task)  # a task keeps what it makes of the last model that it built, such as a generator
    own.state = StatefulContainer()
    try:
        (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([path], task=own)
    except HeadPruningError:
        raise
    except Exception as error:  # of fairseq, which raises whatever comes
        load_checkpoint(path)  # says what is wrong with the file itself
        raise HeadPruningError(
            f"The teacher {path} cannot be loaded ({one_line(error):.300}); give --teacher-path a model that was "
            "trained on data with the same dictionaries."
        ) from error
    if any(isinstance(student, kind) != isinstance(model, kind) for kind in _KINDS):
        raise HeadPruningError(
            f"The teacher {path} is a {type(model).__name__} and the student a {type(student).__name__}, which read "
            "other batches; take a teacher that was trained on the same task."
        )
    parts = (*student.modules(), *model.modules())
    if any(getattr(part, "adaptive_softmax", None) is not None for part in parts):
        raise HeadPruningError(
            "A model with an adaptive softmax gives no logits in training, so none are compared; train teacher and "
            "student without --adaptive-softmax-cutoff."
        )
    if not needs:
        return model, None
    mine, theirs = unit_map(student), unit_map(model)
    widths = _widths(student, mine), _widths(model, theirs)
    if HIDDEN_STATES in needs and widths[0] != widths[1]:
        raise HeadPruningError(
            f"The hidden states of the student are {_listed(widths[0])} wide and those of its teacher "
            f"{_listed(widths[1])}, so they cannot be compared; take a teacher of the same width, or compare logits "
            "only (leave --distill-hidden out)."
        )
    if ATTENTIONS in needs:
        UnfusedAttention(model).attach()
        give_probabilities(model, in_evaluation=True)
    return model, theirs


def _widths(model: nn.Module, sites: UnitMap) -> set[int]:
    """What attention modules add to the hidden states is as wide as they."""
    return {model.get_parameter(f"{site.out_proj}.weight").shape[0] for site in sites.attention}


def _listed(widths: set[int]) -> str:
    return " and ".join(map(str, sorted(widths)))
