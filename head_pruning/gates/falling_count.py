"""A number of open heads that falls from all to K while training goes on, for any method that keeps K heads."""

from __future__ import annotations

from dataclasses import astuple, dataclass, field, fields
from typing import Any, Optional

import numpy as np

from ..compact.shapes import FLAG, STEP, Whole
from ..errors import HeadPruningError
from ..options import require
from ..pruner import SessionView
from ..schedules import resolve_steps
from .base import HeadPruner
from .engine.stages import Stage, plan_stages, read_counts
from .engine.top_k import Rounds

_FLAG = "--count-schedule"


@dataclass
class CountConfig:
    """The options of methods whose number of open heads may fall."""

    count_schedule: Optional[str] = field(
        default=None,
        metadata={
            "help": "BEGIN:END in updates, or (below 1) as fractions of training: the number of open heads falls from "
            "all to K between them, fast at first; default: the method's own, else K from the start"
        },
    )
    save_at: Optional[str] = field(
        default=None,
        metadata={
            "help": "numbers of heads, such as 72,36,18: on its way to K training stops falling at each, trains on, "
            "and saves the compact model in sizes/headsN; each has a part of training, and a learning-rate schedule, "
            "of its own, and count-schedule is of each part"
        },
    )
    finetune_updates: Optional[int] = field(
        default=None,
        metadata={"help": "updates that each number of heads of save_at is trained on for, and K, after its fall"},
    )


