"""Tasks that prune while they train: every task of fairseq plus one mixin."""

import contextlib
import functools
import inspect
import logging
import math
from pathlib import Path
from typing import Any, Iterator, Optional

import torch
import torch.distributed
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics
from fairseq.optim.amp_optimizer import AMPOptimizer
from fairseq.tasks import TASK_DATACLASS_REGISTRY, TASK_REGISTRY, register_task

from head_pruning import HeadPruningError, Pruner, PruningSession

from . import patches
from .checkpoints.keeper import StateKeeper
from .checkpoints.weights import refuse_hosts
from .masters import master_of, unscale
from .modules.surgery import take_shape
from .options import TASK_SUFFIX, add_options, build_pruners, pruning_config
from .session import open_session
from .teachers import load_teacher

logger = logging.getLogger(__name__)

_METRIC_ROUND = {
    **{"temperature": None, "gate_norm": None, "penalty": 3, "heads_expected": 2, "lr_factor": None},
    **{"prune_target": 6, "weights_kept": 6, "weights_kept_of_all": 6, "mask_threshold": None},
}


_Task: Any = object  # the class of the task comes after the mixin


class HeadPruningMixin(_Task):
    """Drives a pruning session from fairseq's trainer."""

    session: Optional[PruningSession] = None
    #: Whether a command that runs a stored model was given this task's options, which a checkpoint has of its own run.
    decodes = False
    _evaluating = False
    _denominator: float
    _micro_batches: int

    @classmethod
    def add_args(cls, parser: Any) -> None:
        """As the base task; flags that a scheduler or optimizer has too are left to it."""

        def add(parser: Any) -> None:
            super(HeadPruningMixin, cls).add_args(parser)
            if getattr(cls, "__dataclass", None) is None:
                add_options(parser)

        patches.share_second_flags(add, parser)

    @classmethod
    def setup_task(cls, cfg: Any, **kwargs: Any):
        """As the base task."""
        task = super().setup_task(cfg, **kwargs)
        task.decodes = not kwargs.get("from_checkpoint")  # until it builds a model to train
        return task

    @property
    def options(self) -> Any:
        """The task's options: fairseq's older tasks (language modelling) call them ``args`` and have no ``cfg``."""
        return self.args if self.cfg is None else self.cfg

    def pruners(self) -> list[Pruner]:
        """The pruners that the options ask for; a task of one's own may add others."""
        return build_pruners(self.options)

    def build_model(self, cfg: Any, from_checkpoint: bool = False):
        """Build the model and, in training, put the gates on."""
        self.decodes = self.decodes and from_checkpoint
        pruners = [] if from_checkpoint else self.pruners()  # a stored model brings its mask
        for pruner in pruners:
            pruner.check_options()
        build = super().build_model
        takes = "from_checkpoint" in inspect.signature(build).parameters
        model = build(cfg, from_checkpoint) if takes else build(cfg)
        if pruners:
            self._start_session(model, pruners)
        elif not from_checkpoint:
            logger.warning(
                "no method is chosen, so nothing will be pruned; add --num-of-heads K --joint-pruning for heads, "
                "--weight-pruner NAME for weights (head-pruning pruners lists the methods), or use --task %s",
                self.options._name.removesuffix(TASK_SUFFIX),
            )
        return model

    def _start_session(self, model, pruners: list[Pruner]) -> None:
        self.session = open_session(
            model,
            pruners,
            seed=self.options.seed,
            all_reduce=_all_reduce if _ranks() > 1 else None,
            all_greatest=functools.partial(_all_reduce, op="max") if _ranks() > 1 else None,
            load_teacher=functools.partial(load_teacher, self, model),
            weights_come_later=True,
        )
        refuse_hosts(self.session, self.options)
        self._keeper = StateKeeper(model, session=self.session, reset_optimizer=self._resets_optimizer())
        self.session.on_detach(self._keeper.remove)
        patches.install()  # fairseq-train itself, where it was imported after this package
        self._optimizer = None
        self._first_epoch: Optional[int] = None
        self._told_of_shards = False
        self._updating = False
        if self.session.freezes_model:
            self.session.freeze()
        for pruner in pruners:
            logger.info("pruning with %s: %s", pruner.name, pruner.summary())

    def cut_for_checkpoint(self, model, recipe) -> None:
        """Give the model the shape of the compact checkpoint that it is about to load: gates go on what is left."""
        if self.session is not None:
            self.session.detach()
        take_shape(model, recipe)
        if self.session is not None:
            self._start_session(model, self.pruners())

    def take_beginning(self) -> None:
        """Tell the session whether a checkpoint was loaded; what methods plan depends on it."""
        assert self.session is not None
        self.session.starts_trained = self._keeper.loaded

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
            if self._first_epoch is None:
                # With --reset-optimizer fairseq goes on counting epochs but starts counting updates anew.
                self._first_epoch = kwargs.get("epoch", 1) if self._keeper.reset_optimizer else 1
            self.session.total_steps, self.session.steps_per_epoch = self._length(len(iterator))
        return iterator

    def _length(self, batches: int) -> tuple[Optional[int], int]:
        """Updates in training, None where nothing tells them, and in one epoch, for as many batches in each."""
        options, first = self.options, self._first_epoch
        assert first is not None
        whole, frequencies = (math.floor if options.skip_remainder_batch else math.ceil), list(options.update_freq)
        updates = [whole(batches / frequency) for frequency in frequencies]  # of epochs 1, 2, ..., then of the last
        limits = [options.max_update] if options.max_update else []
        if options.max_epoch and self.has_sharded_data(options.train_subset):
            if not limits and not self._told_of_shards:
                self._told_of_shards = True
                logger.warning(
                    "each epoch has one part of the data, so how many updates --max-epoch %d makes is not known; add "
                    "--max-update for schedules that need the length of training",
                    options.max_epoch,
                )
        elif options.max_epoch:
            epochs = range(first, max(options.max_epoch, first) + 1)
            limits.append(sum(updates[min(epoch, len(updates)) - 1] for epoch in epochs))
        return (int(min(limits)) if limits else None), updates[-1]

    def begin_epoch(self, epoch, model):
        """Refuse here what cannot work: an error during an update makes fairseq write a crash checkpoint."""
        super().begin_epoch(epoch, model)
        if self.session is None:
            return
        if self.session.freezes_model and not self._keeper.loaded:
            raise HeadPruningError(
                "Pipelined pruning trains the gates of a trained model, and no checkpoint was loaded; add "
                "--finetune-from-model FILE, or --joint-pruning to train the model too."
            )
        trained = next((pruner.name for pruner in self.session.pruners if pruner.needs_trained_model), None)
        if not self._keeper.loaded and trained is not None:
            raise HeadPruningError(
                f"{trained} goes on from a trained model, and no checkpoint was loaded; add --finetune-from-model or "
                "--restore-file."
            )
        self.take_beginning()
        self.session.settle()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside the block the model is what would be kept if training ended now; inner blocks change nothing."""
        if self.session is None or self._evaluating:
            yield
            return
        self._evaluating = True
        try:
            with self.session.evaluating():
                yield
        finally:
            self._evaluating = False

    def valid_step(self, sample, model, criterion, *args, **kwargs):
        """As the base task, with the masks on."""
        with self.evaluating():
            return super().valid_step(sample, model, criterion, *args, **kwargs)

    def train_step(self, sample, model, criterion, optimizer, update_num, ignore_grad=False, **kwargs):
        """One micro-batch; the first of an update draws the gates."""
        if self.session is None:
            return super().train_step(sample, model, criterion, optimizer, update_num, ignore_grad, **kwargs)
        self._watch(optimizer)
        if self._new_update:
            self._begin_update(optimizer, update_num)

        if self.session.changes_loss:
            criterion = _Objective(self, criterion)
        loss, sample_size, log = super().train_step(
            sample, model, criterion, optimizer, update_num, ignore_grad, **kwargs
        )
        if not ignore_grad:
            self._denominator = self._denominator + sample_size
            self._micro_batches += 1
        return loss, sample_size, log

    def token_masks(self, sample: Any) -> dict[str, torch.Tensor]:
        """``bool[B, T]`` of the tokens of a batch that are no padding, by ``encoder`` and ``decoder``."""
        pad, tokens = self.target_dictionary.pad(), sample["net_input"].get("src_tokens")
        if not torch.is_tensor(tokens) or tokens.is_floating_point():
            raise HeadPruningError(
                "Models are distilled, and attention is compared, in tasks that read tokens; the batches of "
                f"{self.options._name} hold none."
            )
        assert self.session is not None and self.session.unit_map is not None
        sides = {kind.partition("_")[0] for kind in self.session.unit_map.numbering("heads").kinds()}
        target = sample.get("target") if len(sides) == 2 else tokens
        found = {"encoder": tokens, "decoder": target}
        return {side: found[side].ne(pad) for side in sides if torch.is_tensor(found[side])}

    def _watch(self, optimizer) -> None:
        # The trainer tells no task where an update starts; it does clear the gradients then.
        if self._optimizer is optimizer:
            return
        assert self.session is not None
        session = self.session
        self._optimizer, self._new_update = optimizer, True
        session.master_of = master_of(optimizer)
        original = optimizer.zero_grad

        def zero_grad(*args, **kwargs):
            self._new_update = True
            if self._updating:  # an overflow, or the batch did not fit into memory
                session.skip_update()
                self._updating = False
            return original(*args, **kwargs)

        optimizer.zero_grad = zero_grad

    def _begin_update(self, optimizer, update_num: int) -> None:
        assert self.session is not None
        self.session.before_update(update_num)
        self._new_update, self._updating = False, True
        self._denominator, self._micro_batches = 0, 0
        scaler: Any = getattr(optimizer, "scaler", None)
        if isinstance(optimizer, AMPOptimizer):
            self._loss_scale = scaler.get_scale()
        else:
            self._loss_scale = getattr(scaler, "loss_scale", 1.0)

    def optimizer_step(self, optimizer, model, update_num) -> None:
        """The gates step beside the model's optimizer (which rests in pipelined pruning), weights are masked after."""
        if self.session is None:
            super().optimizer_step(optimizer, model, update_num)
            return
        self.session.after_backward(self._loss_scale, float(self._denominator), self._micro_batches)
        if self.session.overrides("before_step"):
            unscale(optimizer)
        self.session.before_step(optimizer, rests=True)
        if not self.session.freezes_model:
            super().optimizer_step(optimizer, model, update_num)
        elif getattr(optimizer, "scaler", None) is not None:
            optimizer.scaler.update()
        self._updating = False
        if isinstance(optimizer, AMPOptimizer) and optimizer.scaler.get_scale() < self._loss_scale:
            self.session.skip_update()  # an overflow: the model has not stepped, and fairseq tries the batch again
            return
        self.session.after_step()
        for name, value in self.session.metrics().items():
            if math.isfinite(value):  # a mask's numbers arrive from the device a little later
                metrics.log_scalar(name, value, weight=0, priority=650, round=_METRIC_ROUND.get(name, 4))


