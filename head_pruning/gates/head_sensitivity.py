"""Accumulated sensitivity of heads: those whose gates the loss heeds most stay, while their number falls."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, Optional

import numpy as np

from ..compact.shapes import FLAG, Number, Whole
from ..errors import HeadPruningError
from ..options import require
from ..pruner import SessionView
from ..registry import methods, register_pruner
from ..unit_map import AttentionSite
from .base import HeadCountConfig, JointConfig, UnitsConfig
from .falling_count import CountConfig
from .own_fall import OwnFall

logger = logging.getLogger(__name__)


@dataclass
class HeadSensitivityConfig(CountConfig, UnitsConfig, JointConfig, HeadCountConfig):
    """Options of accumulated sensitivity."""

    site_discount: Optional[float] = field(
        default=None,
        metadata={
            "help": "divide a head's sensitivity by its rank within its site to this power, 0 or more; 1: the second "
            "head of a site counts half, since heads of a site can do each other's work; 0: each counts alone; units "
            "of feed-forward blocks always do; default: 1, or 2 where training begins from nothing",
            "once_unset": 1.0,
        },
    )
    sensitivity_decay: float = field(
        default=0.98, metadata={"help": "decay rate, per update, of the average of the sensitivities, 0 to below 1"}
    )


class HeadSensitivityPruner(OwnFall):
    """Keeps the heads of largest averaged abs(dL/dgate), fewer with each update, until K are left.

    Gates are 1 or 0. A closed head has a gradient too, and may come back while the number falls. The score is that of
    Michel et al. 2019 (section 4.1), taken from the batches of training itself: it costs no pass of its own. By
    default the number falls over the first 0.2 of training, 0.9 where the model is not trained.

    Where training begins from nothing it falls over the first 0.1, every kind of attention keeps a head if K allows,
    and sites are discounted by 2 (:class:`OwnFall`).
    """

    name = "head_sensitivity"
    inherits = False
    by_beginning = (*OwnFall.by_beginning, "site_discount")
    state_shapes = {
        **OwnFall.state_shapes,
        "scores": [Number(0)],
        "skipped": (Whole(),),
        "final": [FLAG],
    }

    def __init__(self, config: HeadSensitivityConfig) -> None:
        super().__init__(config)
        self.freezes_model = not config.joint_pruning

    @property
    def site_discount(self) -> float:
        """The power in force."""
        if self.config.site_discount is not None:
            return self.config.site_discount
        return 2.0 if self.from_scratch else 1.0

    def options(self) -> dict[str, Any]:
        return {**super().options(), "site_discount": self.site_discount}

    def check_options(self) -> None:
        self.require_count()
        super().check_options()
        if self.config.site_discount is not None:
            require(self.config, "site_discount", lambda value: value >= 0, "0 or more")
        require(self.config, "sensitivity_decay", lambda value: 0 <= value < 1, "at least 0 and below 1")

    def attach(self, session: SessionView) -> None:
        super().attach(session)
        self.scores = np.zeros(self.unit_map.num_heads)
        self.skipped_steps = 0
        self._new: Optional[np.ndarray] = None
        self.opened = np.ones(self.scores.size)
        session.gates.set_evaluation(self.keep())

    def keep(self) -> np.ndarray:
        return self.top_k(self.discounted())

    def discounted(self) -> np.ndarray:
        """``float64[N]``: the sensitivities, those of heads divided by their rank within their site (D'Hondt's
        method); a feed-forward block has thousands of units, whose ranks would leave none of them.
        """
        scores = self.living(self.scores).copy()
        for site, where in self.unit_map.slices():
            if not isinstance(site, AttentionSite):
                continue
            rank = np.empty(site.heads)
            rank[np.argsort(-scores[where], kind="stable")] = np.arange(1.0, site.heads + 1.0)
            scores[where] /= rank**self.site_discount
        return scores

    def before_update(self, step: int) -> None:
        super().before_update(step)
        self._new = None
        if self.final is None and self.fallen(step):
            self.stay()
        if self.final is not None:
            self.session.gates.set_fixed(self.final)
            return
        self.opened = self.top_k(self.discounted(), self.open_rounds(step)).astype(np.float64)
        self.session.gates.set_training(self.opened)

    def after_backward(self, loss_scale: float, denominator: float, micro_batches: int) -> None:
        if not self.choosing:
            return
        counts = np.array([denominator, micro_batches])
        gradient, (denominator, _) = self.session.collect(self.session.gates.gradients, counts)
        self._new = np.abs(gradient / (loss_scale * (denominator or 1.0)))

    def after_step(self, step: int, lr_factor: float) -> None:
        if self._new is None:
            return
        if np.isfinite(self._new).all():
            self.scores += (1.0 - self.config.sensitivity_decay) * (self._new - self.scores)
        else:
            self.skipped_steps += 1
            logger.warning("the gate gradients are not finite: this update does not count for the sensitivities")
        self._new = None
        self.session.gates.set_evaluation(self.keep())

    def skip_update(self, step: int) -> None:
        self._new = None

    def metrics(self) -> dict[str, float]:
        kept = self.opened if self.final is None else self.final
        return {**super().metrics(), "heads_expected": float(kept.sum()), "heads_kept": float(self.keep().sum())}

    def state_dict(self) -> dict[str, np.ndarray]:
        return {
            **super().state_dict(),
            "scores": self.scores.copy(),
            "skipped": np.array([float(self.skipped_steps)]),
            **self.final_state(),
        }

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        if state["scores"].size != self.scores.size:
            raise HeadPruningError(
                f"The checkpoint has sensitivities of {state['scores'].size} heads but the model has "
                f"{self.scores.size}; resume with the options that the run was started with."
            )
        super().load_state_dict(state)
        self.scores = np.array(state["scores"], dtype=np.float64)
        self.skipped_steps = int(state["skipped"][0])
        self.load_final(state, self.keep)
        self.opened = (self.keep() if self.final is None else self.final).astype(np.float64)


def _asked_for(options: Any) -> bool:
    """Whether a count was given, and nothing that is another method's: this one needs no more."""
    others = [method for method in methods("heads").values() if method.name != HeadSensitivityPruner.name]
    return options.num_of_heads is not None and not any(method.selected_by(options) for method in others)


register_pruner(
    name="head_sensitivity",
    config=HeadSensitivityConfig,
    pruner=HeadSensitivityPruner,
    selected_by=_asked_for,
    recommended=True,
    example={"num_of_heads": 4, "joint_pruning": True, "count_schedule": "0:0.5"},
)
