"""Every change that the plugin makes to fairseq itself, and to torch and Python for its sake.

Each patch is a function that is called in the place of another, which it gets as its first argument.
"""

import argparse
import collections
import contextlib
import functools
import inspect
import logging
import math
import re
import shutil
import sys
import types
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np
import omegaconf
import torch
from fairseq import checkpoint_utils, options
from fairseq.data import data_utils, language_pair_dataset, token_block_dataset
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.models import BaseFairseqModel
from fairseq.models.multilingual_transformer import MultilingualTransformerModel
from fairseq.modules import dynamic_crf_layer
from fairseq.tasks import TASK_REGISTRY
from fairseq.trainer import Trainer

from head_pruning import HeadPruningError
from head_pruning.files import atomic_path, take_folder, writing
from head_pruning.finite import all_finite
from head_pruning.surgery.remaining import recipe_of

from .checkpoints.keeper import (
    StateKeeper,
    check_weights,
    keep_heads,
    keeper_of,
    refuse_late_start,
    warn_of_alignments,
)
from .checkpoints.reports import reported, write_beside
from .checkpoints.stored import (
    KEY,
    META,
    NUMBERS,
    PruningState,
    norms_of,
    peek,
    reading,
    split_state,
    stored_task,
    take_numbers,
)
from .checkpoints.weights import finish, mask_weights
from .masters import carry_over
from .modules.surgery import take_shape
from .options import TASK_SUFFIX, all_flags, pruners_to_decode, refuse_other_options, second_flags
from .schedules import linear_warmup, restart_schedule
from .sizes import save_last_size, save_size, watch_sizes

logger = logging.getLogger(__name__)
_MARK = "of_head_pruning"
_ASIDE = "_head_pruning_state"
# What rank 0 sends the others: a checkpoint with its configuration. Files may not hold it.
_BETWEEN_RANKS = [
    *(Any, bool, dict, float, int, list, str, collections.defaultdict),
    *(omegaconf.DictConfig, omegaconf.ListConfig, omegaconf.nodes.AnyNode),
    *(omegaconf.base.ContainerMetadata, omegaconf.base.Metadata),
    distributed_utils._TensorPlaceholder,
]
# What fairseq says of them, with one rank, with a loss scaler, and with several ranks.
_NOT_FINITE = re.compile(r"Nan/Inf|Minimum loss scale|= +-?(nan|inf)")
_BROKEN = (
    "The loss or its gradient is not finite after {} updates; lower --lr, clip with --clip-norm, or go on from the "
    "last checkpoint with bf16 in place of fp16."
)
_TRAINERS = ("fairseq_cli.train", "__main__")  # whichever fairseq-train was started as
_validated_at_target = True
_decoding = False


def install() -> None:
    """Apply every patch, once per process; called again, only what fairseq has imported since."""
    allow_safe_globals()
    give_old_numpy()
    _replace(sys, "excepthook", print_sentence)
    _replace(distributed_utils, "_broadcast_object_slow", read_configurations)
    _replace(options, "add_dataset_args", decode_all_sentences)
    _replace(options, "parse_args_and_arch", find_task)
    _replace(checkpoint_utils, "load_checkpoint_to_cpu", read_checkpoint)
    _replace(checkpoint_utils, "load_model_ensemble_and_task", load_to_decode)
    _replace(checkpoint_utils, "verify_checkpoint_directory", take_save_dir)
    _replace(checkpoint_utils, "torch_persistent_save", save_whole)
    _replace(PathManager, "copy", copy_whole)
    _replace(checkpoint_utils, "save_checkpoint", save_with_reports)
    _replace(checkpoint_utils, "load_checkpoint", report_what_was_saved)
    _replace(BaseFairseqModel, "load_state_dict", load_pruned_model)
    _replace(MultilingualTransformerModel, "load_state_dict", load_pruned_languages)
    _replace(Trainer, "load_checkpoint", load_pruned_training)
    _replace(Trainer, "state_dict", state_with_weights)
    _replace(Trainer, "save_checkpoint", end_without_crash_file)
    _replace(Trainer, "_build_optimizer", build_for_phase)
    _replace(Trainer, "train_step", begin_phase)
    for name in _TRAINERS:
        module = sys.modules.get(name)
        if hasattr(module, "should_stop_early") and hasattr(module, "validate"):
            _replace(module, "validate", validate_masked)
            _replace(module, "should_stop_early", stop_at_target)
            _replace(module, "train", stop_at_end)