class _Objective:
    """A criterion that gives what the task's session makes of its loss."""

    def __init__(self, task: HeadPruningMixin, criterion: Any) -> None:
        self._task, self._criterion = task, criterion

    def __getattr__(self, name: str) -> Any:
        return getattr(self._criterion, name)

    def __call__(self, model: Any, sample: Any) -> tuple:
        loss, sample_size, log = self._criterion(model, sample)
        assert self._task.session is not None
        masks = self._task.token_masks(sample)
        # With --sentence-avg the loss is a sum over tokens all the same.
        terms = sample["ntokens"] if getattr(self._criterion, "sentence_avg", False) else sample_size
        return self._task.session.loss(loss, sample, masks=masks, weight=terms), sample_size, log


def _ranks() -> int:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return distributed_utils.get_world_size(distributed_utils.get_data_parallel_group())


def _all_reduce(tensor: torch.Tensor, op: str = "sum") -> None:
    distributed_utils.all_reduce(tensor, distributed_utils.get_data_parallel_group(), op)


def register_prunable(name: str) -> None:
    """Register ``NAME_head_pruning``: the task ``name`` with pruning of heads and weights.

    Its class, and its configuration where fairseq's task has one, are found in this module.
    """
    base, config = TASK_REGISTRY[name], TASK_DATACLASS_REGISTRY.get(name)
    stem = base.__name__.removesuffix("Task")
    if config is not None:
        config = globals()[f"{stem}HeadPruningConfig"] = pruning_config(config, f"{stem}HeadPruningConfig", __name__)
    body = {"__module__": __name__, "__doc__": f"``{name}`` with pruning of heads and weights."}
    task = type(f"{stem}HeadPruningTask", (HeadPruningMixin, base), body)
    globals()[task.__name__] = register_task(name + TASK_SUFFIX, dataclass=config)(task)


for _name in [name for name in TASK_REGISTRY if not name.endswith(TASK_SUFFIX)]:
    register_prunable(_name)
