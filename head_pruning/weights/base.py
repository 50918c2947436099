"""What the weight pruners share: targets, masks and when they are drawn, policies, evaluation, state."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from dataclasses import dataclass, field, replace
from typing import Any, Iterator, Mapping, Optional, Sequence

import numpy as np
import torch

from ..compact.shapes import FLAG, STEP, Either, Number, Rest, Whole
from ..errors import HeadPruningError
from ..pruner import Pruner, SessionView
from ..schedules import count_of
from .engine.drawing import LateNumbers, draw_masks
from .engine.no_grad import no_grad
from .engine.portions import Portion, each
from .engine.selection import Selection
from .engine.shards import local
from .engine.storage import Storage
from .engine.targets import find_targets, name_pattern, numbered, shortened

logger = logging.getLogger(__name__)

# A density above the target by more than this is not the rounding of small tensors.
_UNEVEN = 0.05


class WeightPruner(Pruner):
    """A method with one mask per pruned tensor.

    Masks act on the parameters themselves, in place, after the optimizer's step. All ranks of a data-parallel run
    see the same reduced gradients and so draw the same masks; nothing is exchanged. Where the host shards the
    parameters (FSDP2) each rank scores its rows, and what is counted to find a threshold is summed over the ranks.
    Where the host keeps float32 master copies, ``session.master_of`` leads from a parameter to its copy: scores are
    taken and masks are applied there, and the masks on the parameter too.

    A method implements :meth:`plan`, :meth:`density_at`, :meth:`due`, :meth:`scores` and, if it keeps averages,
    :attr:`kinds` and :meth:`track`.
    """

    kind = "weights"
    #: Whether parameters without a gradient cannot be scored.
    needs_gradient = False
    #: Whether parameters that are not trained are masked, too.
    masks_frozen = False
    #: Whether scores may be negative.
    signed = False
    #: Whether the k-th smallest score itself is pruned (k zeros) or only what lies below it (k - 1 zeros).
    inclusive = False
    #: Whether pruned weights are trained with the gradients that they would have if they were not pruned.
    straight_through = False
    #: Whether projections outside of the unit map's sites, such as poolers and heads of tasks, may be masked, too.
    masks_everywhere = False
    #: Names of the float32 states with one value per weight.
    kinds: tuple[str, ...] = ()
    #: One of them that is above 0: its signs can hold the mask.
    carrier: Optional[str] = None
    default_selection, default_policy = "global", "revive"
    #: The number of the first update: the published script counts from 1.
    first_step = 1
    state_shapes = {
        "progress": (STEP, Number(-1, 1), FLAG, FLAG, FLAG, FLAG),
        "active": [FLAG],
        "numbers": Either((), (Number(-math.inf, math.inf), Whole())),
        "heads": (Whole(), Rest(FLAG)),
    }

    @property
    def needs_unit_map(self) -> bool:  # type: ignore[override]
        """Whether nothing else tells the parameters to prune."""
        return not self.config.weights_include

    # -- for methods -------------------------------------------------------------------------------------------------

    def plan(self) -> None:
        """Settle the schedule, once the length of training is known."""

    def density_at(self, t: int) -> float:
        """The remaining ratio that update ``t`` aims at."""
        raise NotImplementedError

    def count_removed(self, density: float, number: int) -> int:
        """How many of ``number`` weights, blocks or neighbours a mask of this density removes."""
        return count_of(1.0 - density, number)

    def density_of(self, name: str, density: float) -> float:
        """The remaining ratio of one tensor where that of all of them is ``density``."""
        return density

    @property
    def masks_biases(self) -> bool:
        """Whether biases of the chosen modules are pruned, too."""
        return getattr(self.config, "prune_biases", False) and not self.selection.structured

    @property
    def drops_gradients(self) -> bool:
        """Whether gradients of pruned weights go as they come: then they do not count where the host clips."""
        return self.policy == "retained" and not self.kinds and not self.straight_through

    @property
    def why_more(self) -> str:
        """Why more weights may stay than should, and what to do."""
        return "too many scores are equal"

    def due(self, t: int) -> bool:
        """Whether update ``t`` ends with a mask."""
        raise NotImplementedError

    def final_at(self, t: int) -> bool:
        """Whether the masks of update ``t`` have the final density."""
        raise NotImplementedError

    def final_density(self) -> float:
        """The remaining ratio of the outcome."""
        raise NotImplementedError

    def track(self, t: int, portion: Portion, gradients: list[torch.Tensor]) -> None:
        """Update the states of a portion from its weights after, and its gradients of, update ``t``."""

    def scores_moved(self, t: int) -> bool:
        """Whether update ``t`` changes scores."""
        return True

    def scores(self, portion: Portion) -> list[torch.Tensor]:
        """float32 scores of the portion's weights, in temporaries of the portion."""
        raise NotImplementedError

    def masked_scores(self, portion: Portion) -> list[torch.Tensor]:
        """:meth:`scores`; those of weights that must stay pruned are minus infinity, those of weights of heads that
        are gone plus infinity.
        """
        scores = self.scores(portion)
        for score, may in zip(scores, self.floor(portion) if self.nested else ()):
            score.masked_fill_(~may, -math.inf)
        portion.fill_gone(scores, math.inf)
        return scores

    @property
    def nested(self) -> bool:
        """Whether some weights must not be kept by the next mask."""
        return self.has_mask and (self.policy == "nested" or self._hardening) or self.storage.fixes_zeros

    def floor(self, portion: Portion) -> list[torch.Tensor]:
        """Where :attr:`nested` holds: ``bool``, which weights the next mask may keep."""
        if self.has_mask and (self.policy == "nested" or self._hardening):
            return self.storage.masks.keep(portion)  # no mask keeps what was zero from the start
        return portion.state["fixed"]

    # -- life cycle --------------------------------------------------------------------------------------------------

    def check_options(self) -> None:
        super().check_options()
        options = self.config
        name_pattern(options.weights_include, "--weights-include")
        name_pattern(options.weights_exclude, "--weights-exclude")
        self.selection = Selection.parse(getattr(options, "weight_selection", None) or self.default_selection)
        self.policy = getattr(options, "mask_policy", None) or self.default_policy
        if self.policy not in POLICIES:
            raise HeadPruningError(f"--mask-policy is {self.policy!r}; choose one of {', '.join(POLICIES)}.")
        if getattr(options, "block_pooling", "avg") not in ("avg", "max"):
            raise HeadPruningError(f"--block-pooling is {options.block_pooling!r}; choose avg or max.")

    def summary(self) -> str:
        return f"{sum(self.sizes.values())} weights; {super().summary()}"

    def options(self) -> dict[str, Any]:
        options = super().options()
        drawn = {"weight_selection": str(self.selection), "mask_policy": self.policy}
        return {**options, **{name: value for name, value in drawn.items() if name in options}}

    def attach(self, session: SessionView) -> None:
        super().attach(session)
        options = self.config
        self.found = find_targets(
            session.model,
            session.unit_map,
            include=options.weights_include,
            exclude=options.weights_exclude,
            biases=self.masks_biases,
            frozen=self.masks_frozen,
            everywhere=self.masks_everywhere,
        )
        self.targets = self.found.chosen
        if self.selection.structured:
            for target in self.targets:
                self.selection.check(target)
        if self.found.overlooked:
            logger.warning(
                "%d matrices in the layers of the model are not pruned: %s; --weights-include names others",
                len(self.found.overlooked),
                numbered(self.found.overlooked),
            )
        self._refuse_shared_targets(session.pruners)
        self.storage = Storage(
            self.targets,
            kinds=self.kinds,
            carrier=None if self.policy == "nested" else self.carrier,  # a nested mask outlives the averages' change
            retained=self.policy == "retained",
            whole=self.selection.scope != "global",
            sampled=self.selection.scope == "global" and self.policy != "nested",
            fixes_zeros=getattr(options, "start_from_zeros", False),
        )
        self.storage.active = [] if self.needs_gradient else list(self.targets)
        self.sizes = self.storage.sizes
        self.t = self.first_step - 1
        self.has_mask = self.locked = self.clean = False
        self.current = False  # whether the mask is that of the present scores
        self.selected = math.nan  # the density it was drawn for
        self._planned = self._told = self._ready = self._hardening = self._followed = False
        self._heads: Optional[np.ndarray] = None  # those that stay, as far as the storage knows
        self._drawn_for: Optional[np.ndarray] = None  # those that stayed when the mask was drawn
        self._left = 0  # how many weights counted then
        self._kept: Optional[torch.Tensor] = None  # and how many of them stayed, where it was drawn in this process
        self._gradients: list[torch.Tensor] = []  # of the update, before those of pruned weights were zeroed
        self._numbers: Optional[LateNumbers] = None
        self._hooks: list[Any] = []
        self._watch_gradients()
        self._check_shards()

    def _watch_gradients(self) -> None:
        for target in self.targets if self.drops_gradients else ():
            if not target.parameter.requires_grad:
                continue
            if self.storage.ranks.several:  # no gradient of a shard passes through autograd
                shard = functools.partial(self._drop_shard, target.name)
                self._hooks.append(target.parameter.register_post_accumulate_grad_hook(shard))
            else:
                whole = functools.partial(self._drop_gradient, target.name)
                self._hooks.append(target.parameter.register_hook(whole))

    @no_grad
    def follow(self) -> None:
        now = dict(self.session.model.named_parameters())
        there = set(map(id, now.values()))
        moved = [target.name for target in self.targets if id(target.parameter) not in there]
        if not moved:
            return
        lost = [name for name in moved if name not in now]
        if lost:
            raise HeadPruningError(f"{lost[0]} is no more in the model; wrap the model before it is pruned.")
        self.targets = [replace(each, parameter=now.get(each.name, each.parameter)) for each in self.targets]
        self.storage.follow(self.targets)
        self._check_shards()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._watch_gradients()

    def _look_anew(self) -> None:
        """:meth:`follow`, unasked: a state loaded with ``assign=True`` puts other parameters in place."""
        if not self.storage.ranks.several:  # these put whole ones in place for a while, and are told of by the host
            self.follow()

    def _check_shards(self) -> None:
        """Raise HeadPruningError where weights of several ranks would have to be looked at together."""
        if not self.storage.ranks.several or not self.selection.structured:
            return
        inputs = [target.layout[1] for target in self.targets if target.layout is not None]
        if self.selection.scope == "block" or 0 in inputs:
            raise HeadPruningError(
                f"--weight-selection {self.selection} looks at weights of several ranks together, where the model is "
                "sharded by its rows; choose global, tensor or N:M of matrices whose inputs are their columns, or "
                "train by plain data parallelism (DDP)."
            )

    def _drop_shard(self, name: str, parameter: torch.Tensor) -> None:
        """:meth:`_drop_gradient` of this rank's rows, once they have their gradient."""
        if parameter.grad is not None:
            gradient = local(parameter.grad)
            kept = self._drop_gradient(name, gradient)
            if kept is not None:
                gradient.copy_(kept)

    def _drop_gradient(self, name: str, gradient: torch.Tensor) -> Optional[torch.Tensor]:
        """A parameter's gradient without that of its pruned weights; None where nothing is pruned yet."""
        keep = self.storage.state.get("mask", {}).get(name) if self.has_mask else None
        # A mask loaded before the model moved follows it only when the update ends.
        return None if keep is None else torch.where(keep.to(gradient.device), gradient, 0.0)

    def _refuse_shared_targets(self, pruners: Sequence[Pruner]) -> None:
        mine = {target.name for target in self.targets}
        for other in pruners[: pruners.index(self)]:
            if isinstance(other, WeightPruner) and (other.name == self.name or mine & {t.name for t in other.targets}):
                raise HeadPruningError(
                    f"The pruners {other.name} and {self.name} cannot prune weights in one session: they are of one "
                    "name or share weights; give them different methods and different --weights-include."
                )

    def detach(self) -> None:
        super().detach()
        for hook in self._hooks:
            hook.remove()
        self.targets, self._hooks, self._numbers = [], [], None
        self.storage.release()

    def _plan_once(self) -> None:
        if not self._planned:
            self._look_anew()  # what it plans may hang on the weights
            self.plan()
            self._planned = True

    def before_update(self, step: int) -> None:
        if not self._followed:
            self._look_anew()
            self._followed = True
        self._plan_once()
        if self.storage.fixes_zeros:
            self.storage.find_zeros(self.session.master_of)

    @no_grad
    def skip_update(self, step: int) -> None:
        """Retained policy: mask what :meth:`before_step` brought back."""
        if self._ready and self.policy == "retained" and self.has_mask and not self.locked:
            self._apply()
        self._ready, self._gradients = False, []

    @no_grad
    def before_step(self, step: int) -> None:
        """Retained policy: the optimizer steps the retained weights, with gradients of those that stay only (of all,
        where they go straight through).

        Averages see all gradients (those of movement are the straight-through ones of Sanh et al. 2020, section 3): a
        pruned weight's score goes on moving, so that the weight can come back.
        """
        self._ready = True
        if self.policy != "retained" or not self.has_mask or self.locked:
            return
        self._lay_out()
        self.storage.restore_originals()
        self._gradients = [gradient.clone() for gradient in self.storage.gradients()] if self.kinds else []
        if not self.straight_through and len(self._hooks) < len(self.targets):
            self.storage.mask_gradients()

    @no_grad
    def after_step(self, step: int, lr_factor: float) -> None:
        """Read the gradients of the update (they must still be there), track, and mask if it is time."""
        self._plan_once()
        self.t = t = step + self.first_step
        if self.locked:
            self._lay_out()
            self._apply()
            return
        if self.policy == "retained" and self.has_mask and not self._ready:
            raise HeadPruningError(
                "The retained mask policy needs session.before_step() just before the optimizer's step; call it."
            )
        self._ready = False
        if self.needs_gradient:
            self._activate()
        self._lay_out()
        if self.scores_moved(t):
            self.current = False
        due, density = self.due(t), self.density_at(t)
        select = due and not (self.current and self.selected == density and self._same_heads())
        masks = (due or self.policy != "revive") and (select or self.has_mask)
        if self.kinds:
            gradients, self._gradients = self._gradients or self.storage.gradients(), []

            def work(portion: Portion) -> None:
                self.track(t, portion, portion.cut(gradients))
                if masks and not select:  # while the portion is in the cache
                    self.storage.apply(portion, keep_originals=self._retains)

            each(self.storage.portions, work)
        if select:
            self._select(density)
        if masks and (select or not self.kinds):
            self._apply()
        elif not masks and self.storage.fixes_zeros:
            self.storage.zero_fixed()
        self.clean = masks

    @no_grad
    def harden(self) -> None:
        """Mask the model at the final density, for good: from now on every optimizer step is masked again.

        What belongs to heads that are gone is pruned too; the density is that of the rest.
        """
        self._look_anew()
        self._plan_once()
        if not self.storage.active:
            raise HeadPruningError("No weight has ever had a gradient, so none can be pruned; train the model first.")
        self._lay_out()
        self._learn_heads()
        if not self.locked:
            if not self.at_target():
                if self.policy == "retained" and self.has_mask:
                    self.storage.restore_originals()
                # Training is over: what is zero now would be no use to keep.
                self._hardening = self.clean and self.policy == "revive"
                self._select(self.final_density())
                self._hardening = False
            self.storage.remove_gone()
            self._apply()
            self.clean = self.locked = True
            self._warn_of_more()
        elif self.storage.gone:
            self.storage.remove_gone()
            self._apply()

    def _warn_of_more(self) -> None:
        """Tell of a mask that keeps more weights than it should."""
        kept, total, wanted = int(self.storage.count_kept()), self.storage.left, self.final_density()
        if kept > (wanted + _UNEVEN) * total:
            reason = self.why_more
            logger.warning("%d of %d weights stay where %.4g of them should: %s", kept, total, wanted, reason)

    def at_target(self) -> bool:
        if self.locked:
            return True
        if not self.has_mask:
            return False
        self._plan_once()  # which a session that was just loaded has not done
        return self.final_at(self.t) and self.selected == self.final_density() and self._same_heads()

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the model is masked with the last mask drawn; afterwards it is bit for bit as before."""
        if not self.has_mask or self.clean:
            yield
            return
        with torch.no_grad():
            self._lay_out()
            touched = self.storage.touched()
            kept = [tensor.clone() for tensor in touched]
            self._apply()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_([tensor.detach() for tensor in touched], kept)

    evaluating = applied

    def metrics(self) -> dict[str, float]:
        """``prune_target``: remaining ratio aimed at; ``weights_kept``: the mask's; ``mask_threshold``.

        Where heads are gone, the first two are of what is left, and ``weights_kept_of_all`` is of all weights. All but
        the first are of the last mask whose numbers have arrived from the device.
        """
        self._plan_once()
        numbers = {"prune_target": self.final_density() if self.locked else self.density_at(self.t)}
        if self._numbers is not None:
            threshold, kept = self._numbers.read()
            numbers["weights_kept"] = kept / max(1, self._left or self.storage.number)
            if self._drawn_for is not None:
                numbers["weights_kept_of_all"] = kept / max(1, self.storage.number)
            if math.isfinite(threshold):
                numbers["mask_threshold"] = threshold
        return numbers

    @no_grad
    def weight_masks(self) -> dict[str, torch.Tensor]:
        """Parameter name to ``bool`` mask (true: stays) on the CPU; empty before the first mask.

        What belongs to heads that are gone does not stay, although it is not zeroed before the outcome is fixed.
        """
        if not self.has_mask:
            return {}
        self._lay_out()
        self._learn_heads()
        return self.storage.kept()

    def left_dense(self) -> dict[str, int]:
        """Names and sizes of the matrices that are not pruned, also for want of a gradient; without embeddings."""
        live = {target.name for target in self.storage.active} if self.has_mask else self.sizes.keys()
        return {**self.found.left, **{n: size for n, size in self.sizes.items() if n not in live}}

    def masked_parameters(self) -> frozenset[str]:
        return frozenset(target.name for target in self.targets)

    # -- the work ----------------------------------------------------------------------------------------------------

    @no_grad
    def mask_now(self, density: float) -> None:
        """Draw a mask of the present scores, outside of the schedule."""
        self._lay_out()
        self._select(density)
        self._apply()
        self.clean = True

    def _activate(self) -> None:
        """Take in the parameters that have a gradient for the first time."""
        storage = self.storage
        if len(storage.active) == len(self.targets):
            return
        names = {target.name for target in storage.active}
        master = self.session.master_of or (lambda parameter: parameter)
        live = [
            target for target in self.targets
            if target.name in names or target.parameter.grad is not None or master(target.parameter).grad is not None
        ]  # fmt: skip
        if not live:
            raise HeadPruningError(
                "No pruned parameter has a gradient in session.after_step(); call it before zero_grad(), and check "
                "that the chosen weights take part in the loss."
            )
        storage.active = live

    def _lay_out(self) -> None:
        self.storage.lay_out(self.session.master_of)

    @property
    def _retains(self) -> bool:
        return self.policy == "retained" and not self.locked

    def _apply(self) -> None:
        self.storage.apply_all(keep_originals=self._retains)

    def _learn_heads(self) -> None:
        """Have the storage know which weights belong to heads that would be gone if training ended now."""
        mask = self.session.head_mask()
        if mask is not None and not (self._heads is not None and np.array_equal(self._heads, mask.keep)):
            self._heads = mask.keep.copy()
            self.storage.set_gone(self.session.weights_without(mask))

    def _same_heads(self) -> bool:
        """Whether the heads are those that the mask was drawn for."""
        mask = self.session.head_mask()
        return mask is None or (self._drawn_for is not None and np.array_equal(self._drawn_for, mask.keep))

    def _select(self, density: float) -> None:
        self._tell_inactive()
        self._learn_heads()
        self._drawn_for, self._left = self._heads, self.storage.left
        kept, threshold = draw_masks(self, density)
        self.has_mask, self.current, self.selected = True, True, density
        if self._numbers is None or self._numbers.device != kept.device:
            self._numbers = LateNumbers(kept.device)
        self._numbers.write(threshold, kept)
        self._kept = kept

    def threshold(self, name: str, score: torch.Tensor, k: int) -> torch.Tensor:
        """The threshold of one tensor, its ``k``-th smallest score; minus infinity prunes nothing, at k = 0."""
        if k == 0:
            return torch.full((), -math.inf, device=score.device)
        return self.storage.kth_smallest(score, k)

    def _tell_inactive(self) -> None:
        if self._told or len(self.storage.active) == len(self.targets):
            return
        self._told = True
        names = {target.name for target in self.storage.active}
        silent = [target.name for target in self.targets if target.name not in names]
        logger.warning("%d parameters never had a gradient and are not pruned: %s", len(silent), shortened(silent))

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, np.ndarray]:
        flags = (self.has_mask, self.locked, self.clean, self.current)
        numbers = [] if self._numbers is None else [x if math.isfinite(x) else 0.0 for x in self._numbers.read()]
        selected = -1.0 if math.isnan(self.selected) else self.selected
        return {
            "progress": np.array([float(self.t), selected, *map(float, flags)]),
            "active": self.storage.active_flags(),
            "numbers": np.array(numbers),
            **({} if self._drawn_for is None else {"heads": np.array([self._left, *self._drawn_for], dtype=float)}),
        }

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self.storage.load_active_flags(state["active"])
        t, selected, *flags = state["progress"].tolist()
        self.t, self.selected = int(t), math.nan if selected < 0 else selected
        self.has_mask, self.locked, self.clean, self.current = (bool(flag) for flag in flags)
        self._planned = False
        if "heads" in state:
            left, *keep = state["heads"].tolist()
            self._left, self._drawn_for = int(left), np.array(keep, dtype=bool)
        if state["numbers"].size:
            self._numbers = LateNumbers(torch.device("cpu"), tuple(state["numbers"].tolist()))

    def tensor_names(self) -> list[str]:
        return self.storage.tensor_names()

    @no_grad
    def tensor_state(self) -> dict[str, torch.Tensor]:
        """Averages as they are (not copies), masks packed to one bit per weight, by ``kind.parameter``."""
        return self.storage.tensor_state()

    @no_grad
    def load_tensor_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore :meth:`tensor_state`. Raises HeadPruningError when it is of other tensors."""
        self.storage.load_tensor_state(state)


