"""Tasks that prune while they train: any task of fairseq plus one mixin."""

import logging
import math
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Any, List, Optional

import torch
import torch.distributed
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics
from fairseq.optim.amp_optimizer import AMPOptimizer
from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask
from fairseq.tasks.masked_lm import MaskedLMConfig, MaskedLMTask
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from omegaconf import II

from head_pruning import HeadPruningError, PruningSession, build_pruner, choose_method
from head_pruning.registry import option_fields

from .checkpoints import watch_target
from .session import open_session
from .state import StateKeeper

logger = logging.getLogger(__name__)

# Models that skip whole layers at random need some updates until every site has run.
_LAYERDROP_UPDATES = 100
_METRIC_ROUND = {"temperature": None, "gate_norm": None, "penalty": 3, "heads_expected": 2}


def pruning_config(base: type, name: str) -> type:
    """``base`` (a task's dataclass) plus the options of every registered method and what they read of the run."""
    host = [
        ("pruner", Optional[str], field(default=None, metadata={"help": "pruning method by its registered name"})),
        ("seed", int, II("common.seed")),
        ("max_update", int, II("optimization.max_update")),
        ("max_epoch", int, II("optimization.max_epoch")),
        ("update_freq", List[int], II("optimization.update_freq")),
        ("reset_optimizer", bool, II("checkpoint.reset_optimizer")),
        ("finetune_from_model", Optional[str], II("checkpoint.finetune_from_model")),
        ("save_dir", str, II("checkpoint.save_dir")),
        ("train_subset", str, II("dataset.train_subset")),
    ]
    taken = set(base.__dataclass_fields__)
    own = [entry for entry in host if entry[0] not in taken]
    own += [(f.name, f.type, field(default=f.default, metadata=dict(f.metadata))) for f in option_fields().values()]
    return make_dataclass(name, own, bases=(base,), namespace={"__module__": __name__})