def _replace(owner: Any, name: str, patch: Callable) -> None:
    """Call ``patch(original, ...)`` wherever ``owner.name(...)`` is called."""
    original = getattr(owner, name)
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def patched(*args, **kwargs):
        return patch(original, *args, **kwargs)

    setattr(patched, _MARK, True)
    setattr(owner, name, patched)


def allow_safe_globals() -> None:
    """Let torch's weights-only loading read what fairseq puts into checkpoints: a Namespace and numpy numbers."""
    multiarray: Any = np._core.multiarray  # type: ignore[attr-defined]  # where pickles of today look for them
    torch.serialization.add_safe_globals(
        [
            argparse.Namespace,
            np.dtype,
            np.ndarray,
            (multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
            (multiarray.scalar, "numpy.core.multiarray.scalar"),
            multiarray._reconstruct,
            multiarray.scalar,
            *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "u1", "?")),
        ]
    )


class _OldNumpy(types.ModuleType):
    """numpy, with what fairseq asks of versions before 1.24 and 2.0."""

    int, float, compat = int, float, types.SimpleNamespace(long=int)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def percentile(*args, interpolation="linear", **kwargs):
        return np.percentile(*args, method=interpolation, **kwargs)


def give_old_numpy() -> None:
    """Let the modules of fairseq that need it see an older numpy; all others see the one that is installed."""
    for module in (data_utils, language_pair_dataset, token_block_dataset, dynamic_crf_layer):
        module.np = _OldNumpy("numpy")


def sentence_of(error: Optional[BaseException]) -> Optional[str]:
    """The sentence of the first HeadPruningError in the chain of causes (fairseq wraps errors of loading)."""
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, HeadPruningError):
            return str(error)
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def print_sentence(original, kind, error, traceback) -> None:
    """A user's mistake ends fairseq's commands with one sentence; the exit status stays non-zero."""
    sentence = sentence_of(error)
    if sentence is None:
        original(kind, error, traceback)
    else:
        print(f"error: {sentence}", file=sys.stderr)


def decode_all_sentences(original, parser, train=False, gen=False):
    """What decodes or scores a test set leaves none of its sentences out, unless it is told to."""
    group = original(parser, train, gen)
    if gen:  # fairseq's default is 8, and it drops a last batch that is no multiple of it
        parser.set_defaults(required_batch_size_multiple=1)
    return group


def find_task(original, parser, input_args=None, *args, **kwargs):
    """fairseq-validate, which has no task of its own, takes that of the checkpoint; see also ``name_the_task``."""
    if "--task" in parser._option_string_actions and parser.get_default("task") is None:
        line = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        line.add_argument("--path")
        task = stored_task(peek(line.parse_known_args(input_args)[0].path or ""))
        parser.set_defaults(task=task if task in TASK_REGISTRY else "translation")
    parser.error = functools.partial(name_the_task, parser.error, parser, input_args)
    return original(parser, input_args, *args, **kwargs)


def read_configurations(original, *args, **kwargs):
    """Ranks read what rank 0 sends them."""
    with torch.serialization.safe_globals(_BETWEEN_RANKS):
        return original(*args, **kwargs)


def read_checkpoint(original, path, *args, **kwargs):
    """Files that are damaged are named; what does not train on gets weights that are masked, as they are exported."""
    with reading(path):
        state = original(path, *args, **kwargs)
        PruningState.of(state)
        if _decoding:
            mask_weights(state)
    return state


def load_to_decode(original, filenames, arg_overrides=None, task=None, *args, **kwargs):
    """Whatever runs stored models masks their weights, and takes no option of pruning but a mask for dense ones."""
    global _decoding
    typed = task.options if getattr(task, "decodes", False) else types.SimpleNamespace(**(arg_overrides or {}))
    pruners = pruners_to_decode(typed)
    before, _decoding = _decoding, True
    try:
        models, cfg, task = original(filenames, arg_overrides, task, *args, **kwargs)
    except OSError as error:
        if "Model file not found" not in str(error):
            raise
        path = str(error).rpartition("Model file not found: ")[2]
        raise HeadPruningError(f"There is no checkpoint {path}; check the path.") from error
    finally:
        _decoding = before
    for model in models:
        if pruners:
            keep_heads(model, pruners)
        warn_of_alignments(model)
    return models, cfg, task


