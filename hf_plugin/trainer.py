"""A Trainer that prunes heads and weights while it trains."""

from pathlib import Path
from typing import Any, Optional, Sequence

from torch import nn
from transformers import Trainer

from head_pruning import HeadMask, HeadPruningError, Pruner, PruningSession, UnitMap

from .callback import HeadPruningCallback
from .checkpoints import check_checkpoint, last_checkpoint
from .export import save_pruned
from .session import open_session
from .weights import refuse_sharded_weights, save_weight_masks_and_report, weight_pruners


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
        if weight_pruners(session):
            refuse_sharded_weights(getattr(args, "fsdp", None), getattr(args, "deepspeed", None))
        super().__init__(model, args, *more, **options)
        self._pruning = HeadPruningCallback(session, mask_steps=mask_steps).add_to(self)

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
            resume_from_checkpoint = str(check_checkpoint(resume_from_checkpoint))
        self._pruning.resumed_from = resume_from_checkpoint or None
        return super().train(resume_from_checkpoint, *more, **options)

    def save_model(self, output_dir: Optional[str] = None, _internal_call: bool = False) -> None:
        """Save the pruned model: removed heads zeroed, weights masked, masks and report beside it.

        Checkpoints keep all weights, and what pruners know of them.
        """
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            if output_dir is not None and self.args.should_save:  # a checkpoint; its trainer_state.json comes last
                self._pruning.save_tensors(output_dir, self.state.global_step)
            return
        weights = weight_pruners(self.session)
        folder, mask = Path(output_dir or self.args.output_dir), self.session.head_mask()
        with self.session.evaluating():
            model = self.accelerator.unwrap_model(self.model)
            if mask is None:
                super().save_model(str(folder), _internal_call=True)
            elif self.is_world_process_zero():
                save_pruned(
                    model,
                    mask,
                    folder,
                    processing_class=self.processing_class,
                    pruners=self.session.pruners,
                )
            if weights and self.is_world_process_zero():
                save_weight_masks_and_report(folder, model, self.session)