class HeadPruningMixin:
    """Drives a pruning session from fairseq's trainer."""

    session: Optional[PruningSession] = None

    @property
    def options(self) -> Any:
        """The task's options: fairseq's older tasks (language modelling) call them ``args`` and have no ``cfg``."""
        return self.args if self.cfg is None else self.cfg

    def build_model(self, cfg: Any, from_checkpoint: bool = False):
        """Build the model and, in training, put the gates on."""
        model = super().build_model(cfg, from_checkpoint)
        if not from_checkpoint:  # a stored model brings its mask and needs no method
            method = choose_method(self.options, self.options.pruner)
            if method is not None:
                self._start_session(model, method)
        return model

    def _start_session(self, model, method) -> None:
        pruner = build_pruner(method, self.options)
        drops_layers = any(
            getattr(getattr(model, part, None), f"{part}_layerdrop", 0)
            or getattr(getattr(model, part, None), "layerdrop", 0)
            for part in ("encoder", "decoder")
        )
        self.session = open_session(
            model,
            [pruner],
            seed=self.options.seed,
            all_reduce=_all_reduce if _ranks() > 1 else None,
            fired_within=_LAYERDROP_UPDATES if drops_layers else 1,
        )
        self._keeper = StateKeeper(model, session=self.session, reset_optimizer=self._resets_optimizer())
        watch_target(self.session)
        self._optimizer = None
        self._epochs: Optional[float] = None
        if self.session.freezes_model:
            self.session.freeze()
        logger.info(
            "pruning with %s: %d heads in %d attention layers, the model's own weights are %s",
            method.name,
            self.session.unit_map.num_heads,
            len(self.session.unit_map.attention),
            "kept as they are (pipelined)" if self.session.freezes_model else "trained too (joint)",
        )

    def _resets_optimizer(self) -> bool:
        """Whether fairseq will load a model without its optimizer: when told to, and when it first finetunes."""
        first = not (Path(self.options.save_dir) / "checkpoint_last.pt").exists()
        return self.options.reset_optimizer or bool(self.options.finetune_from_model) and first

    def can_reuse_epoch_itr(self, dataset) -> bool:
        """Batches are drawn anew each epoch: only so a resumed run sees the batches of one never stopped."""
        return False

    def get_batch_iterator(self, dataset, *args, **kwargs):
        """As the base task; takes the length of training from the training set's iterator."""
        iterator = super().get_batch_iterator(dataset, *args, **kwargs)
        if self.session is not None and dataset is self.datasets.get(self.options.train_subset):
            if self._epochs is None:
                # With --reset-optimizer fairseq goes on counting epochs but starts counting updates anew.
                done = kwargs.get("epoch", 1) - 1 if self._keeper.reset_optimizer else 0
                self._epochs = max(1, self.options.max_epoch - done) if self.options.max_epoch else math.inf
            frequency = list(self.options.update_freq)[-1]
            by_epoch = self._epochs * math.ceil(len(iterator) / frequency)
            total = min(self.options.max_update or math.inf, by_epoch)
            self.session.total_steps = None if math.isinf(total) else int(total)
        return iterator

    def begin_epoch(self, epoch, model):
        """Refuse here what cannot work: an error during an update makes fairseq write a crash checkpoint."""
        super().begin_epoch(epoch, model)
        if self.session is None:
            return
        if self.session.freezes_model and not self._keeper.loaded:
            raise HeadPruningError(
                "Pipelined pruning trains the gates of a trained model, and no checkpoint was loaded; add "
                "--restore-file (with --reset-optimizer), or --joint-pruning to train the model too."
            )
        self.session.metrics()  # settles the schedules, now that the length of training is known

    def train_step(self, sample, model, criterion, optimizer, update_num, ignore_grad=False, **kwargs):
        """One micro-batch; the first of an update draws the gates."""
        if self.session is None:
            return super().train_step(sample, model, criterion, optimizer, update_num, ignore_grad, **kwargs)
        self._watch(optimizer)
        if self._new_update:
            self._begin_update(optimizer, update_num)

        def objective(model, sample):
            loss, sample_size, log = criterion(model, sample)
            return self.session.loss(loss, sample), sample_size, log

        loss, sample_size, log = super().train_step(
            sample, model, objective, optimizer, update_num, ignore_grad, **kwargs
        )
        if not ignore_grad:
            self._denominator = self._denominator + sample_size
            self._micro_batches += 1
        return loss, sample_size, log

    def _watch(self, optimizer) -> None:
        # The trainer tells no task where an update starts; it does clear the gradients then.
        if self._optimizer is optimizer:
            return
        self._optimizer, self._new_update = optimizer, True
        original = optimizer.zero_grad

        def zero_grad(*args, **kwargs):
            self._new_update = True
            return original(*args, **kwargs)

        optimizer.zero_grad = zero_grad

    def _begin_update(self, optimizer, update_num: int) -> None:
        self.session.before_update(update_num)
        self._new_update = False
        self._denominator, self._micro_batches = 0, 0
        scaler = getattr(optimizer, "scaler", None)
        if isinstance(optimizer, AMPOptimizer):
            self._loss_scale = scaler.get_scale()
        else:
            self._loss_scale = getattr(scaler, "loss_scale", 1.0)

    def optimizer_step(self, optimizer, model, update_num) -> None:
        """The gates step beside the model's optimizer (which rests in pipelined pruning)."""
        if self.session is None:
            super().optimizer_step(optimizer, model, update_num)
            return
        self.session.after_backward(self._loss_scale, float(self._denominator), self._micro_batches)
        if not self.session.freezes_model:
            super().optimizer_step(optimizer, model, update_num)
        elif getattr(optimizer, "scaler", None) is not None:
            optimizer.scaler.update()
        if isinstance(optimizer, AMPOptimizer) and optimizer.scaler.get_scale() < self._loss_scale:
            return  # an overflow: the model has not stepped, and fairseq tries the batch again
        self.session.after_step()
        for name, value in self.session.metrics().items():
            metrics.log_scalar(name, value, weight=0, priority=650, round=_METRIC_ROUND.get(name, 1))


def _ranks() -> int:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return distributed_utils.get_world_size(distributed_utils.get_data_parallel_group())


def _all_reduce(tensor: torch.Tensor) -> None:
    distributed_utils.all_reduce(tensor, group=distributed_utils.get_data_parallel_group())


TranslationHeadPruningConfig = pruning_config(TranslationConfig, "TranslationHeadPruningConfig")
LanguageModelingHeadPruningConfig = pruning_config(LanguageModelingConfig, "LanguageModelingHeadPruningConfig")
MaskedLMHeadPruningConfig = pruning_config(MaskedLMConfig, "MaskedLMHeadPruningConfig")


@register_task("translation_head_pruning", dataclass=TranslationHeadPruningConfig)
class TranslationHeadPruningTask(HeadPruningMixin, TranslationTask):
    """``translation`` with head pruning."""


@register_task("language_modeling_head_pruning", dataclass=LanguageModelingHeadPruningConfig)
class LanguageModelingHeadPruningTask(HeadPruningMixin, LanguageModelingTask):
    """``language_modeling`` with head pruning."""


@register_task("masked_lm_head_pruning", dataclass=MaskedLMHeadPruningConfig)
class MaskedLMHeadPruningTask(HeadPruningMixin, MaskedLMTask):
    """``masked_lm`` with head pruning."""
