"""Pruning state inside a fairseq checkpoint's model state, and its way back."""

import functools
import json
import logging
import zipfile
from pathlib import Path
from typing import Any, Mapping, Optional

import numpy as np
import torch
from fairseq import checkpoint_utils
from fairseq.models import BaseFairseqModel
from fairseq.trainer import Trainer

from head_pruning import HeadMask, HeadPruningError, PruningSession, UnitMap, surgery
from head_pruning.gates import GateBank
from head_pruning.session import STATE_VERSION

from .attention import UnfusedAttention
from .options import refuse_other_options
from .surgery import decode, encode, take_shape
from .unit_map import unit_map
from .weights import KEY, own_state, restore_state, stored_state, weight_pruners

logger = logging.getLogger(__name__)

PREFIX = "head_pruning."
KEEP = PREFIX + "keep"
SESSION = PREFIX + "session."
# fairseq's moving average of weights multiplies every entry of the state dict by a float, except those with
# "version" in their name; these hold bytes,
# in a wide type: averaging checkpoints adds them up before it divides.
META = PREFIX + "meta.version1"
RECIPE = PREFIX + "removed.version1"
DAMAGED = "The checkpoint's pruning state is damaged or of an unknown version; use the checkpoint before it."


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
        self.unfused = UnfusedAttention(model)
        self.reset_optimizer = reset_optimizer
        self.loaded = False
        self._handle = model.register_state_dict_post_hook(self)
        model._head_pruning = self

    def __deepcopy__(self, memo: dict) -> "StateKeeper":
        # A copy of the model (fairseq's moving average) goes on writing the state of the run.
        return self

    def __call__(self, module: torch.nn.Module, state_dict: dict, prefix: str, metadata: Any) -> None:
        """State-dict post hook."""
        for name, value in self.state().items():
            state_dict[prefix + name] = value

    def state(self) -> dict[str, torch.Tensor]:
        """Flat names to fresh tensors."""
        recipe = surgery.recipe_of(self.model)
        shape = {RECIPE: encode(recipe)} if recipe is not None else {}
        if self.session is None:
            return {**{name: value.clone() for name, value in self.stored.items()}, **shape}
        if not self._of_heads():
            return shape
        of_weights = own_state(self.session)  # goes elsewhere, see Trainer.state_dict below
        state = {
            SESSION + name: torch.from_numpy(np.array(value))
            for name, value in self.session.state_dict().items()
            if name not in of_weights
        }
        mask = self.session.head_mask()
        if mask is not None:
            state[KEEP] = torch.from_numpy(mask.keep.astype(np.float64))
        state[META] = torch.tensor(list(self.session.description().encode()), dtype=torch.int32)
        return {**state, **shape}

    def _of_heads(self) -> list[str]:
        """The names of the session's pruners but for those of weights."""
        others = weight_pruners(self.session)
        return [pruner.name for pruner in self.session.pruners if pruner not in others]

    def let_go(self) -> None:
        """Take off the gates of a fixed mask: the model is about to be cut."""
        if self.gates is not None:
            self.gates.detach()
            self.unfused.detach()
        self.gates, self.stored = None, {}

    def remove(self) -> None:
        """Hang on the model no more."""
        self._handle.remove()
        del self.model._head_pruning

    def check(self, state: Mapping[str, torch.Tensor]) -> None:
        """Raise, before any weight is loaded, when the state that comes with a checkpoint cannot be taken."""
        if state:
            theirs = read_description(state)["unit_map"]
            theirs.check_same_heads(unit_map(self.model), "The pruned checkpoint")
        if self.session is not None and KEEP in state and not self._of_heads():
            raise HeadPruningError(
                "The checkpoint has heads that are pruned, and pruning its weights alone would bring them back; add "
                "the options of its pruner of heads, or start from its export (head-pruning export --to compact)."
            )
        if state and self.session is not None and not self.reset_optimizer:
            self._check_pruners(state)

    def _check_pruners(self, state: Mapping[str, torch.Tensor]) -> None:
        theirs, mine = read_description(state)["pruners"], [pruner.name for pruner in self.session.pruners]
        if theirs != mine:
            raise HeadPruningError(
                f"The checkpoint was pruned with {', '.join(theirs)}, this run uses {', '.join(mine)}; resume with "
                "the same pruner, or add --reset-optimizer to start new gates from its weights."
            )

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take the state that came with a checkpoint (empty for a dense one)."""
        self.loaded = True
        if self.session is None:
            self._fix(state)
        elif state and not set(self._of_heads()).issubset(read_description(state)["pruners"]):
            logger.info("gates start anew: the checkpoint was pruned with another method")
        elif state:
            values = {name[len(SESSION) :]: value.numpy() for name, value in state.items() if name.startswith(SESSION)}
            if self.reset_optimizer:
                values = {name: value for name, value in values.items() if not name.startswith(self._of_this_run())}
            try:
                self.session.load_state_dict({**self._own_state(), **values})
            except (KeyError, IndexError) as error:
                raise HeadPruningError(DAMAGED) from error
            if self.reset_optimizer:
                self.session.reset_optimizer()

    def _of_this_run(self) -> tuple[str, ...]:
        """Prefixes of the state that a run which starts anew has of its own: heads that its options name."""
        return tuple(f"{pruner.name}." for pruner in self.session.pruners if not pruner.inherits)

    def _own_state(self) -> dict[str, np.ndarray]:
        """The session's present state of what does not come with the model state."""
        prefixes = self._of_this_run() if self.reset_optimizer else ()
        mine = {name: value for name, value in self.session.state_dict().items() if name.startswith(prefixes)}
        return {**own_state(self.session), **(mine if prefixes else {})}

    def _fix(self, state: Mapping[str, torch.Tensor]) -> None:
        """Gate the model with the mask of ``state``, in place of the one before."""
        self.let_go()
        self.gates = attach_mask(self.model, mask_of_state(state)) if KEEP in state else None
        if self.gates is not None:
            self.unfused.attach()
        self.stored = dict(state)


