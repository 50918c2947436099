"""Dual feature distillation (DFD, Neural Networks 2024): fused hidden states of the student against the teacher's."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import HeadPruningError
from ..options import require
from ..outputs import Outputs
from ..registry import register_pruner
from .logits import LogitsConfig, LogitsDistiller


@dataclass
class DfdConfig(LogitsConfig):
    """Options of dual feature distillation."""

    window_size: int = field(
        default=3, metadata={"help": "layers of the student that are fused: one and those above it"}
    )
    flooding_b: float = field(
        default=0.01, metadata={"help": "level below which the task loss is pushed up again (flooding); 0: none"}
    )
    fuse_per_example: bool = field(
        default=False,
        metadata={"help": "fuse each example by its own shares; default: all by those of the batch, as published"},
    )
    published_fusion: bool = field(
        default=False,
        metadata={"help": "as the published code: shares grow without limit where sums of layers cancel out"},
    )


class DfdDistiller(LogitsDistiller):
    """Adds what the student's fused hidden states lack of its teacher's to the task loss.

    ``distill_task * (|task - b| + b) + distill_hidden * fused``, with flooding at the level b. The logits are compared
    too where ``distill_logits`` says so. For ``distill_layers`` state 0 is what comes out of a stack's first layer. As
    published, gates that learn meanwhile (GPP's indicators) learn from all of it.
    """

    name = "dfd"
    apart = False
    defaults = {"logits": 0.0, "hidden": 1.0, "attention": 0.0}

    def check_options(self) -> None:
        super().check_options()
        require(self.config, "window_size", lambda value: value >= 1, "a number of layers, 1 or more")
        require(self.config, "flooding_b", lambda value: value >= 0, "0 or more")
        if self.config.distill_hidden_loss != "mse":
            raise HeadPruningError(
                f"--distill-hidden-loss {self.config.distill_hidden_loss} is not for dfd, which compares fused hidden "
                "states by their squared difference; drop it."
            )

    def loss(self, loss: torch.Tensor, inputs: Any, outputs: Outputs) -> torch.Tensor:
        level = self.config.flooding_b
        flooded = outputs.weight * ((loss / outputs.weight - level).abs() + level) if level else loss
        return super().loss(flooded, inputs, outputs)

    def compare_hidden(self, mine: Outputs, theirs: Outputs) -> torch.Tensor:
        """The fused states of each stack of layers."""
        from .engine.fusion import fused_loss  # executes torch, which listing methods does not need

        config, terms = self.config, []
        depths = _depths(self.session.unit_map, len(mine.hidden_states))
        others = _depths(self.teacher.unit_map, len(theirs.hidden_states))
        if len(depths) != len(others):
            raise HeadPruningError("The student and its teacher have other stacks of layers; take one that is alike.")
        for (begin, end), (first, last) in zip(depths, others):
            mask = None if config.distill_padding else mine.masks[end - 1]
            terms.append(
                fused_loss(
                    mine.hidden_states[begin:end],
                    theirs.hidden_states[first:last],
                    config.window_size,
                    mask=mask,
                    layers=config.distill_layers,
                    per_example=config.fuse_per_example,
                    published=config.published_fusion,
                )
            )
        return torch.stack(terms).sum()


def _depths(unit_map: Any, states: int) -> list[tuple[int, int]]:
    """Of each stack of layers, where what comes out of its layers stands among the hidden states."""
    stacks = [
        len(list(group)) for _, group in itertools.groupby(unit_map.layers, lambda name: name.rpartition(".")[0])
    ]
    if len(stacks) == 1:  # a layer may run several times
        return [(1, states)]
    ends = list(itertools.accumulate(count + 1 for count in stacks))
    if ends[-1] != states:
        raise HeadPruningError(
            f"The model gave {states} hidden states, where its {len(stacks)} stacks of layers have {ends[-1]}; dfd "
            "cannot tell which are whose."
        )
    return [(end - count, end) for end, count in zip(ends, stacks)]


register_pruner(name="dfd", config=DfdConfig, pruner=DfdDistiller)
