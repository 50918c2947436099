"""A falling number of heads with a schedule of the method's own, which heeds what training begins with."""

from __future__ import annotations

import logging
from typing import Any, Optional

import numpy as np

from ..compact.shapes import FLAG
from ..pruner import SessionView
from .engine.stages import Stage
from .falling_count import FallingCount

logger = logging.getLogger(__name__)


class OwnFall(FallingCount):
    """As the base class, but where no schedule is given the number of heads falls by the method's own.

    Where training begins from nothing no head can do yet what others cannot, and what tells heads apart crowds into
    few layers. There the number falls over the first 0.1, and every kind of attention keeps a head if K allows, unless
    options say otherwise. The first update settles it; a resumed run goes on as it began.
    """

    schedule_option = "count_schedule"
    state_shapes = {**FallingCount.state_shapes, "scratch": (FLAG,)}
    #: The schedule where training goes on from a trained model.
    trained_fall = "0:0.2"
    #: The options whose defaults are others where training begins from nothing.
    by_beginning: tuple[str, ...] = ("count_schedule", "min_heads_per_kind")

    _scratch: Optional[bool] = None

    @property
    def count_schedule(self) -> Optional[str]:
        if self.config.count_schedule is not None:
            return self.config.count_schedule
        return "0:0.9" if self.freezes_model else "0:0.1" if self.from_scratch else self.trained_fall

    @property
    def from_scratch(self) -> bool:
        """Whether the model had learnt nothing when the run began; until it began, what the host says."""
        if self._scratch is not None:
            return self._scratch
        return self.session is not None and not self.session.starts_trained

    def min_per_kind(self, count: int) -> int:
        if self.config.min_heads_per_kind is None and self.from_scratch and self.units != "ffn":
            return int(count >= len(self.unit_map.kinds()))
        return super().min_per_kind(count)

    def options(self) -> dict[str, Any]:
        found = super().options()
        if self.session is not None:
            found["min_heads_per_kind"] = self.min_per_kind(self.counts[-1])
        return found

    def attach(self, session: SessionView) -> None:
        self._scratch = None
        super().attach(session)

    def _set_out(self, scratch: bool) -> None:
        """Have the run be one from nothing, or not, from here on: what is planned depends on it."""
        self._scratch = scratch
        self._open = None
        assert self.rounds is not None  # the count is required
        self.rounds = self.plan(len(self.rounds.supports))

    def _timetable(self) -> list[Stage]:
        if self._scratch is None:  # the host knows by then
            self._set_out(self.from_scratch)
            if self._scratch:
                found = self.options()
                logger.info(
                    "training begins from nothing: %s prunes with %s, by default or as given",
                    self.name,
                    " ".join(f"--{name.replace('_', '-')} {found[name]}" for name in self.by_beginning),
                )
        return super()._timetable()

    def reset_optimizer(self) -> None:
        super().reset_optimizer()
        self._scratch = None

    def state_dict(self) -> dict[str, np.ndarray]:
        return {**super().state_dict(), "scratch": np.array([float(self.from_scratch)])}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        # Runs of earlier versions began as if from a trained model.
        self._set_out(bool(state.get("scratch", np.zeros(1))[0]))
        super().load_state_dict(state)