def load_pruned_model(original, self, state_dict, *args, **kwargs):
    """Every model loads pruned and compact checkpoints: it takes their shape, and their heads stay pruned."""
    state_dict = {**state_dict, **self.__dict__.pop(_ASIDE, {})}
    own, keeper = split_state(state_dict)[0], keeper_of(self)
    if keeper is not None and keeper.model is not self:  # a copy of the model: its gates stay what they are
        return original(self, own, *args, **kwargs)
    stored = PruningState.of({"model": state_dict})
    if stored.recipe != recipe_of(self):
        if keeper is not None:
            if keeper.session is not None:
                raise HeadPruningError(
                    "The checkpoint is compact and the gates are on a model that is not; load it with "
                    "--restore-file or --finetune-from-model, or cut the model before its session is opened."
                )
            keeper.let_go()
        take_shape(self, stored.recipe)
    if keeper is None and (stored.heads or stored.recipe is not None):
        keeper = StateKeeper(self)
    if keeper is not None:
        keeper.check(stored)
    result = original(self, own, *args, **kwargs)
    if keeper is not None:
        keeper.restore(stored)
    return result


def load_pruned_languages(original, self, state_dict, *args, **kwargs):
    """A model of several languages wants nothing in its checkpoints but languages; the rest goes past it."""
    own, self.__dict__[_ASIDE] = split_state(state_dict)
    return original(self, own, *args, **kwargs)


def load_pruned_training(original, self, filename, *args, **kwargs):
    """The trainer goes on from pruned and compact checkpoints with the pruners, and the options, that made them."""
    # Before the data-parallel wrapper and the optimizer see the parameters.
    checkpoint, model, task = peek(filename), self.get_model(), self.task
    stored, keeper = PruningState.of(checkpoint), keeper_of(model)
    reset = keeper.reset_optimizer if keeper is not None else bool(args[0] if args else kwargs.get("reset_optimizer"))
    session = getattr(task, "session", None)
    if session is not None and not reset and (META in stored.heads or stored.weights):
        names = stored.description()["pruners"] if META in stored.heads else stored.weight_pruners()
        theirs = (checkpoint.get("cfg") or {}).get("task") or {}
        theirs = vars(theirs) if isinstance(theirs, argparse.Namespace) else theirs  # of fairseq's old kind of task
        refuse_other_options(str(filename), names, theirs, task.options)
    check_weights(session, stored, reset=reset, prunes=hasattr(type(task), "session"))
    if session is not None and not reset:
        stored.weight_masks(checkpoint.get("model") or {})  # which are those of its weights
    if stored.recipe is not None and stored.recipe != recipe_of(model):
        getattr(task, "cut_for_checkpoint", take_shape)(model, stored.recipe)
        self.reinitialize()
        session, keeper = getattr(task, "session", None), keeper_of(model)  # new ones
    if keeper is not None:
        keeper.coming = stored.weights
    history = checkpoint.get("optimizer_history") or [{}]
    # A run that starts anew gets its optimizer here, before its data say how long training is.
    late = reset and session is not None and session.steers_host
    self.head_pruning_built_for = None if late else 0 if reset else max(0, history[-1].get("num_updates", 0) - 1)
    extra_state = original(self, filename, *args, **kwargs)
    if extra_state is not None:
        extra_state.pop(KEY, None)
        self.head_pruning_numbers = take_numbers(extra_state)
        if session is not None and not reset and self.get_num_updates():
            refuse_late_start(session, str(filename), stored)
    return extra_state


def state_with_weights(original, self):
    """The trainer's checkpoints keep the state of weight pruners, and the numbers that are reported on them."""
    state, keeper = original(self), keeper_of(self.get_model())
    if getattr(self.task, "session", None) is not None:
        state["extra_state"][NUMBERS] = self.task.session.metrics()
    of_weights = {} if keeper is None else keeper.of_weights(resumable=not self.cfg.checkpoint.no_save_optimizer_state)
    if of_weights:
        saved = [state["model"], *filter(None, [state["extra_state"].get("ema")])]
        names = list(of_weights["masks"])
        norms = zip(*(norms_of([weights[name] for name in names]) for weights in saved))
        state["extra_state"][KEY] = {**of_weights, "norms": dict(zip(names, map(list, norms)))}
    return state


def end_without_crash_file(original, self, filename, extra_state):
    """Losses that are not finite, and mistakes of a user, end training with a sentence, not with a crash.pt."""
    error = sys.exc_info()[1]
    if getattr(self.task, "session", None) is None or error is None or Path(filename).name != "crash.pt":
        return original(self, filename, extra_state)
    if sentence_of(error) is not None:
        return None  # fairseq raises it again
    if isinstance(error, FloatingPointError) and _NOT_FINITE.search(str(error)):
        raise HeadPruningError(_BROKEN.format(self.get_num_updates())) from error
    return original(self, filename, extra_state)


