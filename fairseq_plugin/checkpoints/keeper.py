"""Pruning state on its way into a fairseq checkpoint and back: of heads and of weights, in one place."""

import logging
from typing import Any, Collection, Iterable, Mapping, Optional, Sequence

import numpy as np
import torch
from fairseq.models import BaseFairseqModel
from fairseq.modules import MultiheadAttention

from head_pruning import HeadMask, HeadPruningError, Pruner, PruningSession
from head_pruning.gates import GateBank
from head_pruning.surgery.remaining import recipe_of
from head_pruning.surgery.removal import remove_heads as cut_out
from head_pruning.weights import pack_mask

from ..modules.attention import KeptHeadsShown, UnfusedAttention
from ..modules.surgery import NoHeads, encode
from ..modules.unit_map import unit_map
from .stored import DAMAGED, KEEP, META, RECIPE, SESSION, PruningState, damaged

logger = logging.getLogger(__name__)


class StateKeeper:
    """Hangs on a model: writes the pruning state into its state dict and restores it.

    Either of a ``session`` (training) or of a fixed mask with the ``stored`` state of the run that made it
    (decoding, or training on with a task that does not prune). A compact model's recipe is part of it.
    """

    def __init__(
        self,
        model: BaseFairseqModel,
        *,
        session: Optional[PruningSession] = None,
        reset_optimizer: bool = False,
    ) -> None:
        self.model = model
        self.session = session
        self.stored: dict[str, torch.Tensor] = {}
        self.gates: Optional[GateBank] = None
        self.shown = KeptHeadsShown(model)
        self.unfused = UnfusedAttention(model)
        self.reset_optimizer = reset_optimizer
        self.loaded = False
        #: What the checkpoint that is to be loaded keeps of all pruners but those of heads: its model does not tell.
        self.coming: Mapping[str, Any] = {}
        self._heads = session.of_kind("heads") if session else []
        self._others = others_of(session)
        self._handle = model.register_state_dict_post_hook(self)
        model._head_pruning = self

    def __deepcopy__(self, memo: dict) -> "StateKeeper":
        # A copy of the model (fairseq's moving average) goes on writing the state of the run.
        return self

    def __call__(self, module: torch.nn.Module, state_dict: dict, prefix: str, metadata: Any) -> None:
        """State-dict post hook."""
        for name, value in self.of_heads().items():
            state_dict[prefix + name] = value

    def of_heads(self) -> dict[str, torch.Tensor]:
        """What the model's state dict keeps: flat names to fresh tensors."""
        recipe = recipe_of(self.model)
        shape = {RECIPE: encode(recipe)} if recipe is not None else {}
        if self.session is None:
            return {**{name: value.clone() for name, value in self.stored.items()}, **shape}
        if not self._heads:
            return shape
        state = {
            SESSION + name: value for name, value in _state_of(self.session, {"step", *_names(self._heads)}).items()
        }
        mask = self.session.head_mask()
        if mask is not None:
            state[KEEP] = torch.from_numpy(mask.keep.astype(np.float64))
        state[META] = torch.tensor(list(self.session.description().encode()), dtype=torch.int32)
        return {**state, **shape}

    def of_weights(self, *, resumable: bool) -> dict[str, Any]:
        """What ``extra_state`` keeps of pruners of weights and of all others but those of heads; empty without them.

        Args:
            resumable: whether training is to go on from it; else only the masks are kept, one bit per weight.
        """
        if self.session is None or not self._others:
            return {}
        masks = self.session.weight_masks()
        state = {
            "pruners": _names(self._others),
            "shapes": {name: list(mask.shape) for name, mask in masks.items()},
            "masks": {name: pack_mask(mask) for name, mask in masks.items()},
        }
        if resumable:
            state |= {
                "session": _state_of(self.session, {"step", *state["pruners"]}),
                "tensors": self.session.tensor_state(),
            }
        return state

    def let_go(self) -> None:
        """Take off the gates of a fixed mask: the model is about to be cut."""
        if self.gates is not None:
            self.gates.detach()
            self.unfused.detach()
            self.shown.detach()
        self.gates, self.stored = None, {}

    def remove(self) -> None:
        """Hang on the model no more."""
        self._handle.remove()
        del self.model._head_pruning

    def check(self, stored: PruningState) -> None:
        """Raise, before any weight is loaded, when the state that comes with a checkpoint cannot be taken."""
        if not stored.heads:
            return
        description = stored.description()
        theirs = description["unit_map"]
        theirs.check_same_heads(unit_map(self.model).numbering(theirs.units), "The pruned checkpoint")
        if self.session is None:
            return
        if KEEP in stored.heads and not self._heads:
            raise HeadPruningError(
                "The checkpoint has heads that are pruned, and pruning its weights alone would bring them back; add "
                "the options of its pruner of heads, or start from its export (head-pruning export --to compact)."
            )
        theirs, mine = description["pruners"], _names(self.session.pruners)
        if theirs != mine and not self.reset_optimizer:
            raise HeadPruningError(
                f"The checkpoint was pruned with {', '.join(theirs)}, this run uses {', '.join(mine)}; resume with "
                "the same pruner, or add --reset-optimizer to start new gates from its weights."
            )

    def restore(self, stored: PruningState) -> None:
        """Take what came with a checkpoint: the state of heads, and that of weights."""
        weights, self.coming, self.loaded = self.coming, {}, True
        if self.session is None:
            self.fix(stored)
            return
        taken, values, tensors = set(), {}, None
        if stored.heads and set(_names(self._heads)).issubset(stored.description()["pruners"]):
            # A run that starts anew keeps the heads that its own options name.
            heads = [pruner for pruner in self._heads if pruner.inherits or not self.reset_optimizer]
            taken, values = {"step", *_names(heads)}, stored.of_session()
        elif stored.heads:
            logger.info("gates start anew: the checkpoint was pruned with another method")
        if self._others and weights:
            tensors = None if self.reset_optimizer else weights.get("tensors")
            if tensors is None:
                logger.info("%s starts anew, from the weights of the checkpoint", "+".join(_names(self._others)))
            else:
                taken |= {*_names(self._others), *({"step"} & weights["session"].keys())}
                values |= {name: value.cpu().numpy() for name, value in weights["session"].items()}
        if taken:
            self._take(taken, values, tensors)
        if not self.reset_optimizer:
            self._compare(stored, weights, taken)

    def _compare(self, stored: PruningState, weights: Mapping[str, Any], taken: set) -> None:
        """Raise when the masks that a checkpoint holds are not those of the pruners' state that came with them."""
        assert self.session is not None
        mask = self.session.head_mask()
        if mask is not None and KEEP in stored.heads and taken.issuperset(_names(self._heads)):
            if not np.array_equal(mask.keep, stored.kept() > 0.5):
                raise damaged("its head mask is not that of its gates")
        theirs = weights.get("masks", {}).keys()
        if taken.issuperset(_names(self._others)) and self.session.weight_masks().keys() != theirs:
            raise damaged("its masks are not of the weights that its pruner prunes")

    def _take(self, owners: set, values: Mapping[str, np.ndarray], tensors: Optional[Mapping]) -> None:
        """Restore what the session keeps of ``owners``, pruners or its step; the others stay as they are."""
        assert self.session is not None
        anew = set()
        if self.reset_optimizer:
            anew = {f"{pruner.name}.{entry}" for pruner in self.session.pruners for entry in pruner.schedule_state}
        mine = self.session.state_dict().items()
        state = {name: value for name, value in mine if _owner(name) not in owners or name in anew}
        state |= {name: value for name, value in values.items() if _owner(name) in owners and name not in anew}
        try:
            self.session.load_state_dict(state)
        except HeadPruningError:
            raise
        except (KeyError, IndexError, ValueError) as error:
            raise HeadPruningError(DAMAGED) from error
        if tensors is not None:
            self.session.load_tensor_state({name: tensor.clone() for name, tensor in tensors.items()})
        if self.reset_optimizer:
            self.session.reset_optimizer()

    def fix(self, stored: PruningState) -> None:
        """Gate the model with the mask of a checkpoint, in place of the one before."""
        self.let_go()
        if KEEP in stored.heads:
            self.hold(stored.head_mask())
        self.stored = dict(stored.heads)

    def hold(self, mask: HeadMask) -> None:
        """Gate the model, which has no gates, with a fixed mask, in training and in evaluation."""
        self.gates = GateBank(self.model, unit_map(self.model).numbering(mask.unit_map.units))
        self.gates.attach()
        self.gates.set_fixed(mask.keep)
        self.unfused.attach()
        self.shown.attach(mask.numbering("heads"))


