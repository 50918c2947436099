"""A number of open heads that falls from all to K while training goes on, for any method that keeps K heads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

import numpy as np

from ..compact.shapes import STEP, Whole
from ..errors import HeadPruningError
from ..pruner import SessionView
from ..schedules import cubic_density, resolve_steps
from .base import HeadPruner
from .engine.top_k import Rounds

_FLAG = "--count-schedule"


@dataclass
class CountConfig:
    """The option of methods whose number of open heads may fall."""

    count_schedule: Optional[str] = field(
        default=None,
        metadata={
            "help": "BEGIN:END in updates, or (below 1) as fractions of training: the number of open heads falls from "
            "all to K between them, fast at first; default: the method's own, else K from the start"
        },
    )


class FallingCount(HeadPruner):
    """K(t) = K + (N - K) (1 - p)^3, p from 0 to 1 between two updates: the model starts whole.

    A mixin, before the base class of the method. ``config`` is a :class:`CountConfig`.
    """

    state_shapes = {"fall": (STEP, STEP, Whole())}

    @property
    def count_schedule(self) -> Optional[str]:
        """The schedule in force; None: K from the start."""
        return self.config.count_schedule

    def options(self) -> dict[str, Any]:
        return {**super().options(), "count_schedule": self.count_schedule}

    def check_options(self) -> None:
        super().check_options()
        self._ends()

    def _ends(self) -> tuple[float, float]:
        """What the schedule says, in updates or fractions."""
        text = self.count_schedule
        if text is None:
            return 0.0, 0.0
        try:
            begin, end = (float(part) for part in text.split(":"))
        except ValueError:
            begin = end = -1.0
        # Fractions and updates cannot be compared before the length of training is known.
        if not 0 <= begin < np.inf or not 0 < end < np.inf or (begin >= end and (begin < 1) == (end < 1)):
            raise HeadPruningError(
                f"{_FLAG} is {text!r}; give BEGIN:END, such as 0:0.2 or 100:2000, the end after the beginning."
            )
        return begin, end

    def attach(self, session: SessionView) -> None:
        super().attach(session)
        self.step = 0
        self._fall: Optional[tuple[int, int]] = None
        self._open: Optional[tuple[int, Rounds]] = None

    def _settled_fall(self) -> tuple[int, int]:
        """First and last update of the fall, settled at the first update (the host knows the run by then)."""
        if self._fall is None:
            total = self.session.total_steps
            begin, end = (resolve_steps(value, total, _FLAG) for value in self._ends())
            if begin >= end > 0 or total and end > total:
                raise HeadPruningError(
                    f"{_FLAG} {self.count_schedule} falls from update {begin} to update {end}"
                    + (f" of {total}" if total else "")
                    + "; let it end after its beginning, within training."
                )
            self._fall = begin, end
        return self._fall

    def fallen(self, step: int) -> bool:
        """Whether only K heads are open in update ``step``."""
        return step >= self._settled_fall()[1]

    def count(self, step: int) -> int:
        """The number of open heads in update ``step``."""
        begin, end = self._settled_fall()
        keep, size = self.config.num_of_heads, self.unit_map.num_heads
        return keep if step >= end else round(cubic_density(step, initial=size, final=keep, start=begin, stop=end))

    def open_rounds(self, step: int) -> Rounds:
        """How the open heads of update ``step`` are chosen, with the minimum of each group."""
        self.step, count = step, self.count(step)
        if self._open is None or self._open[0] != count:
            self._open = count, self.plan(count)
        return self._open[1]

    @property
    def choosing(self) -> bool:
        return self.final is None and not self.fallen(self.step)

    def at_target(self) -> bool:
        if self.final is not None or self.count_schedule is None:
            return super().at_target()
        # What was not settled yet has not begun.
        return self._fall is not None and super().at_target() and self.fallen(self.step + 1)

    def metrics(self) -> dict[str, float]:
        self._settled_fall()  # hosts ask before the first update, so that what cannot be is refused there
        return super().metrics()

    def reset_optimizer(self) -> None:
        super().reset_optimizer()
        self.step, self._fall = 0, None

    def state_dict(self) -> dict[str, np.ndarray]:
        if self.count_schedule is None:
            return super().state_dict()
        # It may have been given in fractions: a resumed run keeps the updates that it was started with.
        return {**super().state_dict(), "fall": np.array([*(self._fall or (-1, -1)), self.step], dtype=float)}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        if self.count_schedule is not None:
            begin, end, self.step = (int(value) for value in state["fall"])
            self._fall = (begin, end) if begin >= 0 else None
        super().load_state_dict(state)
