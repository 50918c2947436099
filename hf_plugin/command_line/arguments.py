"""The command lines of the scripts that train: parse, choose, complete, check, build."""

import dataclasses
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Mapping, Optional, Sequence

from transformers import TrainingArguments

from head_pruning import HeadPruningError, Pruner, build_pruner, choose_methods
from head_pruning.errors import one_line
from head_pruning.registry import Method

from ..training.optimizers import OPTIMIZERS
from .defaults import complete_options
from .fields import SHARED, DataArguments, ModelArguments
from .groups import build_parser
from .old_flags import add_legacy_flags, mend_names
from .parser import require_positive, subset
from .presets import add_preset
from .scripts import SCRIPTS, Script


@dataclass(frozen=True)
class Arguments:
    """What a command line asks for.

    Args:
        model: the model to start from.
        data: the task, and what the script writes, as the script's :class:`Script` says.
        training: transformers' own.
        pruners: of the methods that were chosen, their options checked; empty to train the dense model.
        notes: one line for each old spelling that was used, to be logged.
        optimizer: ``adamw`` (what ``training.optim`` says) or ``adamax``.
    """

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    pruners: list[Pruner]
    notes: list[str]
    optimizer: str = OPTIMIZERS[0]

    def of(self, kind: str) -> Optional[Pruner]:
        """The first pruner of a kind of ``head_pruning.registry.KINDS``; None when there is none."""
        return next((pruner for pruner in self.pruners if pruner.kind == kind), None)


def parse(argv: Sequence[str], script: str) -> Arguments:
    """Read a command line; ``argv`` may start with a JSON or YAML file of flags' names and values.

    Args:
        argv: the words after the script's name.
        script: ``run_dsp`` (DSP or STE), ``run_voita``, ``run_glue``, ``run_squad``, ``run_ner`` or ``run_swag``
            (any method, or none).

    Raises:
        HeadPruningError: a flag is missing, unknown, has an impossible value, belongs to another method or contradicts
            another flag.
        SystemExit: ``--help``.
    """
    about, notes = SCRIPTS[script], list[str]()
    given = _read(argv, about, notes)
    chosen = _choose(given, about)
    training, options = _complete(given, chosen, about, notes)
    _check(given, chosen, about)
    return _build(given, chosen, training, options, about, notes)


def _read(argv: Sequence[str], script: Script, notes: list[str]) -> dict[str, Any]:
    """The flags that were set, by their names of today; what was read otherwise adds to ``notes``."""
    parser = build_parser(script)
    add_legacy_flags(parser, notes, script.spellings)
    given = parser.parse_set(argv)
    mend_names(given, notes)
    add_preset(given, notes, script.name)
    if given.get("debug") == []:
        del given["debug"]
        notes.append("--debug without a value is ignored: it printed figures of TPUs.")
    script.complete(given, notes)
    return given


def _choose(given: Mapping[str, Any], script: Script) -> list[Method]:
    """The methods of all kinds; a flag that is transformers' too belongs to no method alone."""
    return choose_methods({flag: value for flag, value in given.items() if flag not in SHARED}, line=script.line)


def _complete(
    given: Mapping[str, Any], chosen: Sequence[Method], script: Script, notes: list[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What transformers is given, and all options of each chosen method."""
    training = {**script.training_defaults, **subset(given, dataclasses.fields(TrainingArguments))}
    ratio = training.pop("warmup_ratio", None) or given.get("warmup_ratio")  # a field of transformers 5.0 too
    for shared, ours in SHARED.items():
        training[shared] = given.get(ours) or (not _owner(shared, chosen) and given.get(shared)) or ratio or 0
    options = []
    for method in chosen:
        own = script.defaults if method.name in script.methods else {}
        options.append(complete_options(method.name, {**own, **subset(given, method.options.values())}))
        notes += [
            f"--{shared} ({options[-1][shared]:g}) is that of the pruner {method.name}; the learning rate's is "
            f"--{ours} ({training[shared]:g})."
            for shared, ours in SHARED.items()
            if shared in method.options
        ]
    return training, options


def _check(given: Mapping[str, Any], chosen: Sequence[Method], script: Script) -> None:
    """Raise HeadPruningError for flags that contradict each other, or that do nothing."""
    require_positive(given, *script.sizes, "max_train_samples", "max_eval_samples")
    if given.get("intermediate_masks") and not any(method.kind == "heads" for method in chosen):
        raise HeadPruningError("--intermediate_masks saves head masks, but no pruner is chosen; drop it or prune.")
    if any(method.kind == "weights" for method in chosen):
        from ..training.sharding import refuse_deepspeed

        refuse_deepspeed(given.get("deepspeed"))
    if given.get("optimizer", OPTIMIZERS[0]) != OPTIMIZERS[0] and given.get("optim") is not None:
        raise HeadPruningError(
            f"--optimizer {given['optimizer']} and --optim {given['optim']} are two optimizers; drop one of them."
        )
    for shared, ours in SHARED.items():
        if given.get(shared) and _owner(shared, chosen) is None:
            _check_shared(given, shared, ours, chosen, script)


def _check_shared(given: Mapping[str, Any], shared: str, ours: str, chosen: Sequence[Method], script: Script) -> None:
    """Raise HeadPruningError where a flag that no chosen method takes cannot be transformers'."""
    if script.own_warmup:
        weights = next((method.name for method in chosen if method.kind == "weights"), None)
        reason = f"{weights} has none" if weights else "no pruner of weights is chosen"
        raise HeadPruningError(
            f"--{shared} is the weight pruner's warm-up in {script.name}.py, but {reason}; give the learning rate's "
            f"as --{ours}."
        )
    if given.get(ours) not in (None, given[shared]):
        raise HeadPruningError(
            f"--{shared} {given[shared]:g} and --{ours} {given[ours]:g} are both the learning rate's warm-up, as the "
            "pruner has none; drop one of them."
        )


def _build(
    given: Mapping[str, Any],
    chosen: Sequence[Method],
    training: Mapping[str, Any],
    options: Sequence[Mapping[str, Any]],
    script: Script,
    notes: list[str],
) -> Arguments:
    pruners = [build_pruner(method, SimpleNamespace(**own)) for method, own in zip(chosen, options)]
    arguments = Arguments(
        model=ModelArguments(**subset(given, dataclasses.fields(ModelArguments))),
        data=script.data(**subset(given, dataclasses.fields(script.data))),
        training=_training_arguments(training),
        pruners=pruners,
        notes=notes,
        optimizer=given.get("optimizer", OPTIMIZERS[0]),
    )
    for pruner in pruners:
        pruner.check_options()
    return arguments


def _owner(option: str, chosen: Sequence[Method]) -> Optional[Method]:
    return next((method for method in chosen if option in method.options), None)


def _training_arguments(values: Mapping[str, Any]) -> TrainingArguments:
    try:
        training = TrainingArguments(**values)
    except (ValueError, TypeError, ImportError, NotImplementedError, OSError) as error:
        reason = one_line(error).rstrip(".")
        raise HeadPruningError(f"The training flags do not fit: {reason}.") from error
    if training.fsdp and not training.fsdp_config.get("xla") and training.world_size <= 1:
        raise HeadPruningError(
            "--fsdp splits the model over processes, but there is one; start several with torchrun, or drop it."
        )
    return training
