"""What the weight pruners share: targets, masks and when they are drawn, policies, evaluation, state."""

import contextlib
import logging
import math
from dataclasses import dataclass, field
from typing import Iterator, Optional, Sequence

import numpy as np
import torch

from ..errors import HeadPruningError
from ..pruner import Pruner
from .artifacts import pack_mask, unpack_mask
from .masks import TINY, BoolMasks, SignMasks
from .pieces import Portion, cut_into_portions, sample_portion
from .select import Selection, Threshold, bracketed, expand_blocks, kth_smallest, n_of_m, pool_blocks
from .targets import Target, name_pattern, require_whole, shortened, weight_targets
from .workers import each

logger = logging.getLogger(__name__)

POLICIES = ("revive", "nested", "retained")
# A density above the target by more than this is not the rounding of small tensors.
_UNEVEN = 0.05


@dataclass
class WeightConfig:
    """Options of every weight pruner."""

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
    prune_biases: bool = field(
        default=True, metadata={"help": "prune the biases of the chosen modules too, as the published code does"}
    )


@dataclass
class MaskConfig(WeightConfig):
    """Options of every weight pruner that draws masks."""

    weight_selection: Optional[str] = field(
        default=None,
        metadata={
            "help": "global (one threshold), tensor (one per tensor), N:M such as 2:4 (N of M neighbours stay), or "
            "ROWSxCOLUMNS such as 4x4 (whole blocks); default: the method's own"
        },
    )
    mask_policy: Optional[str] = field(
        default=None,
        metadata={
            "help": "revive (pruned weights are trained on between two masks), nested (a pruned weight never comes "
            "back) or retained (pruned weights keep their last value aside and come back with it); default: the "
            "method's own"
        },
    )
    block_pooling: str = field(
        default="avg", metadata={"help": "score of a block of weights: avg or max of its weights' scores"}
    )


