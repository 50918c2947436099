"""Pruning each tensor by magnitude: what a target is of, and one mask for good (one shot)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Mapping, Optional

import numpy as np
import torch

from ..compact.shapes import FLAG
from ..errors import HeadPruningError
from ..options import TARGET_SPARSITY, require
from ..pruner import SessionView
from ..registry import register_pruner
from ..schedules import count_of
from .base import SelectionConfig
from .engine.allocation import STRATEGIES, erdos_renyi, mapped, parse_map
from .engine.no_grad import no_grad
from .magnitude import MagnitudeScores

# A mask that lags no further than this share of the weights behind its target has reached it.
_LAG = 0.01


@dataclass
class TensorSparsityConfig(SelectionConfig):
    """Options of every method that removes the smallest weights of each tensor."""

    target_sparsity: Optional[float] = field(default=None, metadata=TARGET_SPARSITY)
    threshold_decay: float = field(
        default=0.0, metadata={"help": "weight of the previous threshold of a tensor in its next, 0 to below 1"}
    )
    init_strategy: str = field(
        default="uniform",
        metadata={
            "help": "uniform (the target is that of each tensor), er or erk (Erdos-Renyi allocation: of all together, "
            "small tensors stay denser; erk counts the kernels of convolutions too); the last two leave biases dense"
        },
    )
    weight_sparsity_map: Optional[str] = field(
        default=None,
        metadata={
            "help": "JSON of regular expressions of parameters and the ratio removed of these where it is not the "
            'target (or what N:M removes), such as {"layer.0": 0.5}'
        },
    )


class TensorMagnitudePruner(MagnitudeScores):
    """Removes a ratio of each tensor, the same of all or not, by magnitude."""

    inclusive = True
    default_selection = "tensor"
    first_step = 0
    state_shapes = {**MagnitudeScores.state_shapes, "lags": (FLAG,)}

    def check_options(self) -> None:
        super().check_options()
        given = self.config.target_sparsity
        if given is not None:
            require(self.config, "target_sparsity", lambda value: 0 <= value <= 1, "a removed ratio from 0 to 1")
        require(self.config, "threshold_decay", lambda value: 0 <= value < 1, "at least 0 and below 1")
        #: The removed ratio of the outcome, and the one that it rises to on the way there.
        self._asked = self._target = self._ramp = given or 0.0
        self._map = parse_map(self.config.weight_sparsity_map)
        self._check_allocation()
        if self.selection.density is not None:
            fixed = 1.0 - self.selection.density  # up to float error: 7:10 removes 0.3
            size = self.selection.size[0]
            # As in the published code, 0.85 of each 8 are 6: the ratio rises to 0.85, the number to 6.
            if self._target and count_of(self._target, size) != size - self.selection.keep:
                raise HeadPruningError(
                    f"--weight-selection {self.config.weight_selection} removes {fixed:g} of the weights, which "
                    f"contradicts --target-sparsity {self._target}; leave one of them out."
                )
            self._asked = self._ramp = self._target or fixed
            self._target = fixed
        if self._target <= 0 and not self._map:
            raise HeadPruningError("--target-sparsity is 0, so nothing would be pruned; give a ratio such as 0.9.")

    def _check_allocation(self) -> None:
        strategy, uneven = self.config.init_strategy, []
        if strategy not in STRATEGIES:
            raise HeadPruningError(f"--init-strategy is {strategy!r}; choose one of {', '.join(STRATEGIES)}.")
        uneven += [f"--init-strategy {strategy}"] if strategy != "uniform" else []
        uneven += ["--weight-sparsity-map"] if self._map else []
        if len(uneven) > 1:
            raise HeadPruningError(f"{' and '.join(uneven)} both say what each tensor loses; drop one of them.")
        if uneven and self.selection.scope == "global":
            raise HeadPruningError(
                f"{uneven[0]} gives each tensor a ratio of its own, which --weight-selection global does not; drop "
                "one of them, or choose tensor, N:M or blocks."
            )
        if self.config.threshold_decay and self.selection.scope in ("global", "pattern"):
            raise HeadPruningError(
                "--threshold-decay is about the threshold of each tensor, of which --weight-selection "
                f"{self.selection} has none; drop one of them."
            )

    @property
    def masks_biases(self) -> bool:
        return super().masks_biases and self.config.init_strategy == "uniform"

    @property
    def fresh(self) -> bool:
        """Whether no update has ended and no mask was drawn."""
        return not self.has_mask and self.t == self.first_step - 1

    def options(self) -> dict[str, Any]:
        return {**super().options(), "target_sparsity": self._target}

    def attach(self, session: SessionView) -> None:
        super().attach(session)
        self._lags = False
        self._decay = self.config.threshold_decay
        #: The removed ratio of each tensor in the end, and the one that it rises to on the way there, as above.
        self._ramps = self._allot()
        self._each = self._counted(self._ramps)
        if self._each:
            self._target, self._ramp = self._together(self._each), self._together(self._ramps)

    def _counted(self, ratios: Mapping[str, float]) -> dict[str, float]:
        """What masks make of the tensors' ratios: with N:M whole numbers of M neighbours, rounded down."""
        size = self.selection.size[0] if self.selection.scope == "pattern" else 0
        return {name: count_of(ratio, size) / size if size else ratio for name, ratio in ratios.items()}

    def _together(self, ratios: Mapping[str, float]) -> float:
        """The removed ratio of all tensors."""
        sizes = self.storage.sizes
        return sum(ratios[name] * size for name, size in sizes.items()) / sum(sizes.values())

    def _allot(self) -> dict[str, float]:
        """The removed ratio of each tensor in the end; empty where it is the same."""
        if self._map:
            return mapped(list(self.storage.sizes), self._map, self._asked)
        if self.config.init_strategy == "uniform":
            return {}
        shapes = {target.name: target.parameter.shape for target in self.targets}
        return erdos_renyi(shapes, self._asked, kernels=self.config.init_strategy == "erk")

    def density_of(self, name: str, density: float) -> float:
        return 1.0 - self._each[name] if self._each else density

    def final_density(self) -> float:
        return 1.0 - self._target

    @property
    def why_more(self) -> str:
        if self._decay:
            return "--threshold-decay holds the thresholds back; lower it"
        return super().why_more

    def at_target(self) -> bool:
        return super().at_target() and (self.locked or not self._decay or self._reached())

    def _reached(self) -> bool:
        """Whether the mask keeps no more than it should: thresholds that lag prune less. Waits once for each mask."""
        if self._kept is not None:
            self._lags = float(self._kept) > (self._density_drawn() + _LAG) * (self._left or self.storage.number)
            self._kept = None
        return not self._lags

    def _density_drawn(self) -> float:
        """The remaining ratio of all weights where each tensor loses a whole number of weights or blocks."""
        storage, size, density = self.storage, self.selection.size, self.final_density()
        left = kept = 0.0
        for target in storage.active:
            number, weights = storage.left_of(target, size), storage.left_of(target)
            left += weights
            if number:
                kept += weights * (1.0 - self.count_removed(self.density_of(target.name, density), number) / number)
        return kept / max(1.0, left)

    @no_grad
    def harden(self) -> None:
        decay = self._decay
        if decay and not self.locked:  # the last mask is drawn by the target's own thresholds
            self._decay, self.selected = 0.0, math.nan
        try:
            super().harden()
        finally:
            self._decay = decay

    def threshold(self, name: str, score: torch.Tensor, k: int) -> torch.Tensor:
        decay = self._decay
        if not decay:
            return super().threshold(name, score, k)
        # As in the published code: it starts from 0, and from the smallest score less 1 where nothing is pruned.
        new = self.storage.kth_smallest(score, 1) - 1.0 if k == 0 else super().threshold(name, score, k)
        past = self.storage.thresholds
        past[name] = decay * past.get(name, torch.zeros_like(new)) + (1.0 - decay) * new
        return past[name]

    def state_dict(self) -> dict[str, np.ndarray]:
        lags = {"lags": np.array([float(not self._reached())])} if self._decay and self.has_mask else {}
        return {**super().state_dict(), **lags}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        super().load_state_dict(state)
        self._lags, self._kept = "lags" in state and bool(state["lags"][0]), None  # earlier versions told nothing


class OneShotMagnitudePruner(TensorMagnitudePruner):
    """Removes the smallest weights of each tensor before the first update, for good."""

    name = "one_shot_magnitude"

    @property
    def drops_gradients(self) -> bool:
        return True

    def before_update(self, step: int) -> None:
        super().before_update(step)
        if self.fresh:
            self.mask_now(self.final_density())
            self.locked = True
            self._warn_of_more()

    def _learn_heads(self) -> None:
        # The one mask must do for whichever heads stay: those that are gone now may come back.
        if self.locked or all(pruner.heads_final for pruner in self.session.pruners):
            super()._learn_heads()

    @no_grad
    def harden(self) -> None:
        if self.locked and not self._same_heads():
            self._hardening = True  # what was pruned stays so; more goes where the heads that stay have too much left
            self.mask_now(self.final_density())
            self._hardening = False
        super().harden()

    def density_at(self, t: int) -> float:
        return self.final_density()


register_pruner(
    name="one_shot_magnitude",
    config=TensorSparsityConfig,
    pruner=OneShotMagnitudePruner,
    example={"target_sparsity": 0.8},
)