def build_for_phase(original, self):
    """Pruners that train in phases settle what is trained before the trainer builds its optimizer for it."""
    session = getattr(self.task, "session", None)
    if session is None or not session.steers_host:
        return original(self)
    step = getattr(self, "head_pruning_built_for", 0)
    session.warmup_steps = linear_warmup(self.cfg)
    self.task.take_beginning()  # the first epoch is too late: the phases are planned here
    if step is None:  # that of the first update; begin_phase() makes up for the schedule
        return original(self)
    session.enter_phase(step)
    original(self)
    restart_schedule(self, *session.schedule_span(step))


def begin_phase(original, self, *args, **kwargs):
    """Where a phase begins the trainer builds its learning-rate schedule, and mostly its optimizer, anew."""
    session, step = getattr(self.task, "session", None), self.get_num_updates()
    if session is not None:
        save_size(self, step)
    entered = session is not None and session.enter_phase(step)
    if session is not None and (entered or getattr(self, "head_pruning_built_for", 0) is None):
        old, self.head_pruning_built_for = self.optimizer, step
        if session.keeps_optimizer or not entered:
            restart_schedule(self, *session.schedule_span(step))
        else:
            self.reinitialize()
            carry_over(old, self.optimizer)
        self.lr_step_update()
    return original(self, *args, **kwargs)


def take_save_dir(original, save_dir):
    """The folder of a run can be written, and is its own until the process ends."""
    with writing(save_dir):
        original(save_dir)
    take_folder(save_dir)


def save_whole(original, obj, filename, async_write=False):
    """Checkpoints appear whole, or a sentence says why not and the one before stays."""
    if async_write or PathManager.path_requires_pathmanager(str(filename)):
        return original(obj, filename, async_write)
    with atomic_path(filename) as temporary, temporary.open("wb") as file:  # a path would get into the file
        torch.save(obj, file)


def copy_whole(original, source, target, overwrite=False):
    """So do copies of them."""
    if any(map(PathManager.path_requires_pathmanager, (str(source), str(target)))):
        return original(source, target, overwrite)
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)
    return True


def save_with_reports(original, cfg, trainer, epoch_itr, val_loss):
    """No best checkpoint before the target, and the mask beside every checkpoint."""
    session = getattr(trainer.task, "session", None)
    if session is None:
        return original(cfg, trainer, epoch_itr, val_loss)
    if val_loss is not None and not session.at_target():
        logger.info("not a candidate for checkpoint_best: pruning has not reached its target yet")
        val_loss = None
    if not all_finite(trainer.get_model()):  # before older checkpoints make room for this one
        raise HeadPruningError(_BROKEN.format(trainer.get_num_updates()))
    last = _is_over(trainer, epoch_itr)
    if last:  # updates that overflowed make fewer than were planned
        finish(session)
    saved = original(cfg, trainer, epoch_itr, val_loss)
    if not cfg.no_save and trainer.data_parallel_rank == 0:
        write_beside(cfg.save_dir, trainer, log_heads=last or epoch_itr.end_of_epoch())
    return saved


def report_what_was_saved(original, cfg, trainer, **options):
    """A run that was killed between a checkpoint and the reports on it has left none."""
    _forget_the_run_before()
    loaded, session = original(cfg, trainer, **options), getattr(trainer.task, "session", None)
    if session is not None:
        _refuse_no_epochs(cfg, trainer, loaded[1])
    updates, own = trainer.get_num_updates(), cfg.restore_file == "checkpoint_last.pt"
    over = session is not None and _is_over(trainer, loaded[1])
    if session is not None and updates and (over or own):
        if not cfg.no_save and trainer.data_parallel_rank == 0 and not reported(cfg.save_dir, session, updates):
            write_beside(cfg.save_dir, trainer, log_heads=over, numbers=trainer.head_pruning_numbers)
    return loaded


def _forget_the_run_before():
    """Of jobs one after another in one process (Hydra's multirun) each has a best score and a patience of its own."""
    global _validated_at_target
    _validated_at_target = True
    stopping = [getattr(sys.modules.get(name), "should_stop_early", None) for name in _TRAINERS]
    for function in filter(None, (checkpoint_utils.save_checkpoint, *stopping)):
        for name in ("best", "num_runs"):  # fairseq keeps them as attributes of these functions
            vars(function).pop(name, None)


