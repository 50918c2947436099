"""Gradient progressive pruning (GPP, Neural Networks 2024): heads and feed-forward units fade out together.

Every unit has an indicator z, which multiplies what it gives. Each percent of progress the indicators are set anew:
those whose gradients have added up to the most are turned down together, the others are 1; in the end they are 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Iterator, Mapping, Optional

import numpy as np
import torch

from ..compact.shapes import FLAG, Number, Rest, Whole
from ..errors import HeadPruningError
from ..masks import full_mask
from ..options import TARGET_SPARSITY, require
from ..pruner import SessionView
from ..registry import register_pruner
from ..schedules import count_of
from .base import HeadPruner

#: What ``pruning_type`` may name, and what is numbered then.
TYPES = {"structured_heads": "heads", "structured_mlp": "ffn"}
_BOTH = "+".join(TYPES)
#: The derivative of the penalty, 0.5 * sum |z|, with respect to an indicator above 0.
PENALTY = 0.5


@dataclass
class GppConfig:
    """Options of gradient progressive pruning."""

    target_sparsity: Optional[float] = field(default=None, metadata=TARGET_SPARSITY)
    pruning_type: str = field(
        default=_BOTH, metadata={"help": f"what is pruned: {', '.join(TYPES)}, or several joined with +"}
    )
    prepruning_finetune_epochs: float = field(
        default=0.0, metadata={"help": "epochs of ordinary training before pruning begins"}
    )
    prune_epochs: Optional[float] = field(
        default=None,
        metadata={"help": "epochs in which heads and units fade out; default: half of what is left of training"},
    )
    retrain_lr_factor: float = field(
        default=1.0,
        metadata={"help": "factor on the learning rate after pruning, when its schedule begins anew"},
    )
    published_gradients: bool = field(
        default=False,
        metadata={
            "help": "as the published code: the model's gradients are never cleared, so that each update adds its own "
            "to the clipped sum of all before; fewer units than asked for go where gradients tie"
        },
    )


def squared_cosine(step: int, steps: int, target: float) -> float:
    """The sparsity of GPP: ``target * ((1 - cos(pi * step / steps)) / 2)**2``; ``target`` from ``steps`` on.

    Args:
        step: updates of pruning made, from 0.
        steps: updates of pruning in all.
        target: the sparsity in the end.
    """
    return target if step >= steps else target * ((1 - math.cos(math.pi * step / steps)) / 2) ** 2


def selected(gradient: np.ndarray, sparsity: float, *, published: bool = False) -> np.ndarray:
    """``bool[n]``: the ``sparsity`` of units whose ``gradient`` (``[n]``) is the largest in absolute value.

    Exactly so many, ties by the lower index; ``published``: those above the next one, so fewer where some tie.
    """
    size = np.abs(gradient)
    order = np.argsort(-size, kind="stable")
    count = int(size.size * sparsity) if published else count_of(sparsity, size.size)
    if published:
        return size > size[order[count]]
    chosen = np.zeros(size.size, dtype=bool)
    chosen[order[:count]] = True
    return chosen


class GppPruner(HeadPruner):
    """Fades out the heads and feed-forward units whose indicators' gradients add up to the most.

    The gradient of an indicator has two parts: 0.5 of the penalty ``0.5 * sum |z|`` in each update in which it is
    above 0, and that of the loss, which is below 0 for a unit that is of use. The first is known without looking, the
    second is summed in float64, on the device: it is read when indicators are set, about once for each percent of
    sparsity. Sparsity is that of each type, and follows a squared cosine.

    Training has three phases, before, during and after pruning, each with an optimizer and a learning-rate schedule of
    its own.
    """

    name = "gpp"
    inherits = False
    schedule_option = "prune_epochs"
    state_shapes = {
        "z": [Number(0, 1)],
        "steps_above_0": [Whole()],
        "place": (Whole(), Number(0, 1), Rest(Whole())),
        "final": [FLAG],
    }

    @property
    def target(self) -> float:
        """The share of each type that is removed."""
        return 0.5 if self.config.target_sparsity is None else self.config.target_sparsity

    def options(self) -> dict[str, Any]:
        return {**super().options(), "target_sparsity": self.target}

    @property
    def units(self) -> str:
        """What :attr:`GppConfig.pruning_type` names."""
        named = {TYPES.get(name) for name in self.config.pruning_type.split("+")}
        return "both" if len(named) > 1 else named.pop() or "heads"

    def check_options(self) -> None:
        super().check_options()
        names = self.config.pruning_type.split("+")
        if not set(names) <= TYPES.keys() or len(set(names)) < len(names):
            raise HeadPruningError(
                f"--pruning-type is {self.config.pruning_type!r}; give {', '.join(TYPES)} or {_BOTH}."
            )
        if self.config.target_sparsity is not None:
            words = "a share above 0 and below 1; for a model of which nothing is removed choose no pruner"
            require(self.config, "target_sparsity", lambda value: 0 < value < 1, words)
        require(self.config, "retrain_lr_factor", lambda value: value > 0, "above 0")
        require(self.config, "prepruning_finetune_epochs", lambda value: value >= 0, "a number of epochs, 0 or more")
        if self.config.prune_epochs is not None:
            require(self.config, "prune_epochs", lambda value: value > 0, "a number of epochs above 0")

    def attach(self, session: SessionView) -> None:
        super().attach(session)
        self._refuse_published(session.sums_losses)
        totals = {name: total for name, (_, total) in full_mask(self.unit_map).counts().items()}
        if not any(count_of(self.target, total) for total in totals.values()):
            words = " and ".join(f"{total} {name}" for name, total in totals.items())
            raise HeadPruningError(f"--target-sparsity {self.target:g} takes none of {words}; raise it.")
        self.z = np.ones(self.unit_map.num_heads)
        self.steps_above_0 = np.zeros(self.z.size)
        self.sparsity, self.step = 0.0, 0
        self._settled: list[int] = []
        self._total: Optional[torch.Tensor] = None
        self._new: Optional[torch.Tensor] = None
        self._carried: dict[str, torch.Tensor] = {}
        session.gates.set_evaluation(self.z)

    def _refuse_published(self, scaled: bool) -> None:
        if scaled and self.config.published_gradients:
            raise HeadPruningError(
                "--published-gradients adds up gradients of a mean loss that is not scaled; drop it, or train in full "
                "precision with the scripts of transformers."
            )

    # -- schedule ----------------------------------------------------------------------------------------------------

    def _plan(self) -> tuple[int, int]:
        """The update at which pruning begins, and how many it takes; settled once the length of training is known."""
        if not self._settled:
            config, total, per_epoch = self.config, self.session.total_steps, self.session.steps_per_epoch
            if not per_epoch and (config.prepruning_finetune_epochs or config.prune_epochs is not None):
                raise HeadPruningError(
                    "--prune-epochs and --prepruning-finetune-epochs need the number of updates in an epoch, which is "
                    "not known here; leave them out, and pruning takes the first half of training."
                )
            if not total:
                raise HeadPruningError(
                    "gpp needs the length of training, which is not known here; limit training by updates or epochs."
                )
            begin = round(config.prepruning_finetune_epochs * (per_epoch or 0))
            length = (total - begin) // 2 if config.prune_epochs is None else round(config.prune_epochs * per_epoch)
            length = max(1, length)
            if begin + length > total:
                raise HeadPruningError(
                    f"Pruning would end with update {begin + length} of {total}; lower --prune-epochs or "
                    "--prepruning-finetune-epochs, or train longer."
                )
            self._settled = [begin, length]
        begin, length = self._settled
        return begin, length

    @property
    def period(self) -> int:
        """Updates between two settings of the indicators: one percent of sparsity, but one update at least."""
        return max(1, int(self._plan()[1] / (100 * self.target)))

    def phase(self, step: int) -> int:
        begin, length = self._plan()
        return int(0 < begin <= step) + int(step >= begin + length)

    def lr_factor(self, step: int) -> float:
        return self.config.retrain_lr_factor if step >= sum(self._plan()) else 1.0

    def at_target(self) -> bool:
        return self.final is not None or self.step >= sum(self._plan())

    # -- an update ---------------------------------------------------------------------------------------------------

    def before_update(self, step: int) -> None:
        gates, (begin, length) = self.session.gates, self._plan()
        self.step, self._new = step, None
        if self.final is None and begin <= step <= begin + length:
            made = step - begin
            if made % self.period == 0 or made == length:
                self._set(squared_cosine(made, length, self.target))
        for name, parameter in self.session.model.named_parameters() if self._carried else ():
            if name in self._carried:
                parameter.grad = self._carried[name]
        if self.learns_gates:
            gates.set_training(self.z)
            gates.set_evaluation(self.z)
        else:
            gates.set_fixed(self.z if self.final is None else self.final)

    @property
    def learns_gates(self) -> bool:
        """Whether the indicators' gradients are summed in this update."""
        begin, length = self._plan()
        return self.final is None and begin <= self.step <= begin + length

    def _set(self, sparsity: float) -> None:
        """Set the indicators anew: those of the selected units to ``1 - sparsity / target``, the others to 1."""
        self.sparsity = sparsity
        self.z = np.where(self._selected(sparsity), 1.0 - sparsity / self.target, 1.0)

    def _selected(self, sparsity: float) -> np.ndarray:
        gradient, chosen = self.gradient(), np.zeros(self.z.size, dtype=bool)
        if self._total is None:  # nothing was learnt yet
            return chosen
        for where in self._types():
            chosen[where] = selected(gradient[where], sparsity, published=self.config.published_gradients)
        return chosen

    def _types(self) -> Iterator[slice]:
        """The places of the heads, and those of the units."""
        start = 0
        for _, total in full_mask(self.unit_map).counts().values():
            yield slice(start, start + total)
            start += total

    def gradient(self) -> np.ndarray:
        """``float64[N]``: the sums of the indicators' gradients, the penalty's among them; waits for the device."""
        learnt = 0.0 if self._total is None else self._total.cpu().numpy()
        return PENALTY * self.steps_above_0 + learnt

    def after_backward(self, loss_scale: float, denominator: float, micro_batches: int) -> None:
        self._refuse_published((loss_scale, denominator) != (1.0, 1.0))
        if self.learns_gates:
            count = np.array([denominator or 1.0])
            summed = self.session.summed(self.session.gates.gradients, count)
            new = summed[:-1] / (loss_scale * summed[-1])
            # A host that steps all the same must not spoil the sums of all updates before; the device is not asked.
            self._new = torch.where(new.isfinite().all(), new, 0.0)

    def before_step(self, step: int) -> None:
        if self.config.published_gradients:
            parameters = self.session.model.named_parameters()
            self._carried = {name: each.grad.clone() for name, each in parameters if each.grad is not None}

    def after_step(self, step: int, lr_factor: float) -> None:
        if self._new is not None:
            # What was restored lies where the model did then: hosts move it after they opened the session.
            self._total = self._new if self._total is None else self._total.to(self._new.device) + self._new
            self.steps_above_0 += self.z > 0
        self._new = None

    def skip_update(self, step: int) -> None:
        self._new = None

    # -- what a host asks --------------------------------------------------------------------------------------------

    def keep(self) -> np.ndarray:
        done = self.sparsity == self.target
        return self.z > 0 if done else ~self._selected(self.target)

    def metrics(self) -> dict[str, float]:
        self._plan()
        return {
            "sparsity": self.sparsity,
            "fading": float((self.z < 1).sum()),
            "indicator_loss": PENALTY * float(self.z.sum()) if self.learns_gates else 0.0,
        }

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, np.ndarray]:
        learnt = np.array([]) if self._total is None else self._total.cpu().numpy()
        return {
            "z": self.z.copy(),
            "steps_above_0": self.steps_above_0.copy(),
            "learnt": learnt,
            "place": np.array([self.step, self.sparsity, *self._settled], dtype=float),
            **self.final_state(),
        }

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        sizes = {state[name].size for name in ("z", "steps_above_0")} | ({state["learnt"].size} - {0})
        if sizes != {self.z.size}:
            what = "heads" if self.units == "heads" else "heads and units"
            raise HeadPruningError(
                f"The checkpoint has indicators of {state['z'].size} {what} but the model has {self.z.size}; resume "
                "with the options that the run was started with."
            )
        self.z, self.steps_above_0 = np.array(state["z"]), np.array(state["steps_above_0"])
        step, self.sparsity, *settled = state["place"].tolist()
        self.step, self._settled = int(step), [int(value) for value in settled]
        learnt = torch.from_numpy(np.array(state["learnt"], dtype=np.float64))
        self._total = learnt if learnt.numel() else None
        if self._settled and self.step >= sum(self._settled) and self.sparsity != self.target:
            raise HeadPruningError(
                f"The checkpoint has removed {self.sparsity:g} of the units, and --target-sparsity is "
                f"{self.target:g}; resume with the options that the run was started with, or start anew from its "
                "weights."
            )
        self.load_final(state, lambda: self.z)

    def tensor_state(self) -> dict[str, torch.Tensor]:
        return dict(self._carried)

    def load_tensor_state(self, state: Mapping[str, torch.Tensor]) -> None:
        parameters = dict(self.session.model.named_parameters())
        self._carried = {name: tensor.to(parameters[name].device) for name, tensor in state.items()}


register_pruner(
    name="gpp",
    config=GppConfig,
    pruner=GppPruner,
    selected_by=lambda options: options.prune_epochs is not None,
    example={"pruning_type": "structured_heads"},
)
