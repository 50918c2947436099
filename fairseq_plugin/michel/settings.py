"""What a run of ``run_michel`` may be asked for, and what its rounds depend on."""

import dataclasses
import os
from types import SimpleNamespace
from typing import Any, Iterable, Optional

from fairseq.dataclass.configs import CommonConfig, DatasetConfig, GenerationConfig
from fairseq.registry import REGISTRIES
from omegaconf import DictConfig, OmegaConf

from head_pruning import HeadPruningError, UnitMap
from head_pruning.importance.michel import round_sizes
from head_pruning.importance.rounds import fingerprint
from head_pruning.options import MACS_PER_ROUND, require

from ..options import pruners_to_decode

SCORE_BEAM = 5

# How the command line spells settings whose names in a file of rounds are others.
_SPELLED = {
    "checkpoint": "--restore-file",
    "data": "data folder",
    "test": "--gen-subset",
    "lengths": "--max-len-a, --max-len-b",
    "batches": "--batch-size, --max-tokens",
    "heads_per_round": "--num-of-heads",
    "exact": "--exact-pruning",
    "signed": "--signed-importance",
}
# Those of fairseq's generation that are settings under the names above, and those that change nothing that is scored.
_NOT_OF_GENERATION = ("beam", "max_len_a", "max_len_b", "print_step", "print_alignment", "no_beamable_mm")


def settings(cfg: DictConfig, args: Any, score_at: Iterable[int]) -> dict[str, Any]:
    """What the rounds of a run depend on; rounds of other settings are not gone on with.

    Options that have their default are left out, but for the oldest ones: files may be older than a setting.
    """
    found = {
        "checkpoint": fingerprint(cfg.checkpoint.restore_file),
        "data": os.path.abspath(cfg.task.data),
        "test": cfg.dataset.gen_subset,
        "remove_bpe": cfg.common_eval.post_process,
        "lengths": [cfg.generation.max_len_a, cfg.generation.max_len_b],
        "batches": [cfg.dataset.batch_size, cfg.dataset.max_tokens],
        "heads_per_round": args.num_of_heads,
        "exact": args.exact_pruning,
        "signed": args.signed_importance,
        "importance_sentences": args.importance_sentences or args.subset,
        "score_sentences": args.score_sentences or args.subset,
        "beam": cfg.generation.beam,
        "score_at": sorted(score_at),
    }
    scoring = REGISTRIES["scoring"]["dataclass_registry"].get(cfg.scoring._name)
    found |= _changed(cfg.common, CommonConfig, ("seed", "fp16"))
    found |= _changed(cfg.dataset, DatasetConfig, ("train_subset",))
    found |= _changed(cfg.generation, GenerationConfig, _names(GenerationConfig, _NOT_OF_GENERATION))
    if scoring is not None:
        found |= _changed(cfg.scoring, scoring, _names(scoring))
    if cfg.scoring._name != REGISTRIES["scoring"]["default"]:
        found["scoring"] = cfg.scoring._name
    if args.prune_units != "heads":
        found["prune_units"] = args.prune_units
    if args.macs_per_round is not None:
        found |= {"macs_per_round": args.macs_per_round, "macs_length": args.macs_length}
    if cfg.dataset.required_batch_size_multiple != 1:
        found["required_batch_size_multiple"] = cfg.dataset.required_batch_size_multiple
    if score_at and args.score_beam != SCORE_BEAM:
        found["score_beam"] = args.score_beam
    return found


def _names(config: type, without: Iterable[str] = ()) -> list[str]:
    return [field.name for field in dataclasses.fields(config) if field.name not in ("_name", *without)]


def _changed(cfg: DictConfig, config: type, names: Iterable[str]) -> dict[str, Any]:
    """The options among ``names`` that have other values than ``config``, their dataclass, gives them."""
    values: Any = OmegaConf.to_container(cfg, enum_to_str=True)
    return {name: values[name] for name in names if name in values and values[name] != getattr(config, name)}


def flags() -> dict[str, str]:
    """How the command line spells the settings of any run."""
    names = ["remove_bpe", "importance_sentences", "score_sentences", "score_at", "score_beam", "train_subset"]
    names += ["prune_units", "macs_per_round", "macs_length", "required_batch_size_multiple"]
    for config in (GenerationConfig, *REGISTRIES["scoring"]["dataclass_registry"].values()):
        names += _names(config)
    return {name: _flag(name) for name in names} | _SPELLED


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


#: Options of this command that methods have too.
_SHARED = ("num_of_heads", "prune_units", "macs_length")


def refuse_pruners(args: Any) -> None:
    """Raise HeadPruningError when a task's options ask for another method, or for heads to be gone before."""
    own = {name: value for name, value in vars(args).items() if name not in _SHARED}
    if pruners_to_decode(SimpleNamespace(**own)):
        raise HeadPruningError("--head-mask-file removes heads before the first round; leave it out.")


def check_counts(args: Any) -> None:
    """Raise HeadPruningError when a count that is given is below 1."""
    for name in ("importance_sentences", "score_sentences", "subset", "beam", "score_beam"):
        value = getattr(args, name)
        if value is not None and value < 1:
            rest = "" if "beam" in name else ", or leave it out for all sentences"
            raise HeadPruningError(f"{_flag(name)} is {value}; give 1 or more{rest}.")
    if args.macs_length < 1:
        raise HeadPruningError(f"--macs-length is {args.macs_length}; give 1 or more.")
    if args.macs_per_round is not None:
        require(args, *MACS_PER_ROUND)
        if args.score_at:
            raise HeadPruningError(
                "--score-at names numbers of heads, which rounds of --macs-per-round do not aim at."
            )


def read_score_at(given: Optional[str]) -> set[int]:
    """The head counts of ``--score-at``. Raises HeadPruningError when they are no numbers."""
    try:
        return {int(count) for count in (given or "").split(",") if count}
    except ValueError:
        raise HeadPruningError(f"--score-at is {given}; give head counts such as 18,9,4.") from None


def check_score_at(score_at: Iterable[int], unit_map: UnitMap, heads_per_round: int) -> None:
    """Raise HeadPruningError when ``--num-of-heads`` is not possible, or no round leaves a count of ``--score-at``."""
    sizes = round_sizes(unit_map, heads_per_round)
    missed = sorted(set(score_at).difference(sizes), reverse=True)
    if missed:
        shown = [*map(str, sizes)] if len(sizes) <= 12 else [*map(str, sizes[:10]), "..., 0"]
        raise HeadPruningError(
            f"--score-at names {', '.join(map(str, missed))}, but no round leaves so many heads; with --num-of-heads "
            f"{heads_per_round} give some of {', '.join(shown)}."
        )
