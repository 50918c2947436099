"""A Trainer that prunes heads and weights while it trains."""

from pathlib import Path
from typing import Any, Optional, Sequence

from torch import nn
from transformers import Trainer

from head_pruning import HeadMask, HeadPruningError, Pruner, PruningSession, UnitMap
from head_pruning.files import REPORT_FILE

from .callback import HeadPruningCallback, refuse_broken
from .session import open_session
from .weights import refuse_sharded_weights


class HeadPruningTrainer(Trainer):
    """transformers' Trainer with a pruning session.

        trainer = HeadPruningTrainer(
            model=model, args=args, train_dataset=train,
            pruners=[pruner("dsp", num_of_heads=12, joint_pruning=True, annealing=True, cooldown_steps=0.6)],
        )
        trainer.train()
        trainer.save_model("pruned")      # an ordinary folder: loads without this package

    ``pruner("platon", final_threshold=0.1, warmup_steps=0.1, ...)`` prunes weights, alone or beside a pruner of heads.

    Args:
        pruners: the methods, see :func:`hf_plugin.pruner`.
        session: an open session on ``model`` instead of ``pruners``.
        unit_map: the model's sites; default: found by :func:`hf_plugin.unit_map`.
        mask_steps: see :class:`HeadPruningCallback`.

    Raises:
        HeadPruningError: neither or both of ``pruners`` and ``session``, a ``model_init``, a model that cannot be
            mapped, or weights to be pruned under FSDP or DeepSpeed.
    """

    #: Whether :meth:`save_model` writes the pruned model by itself.
    saves_outcome = True

    def __init__(
        self,
        model: Optional[nn.Module] = None,
        args: Any = None,
        *more: Any,
        pruners: Sequence[Pruner] = (),
        session: Optional[PruningSession] = None,
        unit_map: Optional[UnitMap] = None,
        mask_steps: int = 0,
        **options: Any,
    ) -> None:
        if model is None or options.get("model_init") is not None:
            raise HeadPruningError("Give the model itself; gates are put on it before the Trainer is built.")
        if bool(pruners) == (session is not None):
            raise HeadPruningError("Give either pruners or a session.")
        if session is None:
            session = open_session(model, pruners, unit_map=unit_map, seed=getattr(args, "seed", 42))
        self.session = session
        try:
            if session.of_kind("weights"):
                refuse_sharded_weights(getattr(args, "fsdp", None), getattr(args, "deepspeed", None))
            super().__init__(model, args, *more, **options)
            self._pruning = HeadPruningCallback(session, mask_steps=mask_steps).add_to(self)
        except BaseException:
            if pruners:
                session.detach()  # the model is as it was, for another try
            raise

    @property
    def head_mask(self) -> Optional[HeadMask]:
        """The heads that stay; None when no pruner prunes heads."""
        return self.session.head_mask()

    def save_model(self, output_dir: Optional[str] = None, _internal_call: bool = False) -> None:
        """Save the pruned model: removed heads zeroed, weights masked, masks and report beside it.

        Checkpoints keep all weights, and what pruners know of them.
        """
        if not (_internal_call and output_dir is not None):
            self._pruning.save_outcome(self, output_dir, super().save_model)
            return
        refuse_broken(self.session.model, self.state.global_step)  # before older checkpoints make room for this one
        super().save_model(output_dir, _internal_call=True)
        if self.args.should_save:  # its trainer_state.json comes last
            self._pruning.save_tensors(output_dir, self.state.global_step)

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """Leave the card that :meth:`save_model` wrote, as ``push_to_hub`` does without it."""
        if not (Path(self.args.output_dir) / REPORT_FILE).is_file():
            super().create_model_card(*args, **options)
