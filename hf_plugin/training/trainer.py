"""A Trainer that prunes heads and weights while it trains."""

import copy
from pathlib import Path
from typing import Any, Callable, Mapping, Optional, Sequence, Union, cast

from torch import nn
from transformers import Trainer

from head_pruning import HeadMask, HeadPruningError, Pruner, PruningSession, UnitMap
from head_pruning.files import REPORT_FILE
from head_pruning.session import check_pruners, is_attached

from .callback import HeadPruningCallback, refuse_broken
from .session import open_session
from .sharding import refuse_deepspeed


def _fresh(pruner: Pruner) -> Pruner:
    """Another pruner with the same options."""
    return type(pruner)(copy.deepcopy(pruner.config))


class HeadPruningTrainer(Trainer):
    """transformers' Trainer with a pruning session.

        trainer = HeadPruningTrainer(
            model=model, args=args, train_dataset=train,
            pruners=[pruner("dsp", num_of_heads=12, joint_pruning=True, annealing=True, cooldown_steps=0.6)],
        )
        trainer.train()
        trainer.save_model("pruned")      # an ordinary folder: loads without this package

    With a ``model_init`` every model that it makes gets a session of its own, so ``hyperparameter_search`` works; what
    the pruners are may depend on the trial, as the model may::

        HeadPruningTrainer(
            model_init=build, args=args, train_dataset=train,
            pruners=lambda trial: [pruner("dsp", num_of_heads=trial.suggest_int("heads", 4, 24) if trial else 12)],
        )

    ``pruner("platon", final_threshold=0.1, warmup_steps=0.1, ...)`` prunes weights, alone or beside a pruner of heads.

    Args:
        model: the model; None with a ``model_init``.
        pruners: the methods, see :func:`hf_plugin.pruner`; with a ``model_init`` also a function that makes them of
            the trial (None where there is none). In the place of those that another Trainer prunes with there are new
            ones of the same options, in ``trainer.session.pruners``.
        session: an open session on ``model`` instead of ``pruners``.
        unit_map: the model's sites; default: found by :func:`hf_plugin.unit_map`.
        mask_steps: see :class:`HeadPruningCallback`.
        teacher_options: see :func:`hf_plugin.open_session`.
        starts_trained: see :func:`hf_plugin.open_session`; False where the model, or what ``model_init`` makes, has
            learnt nothing yet. A ``session`` was told when it was opened.

    Raises:
        HeadPruningError: neither or both of ``pruners`` and ``session``, a ``model_init`` and a session, a model that
            cannot be mapped, or what is pruned is sharded in a way that the pruners cannot work with.
    """

    #: Whether :meth:`save_model` writes the pruned model by itself.
    saves_outcome = True

    def __init__(
        self,
        model: Optional[nn.Module] = None,
        args: Any = None,
        *more: Any,
        pruners: Union[Sequence[Pruner], Callable[[Any], Sequence[Pruner]]] = (),
        session: Optional[PruningSession] = None,
        unit_map: Optional[UnitMap] = None,
        mask_steps: int = 0,
        teacher_options: Optional[Mapping[str, Any]] = None,
        starts_trained: bool = True,
        **options: Any,
    ) -> None:
        if bool(pruners) == (session is not None):
            raise HeadPruningError("Give either pruners or a session.")
        if model is None and (options.get("model_init") is None or session is not None):
            raise HeadPruningError(
                "Give the model and its pruners or session, or a model_init and pruners: then every model that it "
                "makes gets a session of its own."
            )
        self._pruning: Optional[HeadPruningCallback] = None
        self._pruners, self._seed = pruners, getattr(args, "seed", 42)
        self._opening: dict[str, Any] = {
            "unit_map": unit_map,
            "teacher_options": teacher_options,
            "starts_trained": starts_trained,
        }
        self.session = cast(PruningSession, session)
        try:
            if model is not None and session is None:
                self.session = self._open(model, pruners(None) if callable(pruners) else pruners)
            if self.session is not None and self.session.of_kind("weights"):
                refuse_deepspeed(getattr(args, "deepspeed", None))
            super().__init__(model, args, *more, **options)
            self._pruning = HeadPruningCallback(self.session, mask_steps=mask_steps).add_to(self)
        except BaseException:
            if pruners and self.session is not None:
                self.session.detach()  # the model is as it was, for another try
            raise

    def _open(self, model: nn.Module, pruners: Sequence[Pruner]) -> PruningSession:
        seed = getattr(getattr(self, "args", None), "seed", self._seed)
        own = [_fresh(each) if is_attached(each) else each for each in check_pruners(pruners)]
        return open_session(model, own, seed=seed, **self._opening)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As the base class, and open a session on the new model; that of the model before is detached."""
        model = super().call_model_init(trial)
        if self.session is not None:
            self.session.detach()
        made = self._pruners
        fresh = made(trial) if callable(made) else [_fresh(each) for each in made]
        self.session = self._open(model, fresh)
        if self._pruning is None:  # the base class is being built
            if self.session.of_kind("weights"):
                refuse_deepspeed(self.args.deepspeed)
        else:
            self.optimizer = self.lr_scheduler = None  # those of the model before
            self._pruning.change_session(self.session)
        return model

    @property
    def _callback(self) -> HeadPruningCallback:
        return cast(HeadPruningCallback, self._pruning)

    @property
    def head_mask(self) -> Optional[HeadMask]:
        """The heads that stay; None when no pruner prunes heads."""
        return self.session.head_mask()

    def save_model(self, output_dir: Optional[str] = None, _internal_call: bool = False) -> None:
        """Save the pruned model: removed heads zeroed, weights masked, masks and report beside it.

        Checkpoints keep all weights, and what pruners know of them.
        """
        if not (_internal_call and output_dir is not None):
            self._callback.save_outcome(self, output_dir, super().save_model)
            return
        refuse_broken(self.session.model, self.state.global_step)  # before older checkpoints make room for this one
        super().save_model(output_dir, _internal_call=True)
        self._callback.save_tensors(output_dir, self.state.global_step)  # its trainer_state.json comes last

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """Leave the card that :meth:`save_model` wrote, as ``push_to_hub`` does without it."""
        if not (Path(self.args.output_dir) / REPORT_FILE).is_file():
            super().create_model_card(*args, **options)