def _state_of(session: PruningSession, owners: Collection[str]) -> dict[str, torch.Tensor]:
    values = session.state_dict().items()
    return {name: torch.from_numpy(np.array(value)) for name, value in values if _owner(name) in owners}


def _names(pruners: Iterable[Pruner]) -> list[str]:
    return [pruner.name for pruner in pruners]


def _owner(name: str) -> str:
    """Whose an entry of a session's state dict is: a pruner's name, or ``step``."""
    return name.partition(".")[0]


def others_of(session: Optional[PruningSession]) -> list[Pruner]:
    """The session's pruners but for those of heads; their state is kept beside the model's."""
    return [pruner for pruner in (session.pruners if session else ()) if pruner.kind != "heads"]


def keeper_of(model: torch.nn.Module) -> Optional[StateKeeper]:
    """What hangs on a model, or on the one that it was copied from; None on a dense one without a session."""
    return getattr(model, "_head_pruning", None)


def check_weights(session: Optional[PruningSession], stored: PruningState, *, reset: bool, prunes: bool) -> None:
    """Raise, before any weight is loaded, when a run cannot go on from a checkpoint whose weights were pruned.

    Args:
        session: of this run; None when it does not prune.
        stored: of the checkpoint.
        reset: whether this run starts anew from the checkpoint's model.
        prunes: whether its task is one that prunes.

    Raises:
        HeadPruningError: it would go on with other pruners of weights.
    """
    theirs, mine = stored.weight_pruners(), _names(others_of(session))
    if theirs and theirs != mine and prunes and not reset:
        raise HeadPruningError(
            f"The checkpoint was trained with {', '.join(theirs)}, this run uses "
            f"{', '.join(mine) or 'no such method'}; resume with the same options (--weight-pruner, --distill), or "
            "add --reset-optimizer to start anew from its weights."
        )
    if stored.weights.get("masks") and not mine:
        logger.warning(
            "the checkpoint's weights were pruned with %s, and this run trains its zeros too; --weight-pruner lock "
            "keeps them",
            ", ".join(theirs),
        )


