"""A Trainer that prunes heads and weights while it trains."""

import json
from pathlib import Path
from typing import Any, Optional, Sequence

from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from head_pruning import HeadMask, HeadPruningError, Pruner, PruningSession, UnitMap
from head_pruning.files import REPORT_FILE

from .callback import HeadPruningCallback, refuse_broken
from .checkpoints import check_resumable, last_checkpoint
from .session import open_session
from .weights import refuse_sharded_weights, weight_pruners


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
            if weight_pruners(session):
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

    def compute_loss(self, model, inputs, return_outputs=False, **options):
        """The task loss, and what the session's pruners make of it while training."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
        if model.training:
            loss = self.session.loss(loss, inputs, outputs)
        return (loss, outputs) if return_outputs else loss

    def train(self, resume_from_checkpoint: "str | bool | None" = None, *more: Any, **options: Any):
        """As the base class; a checkpoint that was cut off while it was written is refused."""
        if resume_from_checkpoint is True:
            found = last_checkpoint(self.args.output_dir)
            if found is None:
                raise HeadPruningError(f"There is no whole checkpoint in {self.args.output_dir} to resume from.")
            resume_from_checkpoint = str(found)
        elif resume_from_checkpoint:
            resume_from_checkpoint = str(check_resumable(resume_from_checkpoint))
        if resume_from_checkpoint:
            stored = json.loads((Path(resume_from_checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
            # Before the Trainer loads the optimizer's state, which need not fit.
            self._pruning.stored(stored.get("stateful_callbacks") or {}, resume_from_checkpoint)
        self._pruning.resumed_from = resume_from_checkpoint or None
        return super().train(resume_from_checkpoint, *more, **options)

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
