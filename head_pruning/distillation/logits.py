"""Distillation beside any other method: the task loss plus what the student lacks of its teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import HeadPruningError
from ..options import require
from ..outputs import Late, Outputs
from ..pruner import Pruner, SessionView
from ..registry import methods, register_pruner
from .base import TERMS, DistillConfig, Distiller, compared
from .losses import divergence, mean_square


@dataclass
class LogitsConfig(DistillConfig):
    """Options of plain distillation."""

    distill_temperature: float = field(
        default=2.0, metadata={"help": "temperature of the logits in --distill logits, above 0"}
    )
    distill_while_choosing: bool = field(
        default=False,
        metadata={
            "help": "choose heads by the teacher too; without it they are chosen by the task loss alone (the "
            "separation of GRAIN): the teacher waits while the number of open heads falls, and what it says does not "
            "reach gates that learn for longer"
        },
    )
    distill_task: float = field(default=1.0, metadata={"help": "weight of the task loss beside --distill logits"})
    distill_sum: bool = field(
        default=False,
        metadata={
            "help": "add up the losses of several logits, as of masked words and of the next sentence; default: their "
            "mean, as for the start and the end of an answer"
        },
    )


class LogitsDistiller(Distiller):
    """Adds what the teacher's logits say, and its hidden states and attentions if asked to, to the task loss.

    ``distill_task * task + distill_logits * T**2 * KL + distill_hidden * MSE + distill_attention * MSE`` (Hinton et
    al. 2015; the form of the PruneOFA recipes). Several logits, as for spans of text, count in equal parts, or in full
    with ``distill_sum``; one output per example (regression) is compared by its squared difference.
    """

    name = "logits"
    starts_anywhere = True
    #: Whether gates that learn while the teacher teaches do so from the task loss alone, unless options say otherwise.
    apart = True
    _asked_once = False

    def check_options(self) -> None:
        super().check_options()
        require(self.config, "distill_temperature", lambda value: value > 0, "above 0")
        require(self.config, "distill_task", lambda value: value >= 0, "a weight, 0 or more")

    def loss(self, loss: torch.Tensor, inputs: Any, outputs: Outputs) -> torch.Tensor:
        if not self.config.distill_while_choosing and any(pruner.choosing for pruner in self.session.pruners):
            if not self._asked_once:  # one that does not fit is told of now, not after the heads were chosen
                with torch.no_grad():
                    self.terms(loss, outputs, self.teacher(outputs))
                self._asked_once = True
            return loss
        return super().loss(loss, inputs, outputs)

    def compare_logits(self, mine: Outputs, theirs: Outputs, task: torch.Tensor) -> torch.Tensor:
        terms = []
        for ours, target, tokens in compared(mine, theirs, late=True):
            if isinstance(ours, Late):
                from .engine.vocabulary import divergence as late_divergence  # executes torch, which a list does not

                terms.append(late_divergence(ours, target, self.config.distill_temperature, tokens))
            elif ours.shape[-1] == 1:
                terms.append(mean_square(ours, target, None))
            else:
                terms.append(divergence(ours, target, self.config.distill_temperature, tokens))
        return torch.stack(terms).sum() if self.config.distill_sum else torch.stack(terms).mean()

    @property
    def _apart(self) -> bool:
        return self.apart and not self.config.distill_while_choosing

    def attach(self, session: SessionView) -> None:
        learns = Pruner.learns_gates
        blind = next((each.name for each in session.pruners if type(each).learns_gates is not learns), None)
        if blind is not None and not self.config.distill_task and self._apart:
            raise HeadPruningError(
                f"With --distill-task 0 the gates of {blind} have nothing to learn from; add "
                "--distill-while-choosing, which lets them learn from the teacher, or a weight of the task loss."
            )
        super().attach(session)
        self._asked_once = False

    def objective(self, loss: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        if self._apart and any(each.learns_gates for each in self.session.pruners):
            total = self.session.gates.without(total)
        return self.config.distill_task * loss + total


def _asked_for(options: Any) -> bool:
    """Whether a weight was given, and no distiller is meant that brings such terms itself."""
    given = any(getattr(options, f"distill_{term}") is not None for term in TERMS)
    others = [method for method in methods("distils").values() if method.name != LogitsDistiller.name]
    return given and not any(method.selected_by(options) for method in others)


register_pruner(name="logits", config=LogitsConfig, pruner=LogitsDistiller, selected_by=_asked_for, recommended=True)