def _after_last_epoch(trainer, epoch_itr):
    return epoch_itr.next_epoch_idx > (trainer.cfg.optimization.max_epoch or math.inf)


def _is_over(trainer, epoch_itr):
    """Whether training has made its last update."""
    updates, planned = trainer.get_num_updates(), trainer.task.session.total_steps or math.inf
    return updates >= planned or _after_last_epoch(trainer, epoch_itr)


def _refuse_no_epochs(cfg, trainer, epoch_itr):
    """Raise when a run begins anew after its last epoch: fairseq would train nothing, and not say so."""
    own = cfg.restore_file == "checkpoint_last.pt"
    # A run of this folder that is over has nothing left to train, also where its checkpoints keep no optimizer.
    begins = not trainer.get_num_updates() and (cfg.reset_optimizer or not own)
    if begins and _after_last_epoch(trainer, epoch_itr):
        file = "FILE" if own else cfg.restore_file
        raise HeadPruningError(
            f"--max-epoch is {trainer.cfg.optimization.max_epoch}, and the run goes on from epoch "
            f"{epoch_itr.next_epoch_idx} of the checkpoint, so nothing would be trained; start with "
            f"--finetune-from-model {file} and a --save-dir of its own in the place of --restore-file and "
            "--reset-optimizer, or add --reset-dataloader."
        )


def stop_at_end(original, cfg, trainer, task, epoch_itr):
    """A run that is resumed at its end stays as it is; fairseq would train one update more before it looks.

    At the end of any other the last of its smaller models is saved.
    """
    prunes = getattr(task, "session", None) is not None
    if prunes:
        subsets, validate = cfg.dataset.valid_subset.split(","), inspect.unwrap(original).__globals__["validate"]
        watch_sizes(trainer, epoch_itr, lambda: validate(cfg, trainer, task, epoch_itr, subsets)[0])
    updates, hours = trainer.get_num_updates(), trainer.cumulative_training_time() / 3600
    if updates >= (cfg.optimization.max_update or math.inf) or 0 < cfg.optimization.stop_time_hours < hours:
        logger.info("training was over after %d updates; nothing is trained", updates)
        found: tuple = [None], True
    else:
        found = original(cfg, trainer, task, epoch_itr)
    if prunes and (found[1] or _after_last_epoch(trainer, epoch_itr)):
        save_last_size(trainer)
    return found


def validate_masked(original, cfg, trainer, task, *args, **kwargs):
    """fairseq-train validates the masked model."""
    global _validated_at_target
    session = getattr(task, "session", None)
    _validated_at_target = session is None or session.at_target()
    # Here, not batch by batch: masking and taking back is work for every weight.
    with getattr(task, "evaluating", contextlib.nullcontext)():
        return original(cfg, trainer, task, *args, **kwargs)


def stop_at_target(original, cfg, valid_loss):
    """``--patience`` counts validations only once the run is at its target."""
    return _validated_at_target and original(cfg, valid_loss)


def name_the_task(original, parser, input_args, message):
    """Where options of pruning go to a task that does not prune, fairseq-train says which task has them."""
    _, unknown, words = message.partition("unrecognized arguments:")
    ours = [word for word in words.split() if word.partition("=")[0] in all_flags()]
    task = parser.parse_known_args(input_args)[0].task if ours else TASK_SUFFIX
    if unknown and not task.endswith(TASK_SUFFIX) and "--max-update" in parser._option_string_actions:
        raise HeadPruningError(
            f"{' and '.join(ours)} are options of tasks that prune; use --task {task}{TASK_SUFFIX} in place of {task}."
        )
    original(message)


def share_second_flags(add_args: Callable, parser: Any) -> None:
    """Call ``add_args(parser)``, and let whatever fairseq adds later have the second flags of what was added."""
    add_args(parser)
    optional = getattr(parser, "_optionals", parser)  # the group that a parser's own flags are in
    optional._check_conflict = functools.partial(_give_way, optional._check_conflict, parser)


def _give_way(original, parser: Any, action: Any) -> None:
    for flag, dest in second_flags().items():
        mine = parser._option_string_actions.get(flag)
        if flag in action.option_strings and mine is not None and mine.dest == dest != action.dest:
            mine.option_strings.remove(flag)
            del parser._option_string_actions[flag]
    original(action)