POLICIES = ("revive", "nested", "retained")


@dataclass
class TargetConfig:
    """Options of every weight pruner: which tensors it prunes."""

    weights_include: Optional[str] = field(
        default=None,
        metadata={
            "help": "regular expression of the parameters to prune; default: the projections of all attention and "
            "feed-forward blocks"
        },
    )
    weights_exclude: Optional[str] = field(
        default=None, metadata={"help": "regular expression of parameters to leave dense"}
    )


@dataclass
class WeightConfig(TargetConfig):
    """Options of every weight pruner that can prune biases too."""

    prune_biases: bool = field(
        default=True, metadata={"help": "prune the biases of the chosen modules too, as the published code does"}
    )


@dataclass
class SelectionConfig(WeightConfig):
    """Options of every weight pruner that draws masks."""

    weight_selection: Optional[str] = field(
        default=None,
        metadata={
            "help": "global (one threshold), tensor (one per tensor), N:M such as 2:4 (N of M neighbours stay), or "
            "ROWSxCOLUMNS such as 4x4 (whole blocks); default: the method's own"
        },
    )
    start_from_zeros: bool = field(
        default=False,
        metadata={
            "help": "keep the zeros that a pruned model has at the first update, and prune it further: they stay zero "
            "under every mask and between masks, and count as pruned"
        },
    )
    block_pooling: str = field(
        default="avg", metadata={"help": "score of a block of weights: avg or max of its weights' scores"}
    )


@dataclass
class MaskConfig(SelectionConfig):
    """Options of every weight pruner that draws masks again and again."""

    mask_policy: Optional[str] = field(
        default=None,
        metadata={
            "help": "revive (pruned weights are trained on between two masks), nested (a pruned weight never comes "
            "back) or retained (pruned weights keep their last value aside and may come back with it, while their "
            "scores go on); default: the method's own"
        },
    )