class FallingCount(HeadPruner):
    """K(t) = K + (N - K) (1 - p)^3, p from 0 to 1 between two updates: the model starts whole.

    With ``save_at`` K(t) falls from one number of heads to the next, each in a stage of training of its own, and what
    was closed at the end of a stage stays closed: the masks are nested.

    A mixin, before the base class of the method. ``config`` is a :class:`CountConfig`.
    """

    state_shapes = {
        "fall": (STEP, STEP, Whole()),
        "stages": [Whole()],
        "alive": [FLAG],
    }
    schedule_state = frozenset({"fall", "stages", "alive"})
    #: The learning-rate schedule of a stage begins anew, the optimizer goes on.
    keeps_optimizer = True

    @property
    def count_schedule(self) -> Optional[str]:
        """The schedule in force; None: K from the start."""
        return self.config.count_schedule

    @property
    def _several(self) -> bool:
        return self.config.save_at is not None

    @property
    def idle_hooks(self) -> frozenset:
        return frozenset() if self._several else frozenset({"phase", "schedule_end", "size_before"})

    def options(self) -> dict[str, Any]:
        return {**super().options(), "count_schedule": self.count_schedule}

    def check_options(self) -> None:
        super().check_options()
        self._ends()
        read_counts(self.config.save_at, self.config.num_of_heads)
        if self._several and self.count_schedule is None and self.config.finetune_updates is None:
            raise HeadPruningError(
                f"--save-at stops where the number of heads falls, and {self.name} closes all at once before it knows "
                f"any; add {_FLAG} 0:0.5 (of each count's part of training), or --finetune-updates N."
            )
        if self.config.finetune_updates is None:
            return
        require(self.config, "finetune_updates", lambda value: value >= 1, "a number of updates, 1 or more")
        if not self._several:
            raise HeadPruningError("--finetune-updates trains the models of --save-at; add the one or drop the other.")
        if self.config.count_schedule is not None:
            raise HeadPruningError(
                f"{_FLAG} and --finetune-updates both say how long heads are closed; give one of them."
            )

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
        self.step = self._stage = 0
        self._over = False
        self._table: Optional[list[Stage]] = None
        self._open: Optional[tuple[int, Rounds]] = None
        #: ``bool[N]``: the heads that may still be open.
        assert session.unit_map is not None  # the session refuses pruners of heads without one
        self.alive = np.ones(session.unit_map.num_heads, dtype=bool)
        super().attach(session)
        if self._several:
            self.plan(self.counts[-1])  # refuses what cannot be

    @property
    def counts(self) -> list[int]:
        """The numbers of heads that the count falls to, one after the other; the last one is K."""
        keep = self.config.num_of_heads
        return [*(count for count in read_counts(self.config.save_at, keep) if count != keep), keep]

    def first_count(self) -> Optional[int]:
        return self.counts[0]

    # -- schedule ----------------------------------------------------------------------------------------------------

    def _timetable(self) -> list[Stage]:
        """The stages of training, settled at the first update (the host knows the run by then)."""
        if self._table is not None:
            return self._table
        size, total = self.unit_map.num_heads, self.session.total_steps
        if self._several:
            train = self.config.finetune_updates
            self._table = plan_stages(self.counts, size, total, fall=self._fall_in, train=train)
            return self._table
        begin, end = self._fall_in(total)
        if begin >= end > 0 or total and end > total:
            raise HeadPruningError(
                f"{_FLAG} {self.count_schedule} falls from update {begin} to update {end}"
                + (f" of {total}" if total else "")
                + "; let it end after its beginning, within training."
            )
        self._table = [Stage(size, self.config.num_of_heads, 0, begin, end)]
        return self._table

    def _fall_in(self, length: Optional[int]) -> tuple[int, int]:
        """First and last update of the fall in ``length`` updates."""
        begin, end = (resolve_steps(value, length, _FLAG) for value in self._ends())
        return begin, end

    def _place(self, step: int) -> int:
        """The number of the stage, from 0, that update ``step`` is in; once training is over, the last."""
        if self._over:
            return len(self._timetable()) - 1
        return sum(stage.begin <= step for stage in self._timetable()[1:])

    def fallen(self, step: int) -> bool:
        """Whether only K heads are open in update ``step``."""
        return step >= self._timetable()[-1].full

    def held(self, step: int) -> bool:
        """Whether update ``step`` is between two falls, with all the heads that may be open."""
        return self._several and self.count(step) == self.alive.sum()

    def count(self, step: int) -> int:
        """The number of open heads in update ``step``."""
        return self._timetable()[self._place(step)].open_in(step)

    def phase(self, step: int) -> int:
        return self._place(step) if self._several else 0

    def schedule_end(self, step: int) -> Optional[int]:
        following = self._timetable()[self._place(step) + 1 :] if self._several else []
        return following[0].begin if following else None

    def size_before(self, step: Optional[int]) -> Optional[str]:
        if not self._several:
            return None
        if step is None:
            keep = self.config.num_of_heads
            count = keep if keep in read_counts(self.config.save_at, keep) else None
        else:
            count = next((stage.before for stage in self._timetable()[1:] if stage.begin == step), None)
        return None if count is None or self.head_mask().kept != count else f"heads{count}"

    # -- an update ---------------------------------------------------------------------------------------------------

    def move_to(self, step: int) -> None:
        """Go to the stage of update ``step``; where its fall is over, what is closed stays closed."""
        self.step = step
        if not self._several or self.final is not None:
            return
        place = self._place(step)
        if place < self._stage:  # a host that begins once more
            self.alive[:] = True
        self._stage, stage = place, self._timetable()[place]
        if self._aim(stage.count):
            self._set_evaluation()
        if step >= stage.full and self.alive.sum() > stage.count:
            self.alive = self.keep()

    def _aim(self, count: int) -> bool:
        """Have the outcome, were training to end now, be of ``count`` heads; whether it was not before."""
        if self.rounds is not None and len(self.rounds.supports) == count:
            return False
        self.rounds = self.plan(count)
        return True

    def before_update(self, step: int) -> None:
        self.move_to(step)
        super().before_update(step)

    def open_rounds(self, step: int) -> Rounds:
        """How the open heads of update ``step`` are chosen, with the minimum of each group."""
        count = self.count(step)
        if self._open is None or self._open[0] != count:
            self._open = count, self.plan(count)
        return self._open[1]

    def living(self, scores: np.ndarray) -> np.ndarray:
        """The scores, of heads that stay closed the lowest that there is."""
        return scores if self.alive.all() else np.where(self.alive, scores, -np.inf)

    def top_k(self, scores: np.ndarray, rounds: Optional[Rounds] = None) -> np.ndarray:
        return super().top_k(self.living(scores), rounds)

    def stay(self) -> None:
        """Keep the K heads that are chosen now."""
        if self._several:
            self._aim(self.config.num_of_heads)
        super().harden()

    def harden(self) -> None:
        self.stay()
        self._over = True

    # -- what a host asks --------------------------------------------------------------------------------------------

    @property
    def choosing(self) -> bool:
        return self.final is None and self.step < self._timetable()[self._place(self.step)].full

    def at_target(self) -> bool:
        if self.final is not None or self.count_schedule is None and not self._several:
            return super().at_target()
        # What was not settled yet has not begun.
        return self._table is not None and super().at_target() and self.fallen(self.step + 1)

    def metrics(self) -> dict[str, float]:
        self._timetable()  # hosts ask before the first update, so that what cannot be is refused there
        return super().metrics()

    def reset_optimizer(self) -> None:
        super().reset_optimizer()
        self.step, self._stage, self._table = 0, 0, None
        self.alive[:] = True

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, np.ndarray]:
        # It may have been given in fractions: a resumed run keeps the updates that it was started with.
        if self._several:
            told = [value for stage in self._table or () for value in astuple(stage)]
            stages = np.array([self._stage, self.step, *told], dtype=float)
            return {**super().state_dict(), "stages": stages, "alive": self.alive.astype(np.float64)}
        if self.count_schedule is None:
            return super().state_dict()
        stage = self._table[0] if self._table else None
        ends = (-1, -1) if stage is None else (stage.falls, stage.full)
        return {**super().state_dict(), "fall": np.array([*ends, self.step], dtype=float)}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        if self._several != ("stages" in state):
            raise HeadPruningError(
                "The checkpoint was trained "
                + ("without --save-at" if self._several else "with --save-at, and this run has none")
                + "; resume with the options that the run was started with."
            )
        if self._several:
            settled = "final" in state and state["final"].size > 0
            self._load_stages([int(value) for value in state["stages"]], state["alive"] > 0.5, settled)
        elif self.count_schedule is not None:
            begin, end, self.step = (int(value) for value in state["fall"])
            size, keep = self.unit_map.num_heads, self.config.num_of_heads
            self._table = [Stage(size, keep, 0, begin, end)] if begin >= 0 else None
        super().load_state_dict(state)

    def _load_stages(self, values: list[int], alive: np.ndarray, settled: bool) -> None:
        (place, step, *numbers), size = values, len(fields(Stage))
        stages = (
            [Stage(*numbers[i : i + size]) for i in range(0, len(numbers), size)] if len(numbers) % size == 0 else []
        )
        counts = [stage.count for stage in stages]
        if alive.size != self.alive.size or (numbers and counts != self.counts):
            raise HeadPruningError(
                f"The checkpoint goes through {', '.join(map(str, counts)) or 'no'} heads of {alive.size}, this run "
                f"through {', '.join(map(str, self.counts))} of {self.alive.size}; resume with the options that the "
                "run was started with."
            )
        self._stage, self.step, self._table = place, step, stages or None
        self.alive = alive
        self._aim(self.counts[-1 if settled else min(place, len(self.counts) - 1)])