def refuse_late_start(session: PruningSession, file: str, stored: PruningState) -> None:
    """Raise HeadPruningError if training goes on in the middle with a schedule that has not begun."""
    for pruner in session.pruners:
        known = META in stored.heads if pruner.kind == "heads" else stored.weights
        if not pruner.starts_anywhere and not known:
            raise HeadPruningError(
                f"{file} was not pruned with {pruner.name}, whose schedule would start in the middle of training; add "
                "--reset-optimizer --reset-lr-scheduler --reset-meters --reset-dataloader, or give the file as "
                "--finetune-from-model."
            )


def keep_heads(model: BaseFairseqModel, pruners: Sequence[Pruner]) -> None:
    """Run a loaded model, dense or compact, with the heads that ``pruners``, which need no training, keep.

    Raises:
        HeadPruningError: it has a head mask of its own, or the one given is of another model.
    """
    keeper = keeper_of(model) or StateKeeper(model)
    if keeper.gates is not None:
        raise HeadPruningError(
            "The checkpoint has a head mask of its own, and --head-mask-file is for models without one; leave it out."
        )
    session = PruningSession(model, unit_map(model), pruners).attach()
    mask = session.head_mask()
    session.detach()
    if mask is not None:
        keeper.hold(mask)


def warn_of_alignments(model: BaseFairseqModel) -> None:
    """Tell of a model whose last cross-attention, which alignments are read from, has no head left."""
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, MultiheadAttention)]
    name, last = next(((n, m) for n, m in reversed(modules) if m.encoder_decoder_attention), ("", None))
    keeper = keeper_of(model)
    if isinstance(last, NoHeads) or (keeper is not None and name in keeper.shown.blind):
        logger.warning(
            "no head of %s is left: --print-alignment and --replace-unk, which go by the last cross-attention, know "
            "no word of the source from another",
            name,
        )


def remove_heads(model: BaseFairseqModel, mask: Optional[HeadMask] = None) -> dict:
    """Cut heads out of a fairseq model for good, in place; checkpoints of it carry what was cut.

    Args:
        model: dense, with the fixed mask of a pruned checkpoint, or compact already; no session may be on it.
        mask: the heads that stay; default: those of the checkpoint that was loaded.

    Returns:
        The recipe, see :func:`head_pruning.surgery.remove_heads`.

    Raises:
        HeadPruningError: there is no mask, it is of another model, or a session is on the model.
    """
    keeper = keeper_of(model)
    if keeper is not None and keeper.session is not None:
        raise HeadPruningError("A pruning session is on the model; detach it before its heads are cut out.")
    if mask is None:
        mask = PruningState(keeper.stored if keeper is not None else {}).head_mask()
    unit_map(model).numbering(mask.unit_map.units).check_same_heads(mask.unit_map, "The head mask")
    if keeper is not None:
        keeper.let_go()
    recipe = cut_out(model, unit_map(model), mask)
    if keeper is None:
        StateKeeper(model)
    return recipe