class WeightPruner(Pruner):
    """A method with one mask per pruned tensor.

    Masks act on the parameters themselves, in place, after the optimizer's step. All ranks of a data-parallel run
    see the same reduced gradients and so draw the same masks; nothing is exchanged. Where the host keeps float32
    master copies, ``session.master_of`` leads from a parameter to its copy: scores are taken and masks are applied
    there, and the masks on the parameter too.

    A method implements :meth:`plan`, :meth:`density_at`, :meth:`due`, :meth:`scores` and, if it keeps averages,
    :attr:`kinds` and :meth:`track`.
    """

    needs_gates = False
    #: Whether parameters without a gradient cannot be scored.
    needs_gradient = False
    #: Whether scores may be negative.
    signed = False
    #: Whether the k-th smallest score itself is pruned (k zeros) or only what lies below it (k - 1 zeros).
    inclusive = False
    #: Names of the float32 states with one value per weight.
    kinds: tuple[str, ...] = ()
    #: One of them that is above 0: its signs can hold the mask.
    carrier: Optional[str] = None
    default_selection, default_policy = "global", "revive"
    #: The number of the first update: the published script counts from 1.
    first_step = 1

    # -- for methods -------------------------------------------------------------------------------------------------

    def plan(self) -> None:
        """Settle the schedule, once the length of training is known."""

    def density_at(self, t: int) -> float:
        """The remaining ratio that update ``t`` aims at."""
        raise NotImplementedError

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
        """:meth:`scores`; under the nested policy those of weights already pruned are minus infinity."""
        scores = self.scores(portion)
        if self.policy == "nested" and self.has_mask:
            for score, keep in zip(scores, self.masks.keep(portion)):
                score.masked_fill_(~keep, -math.inf)
        return scores

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

    def attach(self, session) -> None:
        super().attach(session)
        options = self.config
        self.targets = weight_targets(
            session.model,
            session.unit_map,
            include=options.weights_include,
            exclude=options.weights_exclude,
            biases=options.prune_biases and not self.selection.structured,
        )
        if self.selection.structured:
            for target in self.targets:
                self.selection.check(target.name, target.parameter)
        self._refuse_shared_targets(session.pruners)
        self.sizes = {target.name: target.parameter.numel() for target in self.targets}
        self.state: dict[str, dict[str, torch.Tensor]] = {}
        self.thresholds: dict[str, torch.Tensor] = {}
        self.active: list[Target] = [] if self.needs_gradient else list(self.targets)
        self.t = self.first_step - 1
        self.has_mask = self.locked = self.clean = False
        self.current = False  # whether the mask is that of the present scores
        self.selected = math.nan  # the density it was drawn for
        self._planned = self._told = self._ready = False
        self._layout: tuple = ()
        self._numbers: Optional[_Numbers] = None

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
        self.state, self.thresholds, self._layout, self._numbers = {}, {}, (), None
        self.targets, self.active = [], []

    def _plan_once(self) -> None:
        if not self._planned:
            self.plan()
            self._planned = True

    @torch.no_grad()
    def before_update(self, step: int) -> None:
        self._plan_once()
        if self._ready and self.policy == "retained" and self.has_mask and not self.locked:
            self._apply()  # the host skipped its step after before_step(), as loss scalers do
        self._ready = False

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Retained policy: the optimizer steps the retained weights, with gradients of those that stay only."""
        self._ready = True
        if self.policy != "retained" or not self.has_mask or self.locked:
            return
        self._lay_out()
        self._restore_originals()
        gradients = self._gradients()
        for portion in self.portions:
            self.masks.apply(portion, portion.cut(gradients))

    @torch.no_grad()
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
        select = due and not (self.current and self.selected == density)
        masks = (due or self.policy != "revive") and (select or self.has_mask)
        if self.kinds:
            gradients = self._gradients()

            def work(portion: Portion) -> None:
                self.track(t, portion, portion.cut(gradients))
                if masks and not select:
                    self._mask(portion)  # while the portion is in the cache

            each(self.portions, work)
        if select:
            self._select(density)
        if masks and (select or not self.kinds):
            self._apply()
        self.clean = masks

    @torch.no_grad()
    def harden(self) -> None:
        """Mask the model at the final density, for good: from now on every optimizer step is masked again."""
        if self.locked:
            return
        self._plan_once()
        if not self.active:
            raise HeadPruningError("No weight has ever had a gradient, so none can be pruned; train the model first.")
        self._lay_out()
        if not self.at_target():
            if self.policy == "retained" and self.has_mask:
                self._restore_originals()
            self._select(self.final_density())
        self._apply()
        self.clean = self.locked = True
        self._warn_of_ties()

    def _warn_of_ties(self) -> None:
        kept = sum(int(torch.count_nonzero(keep)) for portion in self.portions for keep in self.masks.keep(portion))
        total, wanted = sum(self.sizes[target.name] for target in self.active), self.final_density()
        if kept > (wanted + _UNEVEN) * total:
            logger.warning(
                "%d of %d weights stay where %.4g of them should: too many scores are equal, as averages are until "
                "deltaT updates have passed; train longer or lower --deltaT",
                kept,
                total,
                wanted,
            )

    def at_target(self) -> bool:
        return self.locked or (self.has_mask and self.final_at(self.t) and self.selected == self.final_density())

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the model is masked with the last mask drawn; afterwards it is bit for bit as before."""
        if not self.has_mask or self.clean:
            yield
            return
        with torch.no_grad():
            self._lay_out()
            touched = [*self._tensors, *(tensor for tensor in self._twins if tensor is not None)]
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

        The last two are of the last mask whose numbers have arrived from the device.
        """
        self._plan_once()
        numbers = {"prune_target": self.final_density() if self.locked else self.density_at(self.t)}
        if self._numbers is not None:
            threshold, kept = self._numbers.read()
            numbers["weights_kept"] = kept / max(1, sum(self.sizes[target.name] for target in self.active))
            if math.isfinite(threshold):
                numbers["mask_threshold"] = threshold
        return numbers

    @torch.no_grad()
    def weight_masks(self) -> dict[str, torch.Tensor]:
        """Parameter name to ``bool`` mask (true: stays) on the CPU; empty before the first mask."""
        if not self.has_mask:
            return {}
        self._lay_out()
        found = {t.name: torch.empty(t.parameter.shape, dtype=torch.bool) for t in self.active}
        for portion in self.portions:
            for (index, start, length), keep in zip(portion.slots, self.masks.keep(portion)):
                found[self.active[index].name][start : start + length] = keep.cpu()
        return found

    # -- the work ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def mask_now(self, density: float) -> None:
        """Draw a mask of the present scores, outside of the schedule."""
        self._lay_out()
        self._select(density)
        self._apply()
        self.clean = True

    def _restore_originals(self) -> None:
        for portion in self.portions:
            torch._foreach_copy_(portion.values, portion.state["original"])

    def _activate(self) -> None:
        """Take in the parameters that have a gradient for the first time."""
        if len(self.active) == len(self.targets):
            return
        names = {target.name for target in self.active}
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
        self.active = live

    def _lay_out(self) -> None:
        """Cut values, states and masks into portions; again only when the host replaced tensors."""
        master = self.session.master_of
        tensors = [master(target.parameter) if master else target.parameter for target in self.active]
        owners = [target.parameter for target in self.active]
        layout = tuple((t.data_ptr(), t.device, t.dtype) for t in (*tensors, *(owners if master else ())))
        if layout == self._layout and self.active:
            return
        for target, tensor in zip(self.active, tensors):
            require_whole(target.name, target.parameter)
            if tensor.numel() != self.sizes[target.name] or target.parameter.numel() != self.sizes[target.name]:
                raise HeadPruningError(
                    f"{target.name} has {tensor.numel()} weights here but had {self.sizes[target.name]} when the "
                    "pruner was attached; prune weights with plain data parallelism (DDP)."
                )
        self._layout, self._tensors = layout, [tensor.detach() for tensor in tensors]
        self._sources = tensors
        self._twins = [
            None if tensor is target.parameter else target.parameter.detach()
            for target, tensor in zip(self.active, tensors)
        ]
        self._doubled = any(twin is not None for twin in self._twins)
        # A nested mask must outlive the averages' next change.
        carried = self.carrier is not None and self.policy != "nested"
        self.masks = SignMasks(self.carrier) if carried else BoolMasks()
        kinds = [*self.kinds, *(["original"] if self.policy == "retained" else []), self.masks.kind]
        state = {kind: self._states(kind) for kind in dict.fromkeys(kinds)}
        self.portions = cut_into_portions(self._tensors, whole=self.selection.scope != "global")
        for portion in self.portions:
            portion.values = portion.cut(self._tensors)
            portion.state = {kind: portion.cut(tensors) for kind, tensors in state.items()}
        wanted = self.selection.scope == "global" and self.policy != "nested"
        self._sample = sample_portion(self._tensors, state) if wanted else None

    def _states(self, kind: str) -> list[torch.Tensor]:
        known, found = self.state.setdefault(kind, {}), []
        for target, tensor in zip(self.active, self._tensors):
            old = known.get(target.name)
            if old is None:
                dtype = {"mask": torch.bool, "original": tensor.dtype}.get(kind, torch.float32)
                # Before the first mask every weight stays.
                start = {"mask": True, self.carrier: TINY}.get(kind, 0.0)
                old = torch.full_like(tensor, start, dtype=dtype)
            known[target.name] = old.to(tensor.device)
            found.append(known[target.name])
        return found

    def _gradients(self) -> list[torch.Tensor]:
        found = []
        for target, source in zip(self.active, self._sources):
            gradient = source.grad if source.grad is not None else target.parameter.grad
            found.append(torch.zeros_like(source) if gradient is None else gradient)
        return found

    def _mask(self, portion: Portion) -> None:
        if self.policy == "retained" and not self.locked:
            torch._foreach_copy_(portion.state["original"], portion.values)
        copies = [t if twin is None else twin for t, twin in zip(self._tensors, self._twins)] if self._doubled else []
        self.masks.apply(portion, portion.values, *([portion.cut(copies)] if self._doubled else []))

    def _apply(self) -> None:
        each(self.portions, self._mask)

    def _select(self, density: float) -> None:
        self._tell_inactive()
        choose = self._select_global if self.selection.scope == "global" else self._select_each
        kept, threshold = choose(1.0 - density)
        self.has_mask, self.current, self.selected = True, True, density
        if self._numbers is None or self._numbers.device != kept.device:
            self._numbers = _Numbers(kept.device)
        self._numbers.write(threshold, kept)

    def _select_global(self, sparsity: float) -> tuple[torch.Tensor, torch.Tensor]:
        number = sum(self.sizes[target.name] for target in self.active)
        k = int(number * sparsity)
        if k == 0:
            for portion in self.portions:
                self.masks.store(portion, [torch.ones_like(value, dtype=torch.bool) for value in portion.values])
            device = self._tensors[0].device
            return torch.full((), number, device=device), torch.full((), -math.inf, device=device)
        found = self._select_by_sample(k, number) if self._sample is not None else None
        if found is None:
            signed = self.signed or self.policy == "nested"
            found = kth_smallest(lambda: map(self.masked_scores, self.portions), k, signed=signed)
            for portion in self.portions:
                here, scores = found.value.to(portion.device, non_blocking=True), self.masked_scores(portion)
                if self.policy == "nested":
                    self.masks.store(portion, [self._above(score, here) for score in scores])
                else:
                    self.masks.store_above(portion, scores, here, self.inclusive)
        if self.policy == "nested":  # what is gone stays so, also above the rank that the density asks for
            kept = [torch.count_nonzero(keep) for portion in self.portions for keep in self.masks.keep(portion)]
            return torch.stack([count.to(found.value.device) for count in kept]).sum(), found.value
        return number - (found.below + found.equal if self.inclusive else found.below), found.value

    def _select_by_sample(self, k: int, number: int) -> Optional[Threshold]:
        """Select and store in one pass over the portions; None if the sample was misleading."""
        between: list[tuple[Portion, int, np.ndarray, np.ndarray]] = []

        def visit(portion: Portion, taken: list[torch.Tensor], low: float, found: list) -> None:
            between.extend([(portion, i, *pair) for i, pair in enumerate(found) if pair[0].size])
            self.masks.store_above(portion, taken, torch.tensor(low), False)

        sample = torch.cat([score.reshape(-1) for score in self.scores(self._sample)]).numpy()
        found = bracketed(sample, self.portions, self.scores, k, number, visit)
        if found is not None:
            value = found.value.numpy()
            for portion, i, places, taken in between:
                gone = places[taken <= value if self.inclusive else taken < value]
                self.masks.prune(portion, i, gone)
        return found

    def _select_each(self, sparsity: float) -> tuple[torch.Tensor, torch.Tensor]:
        kept = torch.zeros((), dtype=torch.int64, device=self._tensors[0].device)
        selection = self.selection
        for target, portion in zip(self.active, self.portions):
            (score,) = self.masked_scores(portion)
            if selection.scope == "pattern":
                # The final density is N/M; on the way there the number of zeros per group is rounded down.
                keep = n_of_m(score, int(sparsity * selection.size[0] + 1e-9), selection.size[0])
                if self.policy == "nested" and self.has_mask:
                    keep &= self.masks.keep(portion)[0]
            else:
                if selection.scope == "block":
                    score = pool_blocks(score, selection.size, self.config.block_pooling)
                threshold = self._threshold(target.name, score, int(sparsity * score.numel()))
                keep = self._above(score, threshold)
                if selection.scope == "block":
                    keep = expand_blocks(keep, selection.size)
            kept = self._store(portion, [keep], kept)
        return kept, torch.full((), math.nan, device=kept.device)

    def _threshold(self, name: str, score: torch.Tensor, k: int) -> torch.Tensor:
        """The threshold of one tensor; nothing is pruned at k = 0."""
        if k == 0:
            return torch.full((), -math.inf, device=score.device)
        return score.flatten().kthvalue(k).values

    def _above(self, score: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
        keep = score > threshold if self.inclusive else score >= threshold
        if self.policy == "nested":
            keep &= score > -math.inf
        return keep

    def _store(self, portion: Portion, keep: list[torch.Tensor], kept: torch.Tensor) -> torch.Tensor:
        self.masks.store(portion, keep)
        for mask in keep:
            kept = kept + torch.count_nonzero(mask).to(kept.device, non_blocking=True)
        return kept

    def _tell_inactive(self) -> None:
        if self._told or len(self.active) == len(self.targets):
            return
        self._told = True
        names = {target.name for target in self.active}
        silent = [target.name for target in self.targets if target.name not in names]
        logger.warning("%d parameters never had a gradient and are not pruned: %s", len(silent), shortened(silent))

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, np.ndarray]:
        names = {target.name for target in self.active}
        flags = (self.has_mask, self.locked, self.clean, self.current)
        numbers = [] if self._numbers is None else [x if math.isfinite(x) else 0.0 for x in self._numbers.read()]
        selected = -1.0 if math.isnan(self.selected) else self.selected
        return {
            "progress": np.array([float(self.t), selected, *map(float, flags)]),
            "active": np.array([target.name in names for target in self.targets], dtype=float),
            "numbers": np.array(numbers),
        }

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        if state["active"].size != len(self.targets):
            raise HeadPruningError(
                f"The checkpoint has {state['active'].size} pruned tensors but this run prunes {len(self.targets)}; "
                "resume with the model and the options that the run was started with."
            )
        t, selected, *flags = state["progress"].tolist()
        self.t, self.selected = int(t), math.nan if selected < 0 else selected
        self.has_mask, self.locked, self.clean, self.current = (bool(flag) for flag in flags)
        self.active = [target for target, live in zip(self.targets, state["active"]) if live]
        self._layout, self._planned = (), False
        if state["numbers"].size:
            self._numbers = _Numbers(torch.device("cpu"))
            self._numbers.last = tuple(state["numbers"].tolist())

    @torch.no_grad()
    def tensor_state(self) -> dict[str, torch.Tensor]:
        """Averages as they are (not copies), masks packed to one bit per weight, by ``kind.parameter``."""
        found: dict[str, torch.Tensor] = {}
        for kind, tensors in self.state.items():
            for name, tensor in tensors.items():
                found[f"{kind}.{name}"] = pack_mask(tensor) if kind == "mask" else tensor
        found.update({f"threshold.{name}": tensor for name, tensor in self.thresholds.items()})
        return found

    @torch.no_grad()
    def load_tensor_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore :meth:`tensor_state`. Raises HeadPruningError when it is of other tensors."""
        parameters = {target.name: target.parameter for target in self.targets}
        self.state, self.thresholds, self._layout = {}, {}, ()
        for key, tensor in state.items():
            kind, _, name = key.partition(".")
            if name not in parameters:
                raise HeadPruningError(
                    f"The checkpoint's pruning state has {name}, which this run does not prune; resume with the model "
                    "and the options that the run was started with."
                )
            shape, device = parameters[name].shape, parameters[name].device
            if kind == "threshold":
                self.thresholds[name] = tensor.to(device)
                continue
            if kind == "mask":
                tensor = unpack_mask(tensor, shape)
            if tensor.shape != shape:
                raise HeadPruningError(
                    f"The checkpoint's pruning state of {name} has shape {list(tensor.shape)} but the model's is "
                    f"{list(shape)}; resume with the model that the run was started with."
                )
            like = torch.empty_like(parameters[name], dtype=tensor.dtype)  # its strides
            self.state.setdefault(kind, {})[name] = like.copy_(tensor)


class _Numbers:
    """Two numbers of the last mask, read without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self.last, self.device = (math.nan, math.nan), device
        self._host = torch.empty(2, dtype=torch.float64, pin_memory=device.type == "cuda")
        self._event = None
        self._cuda = device.type == "cuda"

    def write(self, threshold: torch.Tensor, kept: torch.Tensor) -> None:
        self.read()
        self._host.copy_(torch.stack([threshold.double(), kept.double()]), non_blocking=True)
        if self._cuda:
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self.last = tuple(self._host.tolist())

    def read(self) -> tuple[float, float]:
        if self._event is not None and self._event.query():
            self.last, self._event = tuple(self._host.tolist()), None
        return self.last