def read_description(state: Mapping[str, torch.Tensor]) -> dict:
    """The description stored with a pruned checkpoint: ``pruners`` and ``unit_map``.

    Raises:
        HeadPruningError: it is damaged.
    """
    try:
        description = json.loads(bytes(state[META].tolist()).decode())
        if description["version"] != STATE_VERSION:
            raise ValueError("another version")
        return {"pruners": list(description["pruners"]), "unit_map": UnitMap.from_dict(description["unit_map"])}
    except (KeyError, TypeError, ValueError) as error:
        raise HeadPruningError(DAMAGED) from error


def split_state(state_dict: Mapping[str, torch.Tensor]) -> tuple[dict, dict]:
    """Split a model state dict into the model's own entries and the pruning state."""
    own = {name: value for name, value in state_dict.items() if not name.startswith(PREFIX)}
    return own, {name: value for name, value in state_dict.items() if name.startswith(PREFIX)}


def recipe_of_state(state: Mapping[str, torch.Tensor]) -> Optional[dict]:
    """The recipe of a compact checkpoint, None of one with all its heads. Raises HeadPruningError when damaged."""
    if RECIPE not in state:
        return None
    try:
        return decode(state[RECIPE])
    except (TypeError, ValueError) as error:
        raise HeadPruningError(DAMAGED) from error


def refuse_cut_off(path: "str | Path") -> None:
    """Raise HeadPruningError if the file of a checkpoint ends too early, as on a disk that was full."""
    path = Path(path)
    if not path.is_file():
        return
    with path.open("rb") as file:
        packed = file.read(2) == b"PK"
    if path.stat().st_size == 0 or (packed and not zipfile.is_zipfile(path)):
        raise HeadPruningError(f"The checkpoint {path} is damaged (it ends too early); use the checkpoint before it.")


