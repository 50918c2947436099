"""What the distillers share: their options, the teacher, the terms of their loss, the state."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any, Optional

import numpy as np
import torch

from ..errors import HeadPruningError
from ..options import require
from ..outputs import ATTENTIONS, HIDDEN_STATES, Outputs
from ..pruner import Pruner, SessionView
from ..weights.engine.drawing import LateNumbers
from . import losses
from .teacher import DTYPES, Teacher, close_teacher, open_teacher

#: The terms of a loss, each with its weight in the option ``distill_TERM``.
TERMS = ("logits", "hidden", "attention")


@dataclass
class DistillConfig:
    """Options of every distiller."""

    teacher_path: Optional[str] = field(
        default=None,
        metadata={
            "help": "model to learn from; default: the model to train as it is before training",
            "by_content": True,
        },
    )
    teacher_dtype: Optional[str] = field(
        default=None,
        metadata={"help": f"numbers of the teacher: {', '.join(DTYPES)}; default: those of the model to train"},
    )
    distill_logits: Optional[float] = field(
        default=None, metadata={"help": "weight of the loss between logits; default: 1"}
    )
    distill_hidden: Optional[float] = field(
        default=None,
        metadata={
            "help": "weight of the mean squared difference of hidden states, summed over layers; default: the method's"
        },
    )
    distill_hidden_loss: str = field(
        default="mse",
        metadata={"help": "how hidden states are compared: mse, or cosine (1 - cosine of each token's; not for dfd)"},
    )
    distill_attention: Optional[float] = field(
        default=None,
        metadata={
            "help": "weight of the mean squared difference of attention probabilities, summed over layers; above 0 "
            "the model computes attention openly, which is slower; default: the method's"
        },
    )
    distill_layers: Optional[str] = field(
        default=None,
        metadata={
            "help": "which hidden states and attentions are compared, as STUDENT:TEACHER pairs with commas between, "
            "or last; hidden state 0 goes into the first layer, N comes out of layer N (dfd: 0 comes out of layer 1), "
            "attention 0 is that of layer 1; default: all, spread evenly over a deeper teacher's"
        },
    )
    distill_padding: bool = field(
        default=False, metadata={"help": "means over padding too, as published code has them"}
    )
    distill_attention_padding: bool = field(
        default=False, metadata={"help": "means over padding too, of attentions alone"}
    )


class Distiller(Pruner):
    """A method that learns from a teacher.

    A method implements :meth:`objective`, and sets :attr:`defaults`.
    """

    kind = "distils"
    #: The weights of :data:`TERMS` that were not given.
    defaults = {"logits": 1.0, "hidden": 0.0, "attention": 0.0}

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        needed = {HIDDEN_STATES: "hidden", ATTENTIONS: "attention"}
        self.needs = frozenset(need for need, term in needed.items() if self.weight(term) > 0)
        # A model that learns from itself must have learnt something before.
        self.needs_trained_model = config.teacher_path is None
        self._teacher: Optional[Teacher] = None
        self._numbers: Optional[LateNumbers] = None

    def weight(self, term: str) -> float:
        """The weight of one of :data:`TERMS`."""
        given = getattr(self.config, f"distill_{term}")
        return self.defaults[term] if given is None else given

    def check_options(self) -> None:
        super().check_options()
        for term in TERMS:
            if getattr(self.config, f"distill_{term}") is not None:
                require(self.config, f"distill_{term}", lambda value: value >= 0, "a weight, 0 or more")
        if self.config.teacher_dtype not in (None, *DTYPES):
            raise HeadPruningError(
                f"--teacher-dtype is {self.config.teacher_dtype!r}; choose one of {', '.join(DTYPES)}."
            )
        if not any(self.weight(term) for term in TERMS):
            raise HeadPruningError(
                f"All weights of {self.name} are 0, so nothing would be learnt from the teacher; give "
                "--distill-logits, --distill-hidden or --distill-attention."
            )
        if self.config.distill_layers is not None and not self.needs:
            raise HeadPruningError(
                "--distill-layers pairs hidden states and attentions, but neither is compared; add --distill-hidden "
                "or --distill-attention, or drop it."
            )
        if self.config.distill_layers is not None:
            losses.layer_pairs(self.config.distill_layers, sys.maxsize, sys.maxsize)  # a list of pairs at all
        if self.config.distill_hidden_loss not in losses.HIDDEN:
            raise HeadPruningError(
                f"--distill-hidden-loss is {self.config.distill_hidden_loss!r}; choose one of "
                f"{', '.join(losses.HIDDEN)}."
            )
        idle = {
            "hidden": ("--distill-hidden-loss", self.config.distill_hidden_loss != "mse"),
            "attention": ("--distill-attention-padding", self.config.distill_attention_padding),
        }
        for term, (flag, given) in idle.items():
            if given and not self.weight(term):
                raise HeadPruningError(f"{flag} is given, but --distill-{term} is 0; raise that, or drop it.")

    def options(self) -> dict[str, Any]:
        return {**super().options(), **{f"distill_{term}": self.weight(term) for term in TERMS}}

    @property
    def teacher(self) -> Teacher:
        """The teacher, while attached."""
        assert self._teacher is not None, "the distiller is not attached"
        return self._teacher

    def attach(self, session: SessionView) -> None:
        super().attach(session)
        self._numbers = None
        self._teacher = self.open_teacher(session)
        maps = (session.unit_map, self._teacher.unit_map)
        if self.needs and self.config.distill_layers is None and maps[0] is not None and maps[1] is not None:
            layer_pairs_of(None, maps[0].layers, maps[1].layers, session, self._teacher)  # told before training

    def open_teacher(self, session: SessionView) -> Teacher:
        """The teacher of the options."""
        return open_teacher(session, self.config.teacher_path, self.config.teacher_dtype)

    def detach(self) -> None:
        if self.session is not None and self._teacher is not None:
            close_teacher(self.session, self._teacher)
        self._teacher = None
        super().detach()

    def begin_anew(self) -> None:
        """The teacher stays: it may be what the model was before it was trained."""

    # -- the loss ----------------------------------------------------------------------------------------------------

    def compare_logits(self, mine: Outputs, theirs: Outputs, task: torch.Tensor) -> torch.Tensor:
        """The loss between logits, a mean; ``task`` is the task loss as a mean."""
        raise NotImplementedError

    def compare_hidden(self, mine: Outputs, theirs: Outputs) -> torch.Tensor:
        """The loss between hidden states, a sum of means over layers."""
        states = mine.hidden_states, theirs.hidden_states
        pairs = layer_pairs_of(self.config.distill_layers, *states, self.session, self.teacher)
        config = self.config
        return losses.hidden_states(
            mine, theirs, pairs, padding=config.distill_padding, kind=config.distill_hidden_loss
        )

    def loss(self, loss: torch.Tensor, inputs: Any, outputs: Outputs) -> torch.Tensor:
        """See :meth:`Pruner.loss`."""
        theirs = self.teacher(outputs)
        terms = self.terms(loss, outputs, theirs)
        self._note(terms)
        total = torch.stack([self.weight(name) * value for name, value in terms.items()]).sum()
        return self.objective(loss, outputs.weight * total)

    def objective(self, loss: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """What is minimised, of the loss so far and the sum of the distiller's weighted terms."""
        raise NotImplementedError

    def terms(self, loss: torch.Tensor, mine: Outputs, theirs: Outputs) -> dict[str, torch.Tensor]:
        """The terms of the loss whose weights are above 0, by name, not weighted yet."""
        found, layers = {}, self.config.distill_layers
        padding = self.config.distill_padding or self.config.distill_attention_padding
        if self.weight("attention"):
            pairs = layer_pairs_of(layers, mine.attentions, theirs.attentions, self.session, self.teacher)
            found["attention"] = losses.attentions(mine, theirs, pairs, padding=padding)
        if self.weight("hidden"):
            found["hidden"] = self.compare_hidden(mine, theirs)
        if self.weight("logits"):
            found["logits"] = self.compare_logits(mine, theirs, loss / mine.weight)
        return found

    def _note(self, terms: dict[str, torch.Tensor]) -> None:
        """Send the terms on their way to the log."""
        values = [value.detach() for value in terms.values()]
        if self._numbers is None or self._numbers.device != values[0].device:
            self._numbers = LateNumbers(values[0].device, (float("nan"),) * len(values))
        self._names = [f"{self.name}_{name}_loss" for name in terms]
        self._numbers.write(*values)

    def metrics(self) -> dict[str, float]:
        """The terms of the last micro-batch whose numbers have arrived from the device."""
        if self._numbers is None:
            return {}
        return {name: value for name, value in zip(self._names, self._numbers.read()) if value == value}

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, np.ndarray]:
        return {"teacher": self.teacher.fingerprint()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self.teacher.check_same(state["teacher"])


def layer_pairs_of(given: Optional[str], mine: tuple, theirs: tuple, session: Any, teacher: Teacher) -> list:
    """:func:`losses.layer_pairs`; where a model has several stacks they must be alike, or the pairs be given."""
    if given is None and len(mine) != len(theirs):
        maps = [each.unit_map for each in (session, teacher) if each.unit_map is not None]
        stacks = {name.rpartition(".")[0] for each in maps for name in each.layers}
        kinds = {site.kind for each in maps for site in each.attention}
        if len(stacks) > 2 or len(kinds) > 1:
            raise HeadPruningError(
                f"The student has {len(mine)} states in several stacks of layers and its teacher {len(theirs)}, so "
                "which to compare is not plain; give the pairs as --distill-layers."
            )
    return losses.layer_pairs(given, len(mine), len(theirs))


def compared(mine: Outputs, theirs: Outputs, *, late: bool = False) -> list[tuple[Any, Any, Optional[torch.Tensor]]]:
    """The student's and the teacher's logits in pairs, and which rows of them are tokens, where that is known.

    Args:
        mine: what the student gave.
        theirs: what the teacher gave.
        late: whether logits may be :class:`~head_pruning.outputs.Late`, those of a whole vocabulary.

    Raises:
        HeadPruningError: they do not fit.
    """
    tokens = mine.tokens.get("decoder", mine.tokens.get("encoder"))
    ours: Any = mine.late_logits if late else mine.logits
    targets: Any = theirs.late_logits if late else theirs.logits
    if [each.shape for each in ours] != [each.shape for each in targets]:
        raise HeadPruningError(
            f"The student's logits are of the shape {[list(each.shape) for each in ours]}, its teacher's of "
            f"{[list(each.shape) for each in targets]}; take a teacher of the same task and vocabulary."
        )
    rows = [tokens if tokens is not None and tokens.shape == each.shape[:-1] else None for each in ours]
    return list(zip(ours, targets, rows))
