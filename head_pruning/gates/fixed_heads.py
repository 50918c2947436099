"""Heads fixed from the start: K random ones, the baseline that any method must beat, or those of a file."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import numpy as np

from ..compact.shapes import FLAG
from ..errors import HeadPruningError
from ..masks import HeadMask, full_mask
from ..old_masks import read_old_mask
from ..options import dashed, require
from ..pruner import SessionView
from ..registry import register_pruner
from ..schedules import count_of
from .base import BudgetConfig, HeadPruner


@dataclass
class RandomConfig(BudgetConfig):
    """Options of the random baseline."""

    random_heads_seed: Optional[int] = field(
        default=None, metadata={"help": "seed of the draw of random heads; default: the seed of training"}
    )


class FixedPruner(HeadPruner):
    """Trains the model with one head mask from the first update on."""

    inherits = False
    starts_anywhere = True
    state_shapes = {"kept": [FLAG]}

    def chosen(self) -> np.ndarray:
        """``bool[N]``: the heads that stay."""
        raise NotImplementedError

    def attach(self, session: SessionView) -> None:
        super().attach(session)
        self.kept = self.chosen()
        self.harden()

    def keep(self) -> np.ndarray:
        return self.kept

    def before_update(self, step: int) -> None:
        self.session.gates.set_fixed(self.kept)

    def metrics(self) -> dict[str, float]:
        return {"heads_kept": float(self.kept.sum())}

    def state_dict(self) -> dict[str, np.ndarray]:
        return {"kept": self.kept.astype(float)}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        if state["kept"].size != self.kept.size:
            raise HeadPruningError(
                f"The checkpoint has {state['kept'].size} heads but the model has {self.kept.size}; "
                "resume with the model that the run was started with."
            )
        kept = state["kept"].astype(bool)
        if not self.goes_on(kept):
            raise HeadPruningError(
                f"The checkpoint was trained with {kept.sum()} heads, and this run's options give "
                f"{'others' if kept.sum() == self.kept.sum() else self.kept.sum()}; resume with the options that the "
                "run was started with, or start anew from its weights."
            )
        self.kept = kept
        self.harden()

    def goes_on(self, kept: np.ndarray) -> bool:
        """Whether a run that was started with the heads ``kept`` can be this one."""
        return np.array_equal(kept, self.kept)


class RankedPruner(FixedPruner):
    """Keeps the first of a ranking: so many heads and units, a share of each kind, or what a budget of MACs buys."""

    def check_options(self) -> None:
        budgets = ("num_of_heads", "keep_share", "keep_macs")
        given = [name for name in budgets if getattr(self.config, name) is not None]
        if len(given) > 1:
            flags = " and ".join(map(dashed, given))
            raise HeadPruningError(f"{flags} each say how much {self.name} keeps; give one of them.")
        if not given:
            raise HeadPruningError(
                f"{self.name} needs the number of heads to keep; add --num-of-heads K, or one of --keep-share and "
                "--keep-macs in its place."
            )
        least = self.config.min_heads_per_layer or self.config.min_heads_per_kind
        if given != ["num_of_heads"]:
            require(self.config, given[0], lambda value: 0 < value <= 1, "a share above 0, up to 1")
            if least:
                raise HeadPruningError(
                    "--min-heads-per-layer and --min-heads-per-kind are for a number of heads; give --num-of-heads."
                )
        require(self.config, "macs_length", lambda value: value >= 1, "a number of tokens, 1 or more")
        super().check_options()

    def first(self, scores: np.ndarray) -> np.ndarray:
        """``bool[N]``: those of the highest ``scores`` (``[N]``) that stay.

        Raises:
            HeadPruningError: the budget buys nothing, whatever the scores.
        """
        from ..surgery.per_unit import affordable, of_each_kind  # executes torch, which listing methods does not need

        config = self.config
        if config.keep_macs is not None:
            costs = self.macs()
            keep = affordable(scores, costs, config.keep_macs * costs.sum())
            if not keep.any():
                least = math.ceil(1e6 * costs.min() / costs.sum()) / 1e6
                raise HeadPruningError(
                    f"--keep-macs {config.keep_macs:g} is less than a unit costs, so nothing would stay; give "
                    f"{least:g} or more."
                )
            return keep
        if config.keep_share is not None:
            for kind, (_, total) in full_mask(self.unit_map).counts().items():
                if not count_of(config.keep_share, total):
                    raise HeadPruningError(
                        f"--keep-share {config.keep_share:g} keeps none of the {total} {kind}; give 1/{total} or more."
                    )
            return of_each_kind(self.unit_map, scores, config.keep_share)
        return self.top_k(scores)

    def macs(self) -> np.ndarray:
        """``float64[N]``: what each head or unit costs."""
        from ..surgery.per_unit import unit_macs

        return unit_macs(self.session.model, self.unit_map, self.config.macs_length)

    def summary(self) -> str:
        if self.config.keep_macs is None:
            return super().summary()
        costs = self.macs()
        share, length = costs[self.kept].sum() / costs.sum(), self.config.macs_length
        told = f"{self.head_mask().words} stay, with {share:.2%} of their MACs at {length} tokens"
        return f"{super().summary()}; {told}"


class RandomPruner(RankedPruner):
    """Draws K heads once and trains the model with only them."""

    name = "random"

    def check_options(self) -> None:
        if self.config.random_heads_seed is not None:
            require(self.config, "random_heads_seed", lambda value: value >= 0, "a whole number, 0 or more")
        super().check_options()

    def chosen(self) -> np.ndarray:
        seed = self.session.seed if self.config.random_heads_seed is None else self.config.random_heads_seed
        return self.first(np.random.default_rng([seed, 2]).random(self.unit_map.num_heads))

    def goes_on(self, kept: np.ndarray) -> bool:
        return kept.sum() == self.kept.sum()  # a draw is that of the run's start, whatever the seed now


@dataclass
class GivenConfig:
    """Options of given heads."""

    head_mask_file: Optional[str] = field(
        default=None,
        metadata={
            "help": "train, or decode a dense model (fairseq), with the heads of this mask: masks.safetensors of "
            "another run, or a mask of the published code (mask4.pt)",
            "by_content": True,
        },
    )


class GivenPruner(FixedPruner):
    """Trains the model with only the heads of a mask that was found before, by any method."""

    name = "given"
    takes_zeroed_heads = True
    needs_training = False

    @functools.cached_property
    def units(self) -> str:
        """What the mask tells of."""
        path = self.config.head_mask_file
        known = path is not None and Path(path).is_file() and Path(path).suffix != ".pt"
        return HeadMask.load(path).unit_map.units if known else "heads"

    def check_options(self) -> None:
        if self.config.head_mask_file is None:
            raise HeadPruningError("given needs the mask of the heads to keep; add --head-mask-file FILE.")
        path = self.config.head_mask_file
        if not Path(path).is_file():
            raise HeadPruningError(f"There is no file {path}; give the mask of another run as --head-mask-file.")
        super().check_options()

    def chosen(self) -> np.ndarray:
        path = self.config.head_mask_file
        old = Path(path).suffix == ".pt"
        mask = read_old_mask(path, self.unit_map) if old else HeadMask.load(path)
        return mask.fitted(self.unit_map, f"The head mask of {path}").keep


register_pruner(name="random", config=RandomConfig, pruner=RandomPruner, example={"num_of_heads": 4})
register_pruner(
    name="given",
    config=GivenConfig,
    pruner=GivenPruner,
    selected_by=lambda options: options.head_mask_file is not None,
    example={"head_mask_file": "masks.safetensors"},
)