def _peek(path: "str | Path") -> dict[str, Any]:
    """A checkpoint file, its tensors still on the disk; empty when it is no file that could be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # whoever loads the file says what is wrong with it
        return {}


def mask_of_state(state: Mapping[str, torch.Tensor]) -> HeadMask:
    """The head mask stored with a pruned checkpoint."""
    if KEEP not in state:
        raise HeadPruningError("The checkpoint holds no head mask; it was not pruned by heads.")
    values = state[KEEP].cpu().numpy()
    # A moving average of one run has nearly whole numbers, or heads on their way to another place.
    if abs(values.sum() - np.count_nonzero(values > 0.5)) > 0.5:
        raise HeadPruningError(
            "The checkpoint is an average of checkpoints that keep different heads; average those of the time after "
            "the heads were chosen."
        )
    return HeadMask(read_description(state)["unit_map"], values > 0.5)


def attach_mask(model: BaseFairseqModel, mask: HeadMask) -> GateBank:
    """Gate a model, whose attention is unfused, with a fixed mask, in training and in evaluation."""
    gates = GateBank(model, unit_map(model))
    gates.attach()
    gates.set_fixed(mask.keep)
    return gates


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
    keeper = getattr(model, "_head_pruning", None)
    if keeper is not None and keeper.session is not None:
        raise HeadPruningError("A pruning session is on the model; detach it before its heads are cut out.")
    if mask is None:
        mask = mask_of_state(keeper.stored if keeper is not None else {})
    unit_map(model).check_same_heads(mask.unit_map, "The head mask")
    if keeper is not None:
        keeper.let_go()
    recipe = surgery.remove_heads(model, unit_map(model), mask)
    if keeper is None:
        StateKeeper(model)
    return recipe


def _has_pruning_state(stored: Mapping[str, Any]) -> bool:
    """Whether a run that prunes wrote the checkpoint."""
    return META in (stored.get("model") or {}) or KEY in (stored.get("extra_state") or {})


def _refuse_late_start(session: PruningSession, file: str, stored: Mapping[str, Any]) -> None:
    """Raise HeadPruningError if training goes on in the middle with a schedule that has not begun."""
    of_weights = weight_pruners(session)
    known = {True: KEY in (stored.get("extra_state") or {}), False: META in (stored.get("model") or {})}
    for pruner in session.pruners:
        if pruner.inherits and pruner.name != "lock" and not known[pruner in of_weights]:
            raise HeadPruningError(
                f"{file} was not pruned with {pruner.name}, whose schedule would start in the middle of training; add "
                "--reset-optimizer --reset-lr-scheduler --reset-meters --reset-dataloader, or give the file as "
                "--finetune-from-model."
            )


def install() -> None:
    """Teach every fairseq model, and the trainer, to load pruned checkpoints; once per process."""
    original = BaseFairseqModel.load_state_dict
    if getattr(original, "reads_head_pruning", False):
        return

    @functools.wraps(original)
    def load_state_dict(self, state_dict, *args, **kwargs):
        own, state = split_state(state_dict)
        keeper = getattr(self, "_head_pruning", None)
        if keeper is not None and keeper.model is not self:  # a copy of the model: its gates stay what they are
            return original(self, own, *args, **kwargs)
        recipe = recipe_of_state(state)
        state.pop(RECIPE, None)
        if recipe != surgery.recipe_of(self):
            if keeper is not None:
                if keeper.session is not None:
                    raise HeadPruningError(
                        "The checkpoint is compact and the gates are on a model that is not; load it with "
                        "--restore-file or --finetune-from-model, or cut the model before its session is opened."
                    )
                keeper.let_go()
            take_shape(self, recipe)
        if keeper is None and (state or recipe is not None):
            keeper = StateKeeper(self)
        if keeper is not None:
            keeper.check(state)
        result = original(self, own, *args, **kwargs)
        if keeper is not None:
            keeper.restore(state)
        return result

    load_state_dict.reads_head_pruning = True
    BaseFairseqModel.load_state_dict = load_state_dict
    load_checkpoint, state_dict = Trainer.load_checkpoint, Trainer.state_dict

    @functools.wraps(load_checkpoint)
    def cut_and_load(self, filename, *args, **kwargs):
        # Before the data-parallel wrapper and the optimizer see the parameters.
        stored, model = _peek(filename), self.get_model()
        session, keeper = getattr(self.task, "session", None), getattr(model, "_head_pruning", None)
        reset = (
            keeper.reset_optimizer if keeper is not None else bool(args[0] if args else kwargs.get("reset_optimizer"))
        )
        if session is not None and not reset and _has_pruning_state(stored):
            refuse_other_options(str(filename), (stored.get("cfg") or {}).get("task") or {}, self.task.options)
        recipe = recipe_of_state(stored.get("model") or {})
        if recipe is not None and recipe != surgery.recipe_of(model):
            getattr(self.task, "cut_for_checkpoint", take_shape)(model, recipe)
            self.reinitialize()
        extra_state = load_checkpoint(self, filename, *args, **kwargs)
        session = getattr(self.task, "session", None)  # a new one where the model was cut
        if extra_state is not None and KEY in extra_state:
            prunes = hasattr(type(self.task), "session")
            restore_state(session, extra_state.pop(KEY), reset=reset, refuse=prunes and not reset)
        if session is not None and extra_state is not None and not reset and self.get_num_updates():
            _refuse_late_start(session, str(filename), stored)
        return extra_state

    @functools.wraps(state_dict)
    def state_dict_with_weights(self):
        state, session = state_dict(self), getattr(self.task, "session", None)
        if weight_pruners(session):
            resumable = not self.cfg.checkpoint.no_save_optimizer_state
            state["extra_state"][KEY] = stored_state(session, resumable=resumable)
        return state

    Trainer.load_checkpoint, Trainer.state_dict = cut_and_load, state_dict_with_weights
    to_cpu = checkpoint_utils.load_checkpoint_to_cpu

    @functools.wraps(to_cpu)
    def load_checkpoint_to_cpu(path, *args, **kwargs):
        refuse_cut_off(path)
        return to_cpu(path, *args, **kwargs)

    checkpoint_utils.load_checkpoint_to_cpu = load_checkpoint_to_cpu
