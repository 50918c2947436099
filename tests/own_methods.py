"""Methods of somebody else's, one of heads, one of weights and a distiller, which no file of the product knows."""

import contextlib
import copy
from dataclasses import dataclass, field
from typing import Iterator

import numpy as np
import torch
from torch import nn

from head_pruning import Pruner, methods, register_pruner, registry
from head_pruning.gates.base import HeadGateConfig, HeadGatePruner
from head_pruning.weights.cubic import CubicConfig, CubicPruner


@dataclass
class DimmerConfig(HeadGateConfig):
    """Options of the dimmer."""

    dimming: float = field(default=0.5, metadata={"help": "how far a head with logit 0 is dimmed, 0 to 1"})


class DimmerPruner(HeadGatePruner):
    """Dims heads: the gate is a sigmoid of the logit, without noise."""

    name = "dimmer"

    def check_options(self) -> None:
        self.require_count()
        super().check_options()

    def draw(self, step: int) -> np.ndarray:
        shift = np.log(1.0 / self.config.dimming - 1.0)
        return 1.0 / (1.0 + np.exp(-(self.logits + shift)))

    def chain(self, gradient: np.ndarray) -> np.ndarray:
        return gradient * self.drawn * (1.0 - self.drawn)


@dataclass
class SteadyConfig(CubicConfig):
    """Options of steady weights."""

    steadiness: float = field(default=0.9, metadata={"help": "decay rate of the average of the weights, 0 to 1"})


class SteadyPruner(CubicPruner):
    """Prunes the weights whose running average is smallest."""

    name = "steady"
    kinds = ("mean",)

    def track(self, t: int, portion, gradients) -> None:
        for mean, value in zip(portion.state["mean"], portion.values):
            mean.lerp_(value, 1.0 - self.config.steadiness)

    def scores(self, portion):
        scores = portion.scratch()
        for mean, score in zip(portion.state["mean"], scores):
            torch.abs(mean, out=score)
        return scores


@dataclass
class EchoConfig:
    """Options of the echo."""

    echo_strength: float = field(default=1.0, metadata={"help": "weight of the distance to the model at the start"})


class EchoPruner(Pruner):
    """Holds the model near to what it said before training; it keeps no state."""

    name = "echo"
    kind = "distils"

    def attach(self, session) -> None:
        super().attach(session)
        self.teacher = copy.deepcopy(session.model).eval().requires_grad_(False)

    def loss(self, loss, inputs, outputs):
        with torch.no_grad():
            theirs = outputs.call(self.teacher)
        theirs = type(outputs)(raw=theirs).logits
        far = [nn.functional.mse_loss(a.float(), b.float()) for a, b in zip(outputs.logits, theirs, strict=True)]
        return loss + outputs.weight * self.config.echo_strength * torch.stack(far).sum()


def register() -> None:
    """Register all three, each as its own file would."""
    short = {"final_threshold": 0.25, "warmup_steps": 0.2}
    register_pruner(name="dimmer", config=DimmerConfig, pruner=DimmerPruner, example={"num_of_heads": 3})
    register_pruner(name="steady", config=SteadyConfig, pruner=SteadyPruner, example=short)
    register_pruner(name="echo", config=EchoConfig, pruner=EchoPruner)


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """Inside the block they are registered."""
    methods()
    before = dict(registry._METHODS)
    register()
    try:
        yield
    finally:
        registry._METHODS.clear()
        registry._METHODS.update(before)
