"""The command line of run_michel."""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Optional, Sequence

from head_pruning import HeadPruningError
from head_pruning.options import MACS_PER_ROUND, require
from head_pruning.registry import option_fields

from .fields import GlueArguments, ModelArguments
from .old_flags import MICHEL_SPELLINGS, add_legacy_flags
from .parser import FlagParser, flag_group, require_positive, subset


@dataclass(frozen=True, kw_only=True)
class MichelArguments(ModelArguments):
    """What a command line of ``run_michel`` asks for."""

    task_name: str = field(metadata={"help": "GLUE task: CoLA, MRPC, MNLI, ... in any spelling"})
    data_dir: Optional[str] = field(
        default=None, metadata={"help": "the task's folder in GLUE's TSV layout; without it the hub's copy is loaded"}
    )
    output_dir: str = field(metadata={"help": "folder for the rounds, their masks and the pruned model"})
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "start anew and remove what an earlier run left in output_dir; without it a run of the same "
            "settings goes on after its last finished round, and a folder of other rounds or of a model is refused"
        },
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "tokenise again what is in the cache"})
    max_seq_length: int = field(default=128, metadata={"help": "cut examples to this many tokens"})
    batch_size: int = field(default=32, metadata={"help": "examples per batch, for importance and for scores"})
    data_subset: int = field(
        default=-1, metadata={"help": "score rounds on the first so many validation examples only; -1: all"}
    )
    max_train_samples: Optional[int] = field(
        default=None, metadata={"help": "measure importance on the first so many training examples only"}
    )
    metric_name: Optional[str] = field(
        default=None,
        metadata={"help": "metric that scores a round, such as f1, acc or mnli-mm/acc; default: the task's main one"},
    )
    seed: int = field(default=42, metadata={"help": "seed"})
    no_cuda: bool = field(default=False, metadata={"help": "run on the CPU", "aliases": ["--use_cpu"]})
    num_of_heads: int = field(default=12, metadata={"help": "heads (or units) to remove per round"})
    save_at: Optional[str] = field(
        default=None,
        metadata={
            "help": "numbers of heads, such as 72,36,18: the model of each is cut, trained on and saved in "
            "sizes/headsN; their heads are nested"
        },
    )
    finetune_updates: int = field(default=0, metadata={"help": "updates that each model of save_at is trained on"})
    finetune_learning_rate: float = field(default=2e-5, metadata={"help": "their learning rate, linear to 0"})
    macs_per_round: Optional[float] = field(
        default=None,
        metadata={
            "help": "share of the multiply-accumulates of all heads and units (at max_seq_length tokens) to remove "
            "per round, in the place of num_of_heads"
        },
    )
    exact_pruning: bool = field(default=False, metadata={"help": "measure the importance anew after every round"})
    prune_units: str = field(
        default="heads",
        metadata={"help": "what is removed: heads, ffn (the units of feed-forward blocks) or both, by one ranking"},
    )
    dont_normalize_importance_by_layer: bool = field(
        default=False, metadata={"help": "do not divide a layer's importance by its L2 norm"}
    )
    dont_normalize_global_importance: bool = field(
        default=False, metadata={"help": "do not scale importance to 0..1 (the ranking is the same)"}
    )
    per_example: bool = field(
        default=False,
        metadata={
            "help": "sum the absolute derivatives of single examples, as in the paper; without it those of batches, "
            "as the published code does"
        },
    )
    notes: list[str] = field(default_factory=list)

    @property
    def sizes(self) -> list[int]:
        """What ``save_at`` says."""
        return [] if self.save_at is None else [int(count) for count in self.save_at.split(",")]


def parse_michel(argv: Sequence[str]) -> MichelArguments:
    """Read a command line of ``run_michel``; ``argv`` may start with a JSON or YAML file.

    Raises:
        HeadPruningError: a flag is missing, unknown, or has an impossible value.
        SystemExit: ``--help``.
    """
    notes: list[str] = []
    fields = {f.name: f for f in dataclasses.fields(MichelArguments) if f.name != "notes"}
    model = [f.name for f in dataclasses.fields(ModelArguments)]
    pruning = list(fields)[list(fields).index("num_of_heads") :]
    groups = {
        "model": model,
        "data and run": [name for name in fields if name not in (*model, *pruning)],
        "pruning": pruning,
    }
    parser = FlagParser(
        "run_michel",
        [flag_group(title, [fields[name] for name in names]) for title, names in groups.items()],
        "Prune the heads of a fine-tuned model by their importance (Michel et al. 2019), without training.",
    )
    add_legacy_flags(parser, notes, MICHEL_SPELLINGS)
    given = parser.parse_set(argv)
    require_positive(given, "max_seq_length", "batch_size", "num_of_heads", "max_train_samples")
    if given.get("macs_per_round") is not None:
        require(SimpleNamespace(**given), *MACS_PER_ROUND)
        if "num_of_heads" in given:
            raise HeadPruningError("--num_of_heads and --macs_per_round both say what a round removes; give one.")
        if "save_at" in given:
            raise HeadPruningError("Rounds of --macs_per_round leave no counts for --save_at; give --num_of_heads.")
    if given.get("data_subset", -1) != -1:
        require_positive(given, "data_subset")
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", given.get("save_at") or "1"):
        raise HeadPruningError(f"--save_at {given['save_at']} is no list of counts; write it as 72,36,18.")
    if given.get("finetune_updates", 0) < 0 or not 0 < given.get("finetune_learning_rate", 1) < math.inf:
        raise HeadPruningError("--finetune_updates must be 0 or more, --finetune_learning_rate above 0; correct them.")
    if "save_at" not in given and "finetune_updates" in given:
        raise HeadPruningError("--finetune_updates trains the models of --save_at; add the one or drop the other.")
    return MichelArguments(**subset(given, fields.values()), notes=notes)


def michel_only() -> set[str]:
    """The flags that no other script has; without --batch_size, by which others mean one of transformers' own."""
    shared = {f.name for kind in (ModelArguments, GlueArguments) for f in dataclasses.fields(kind)}
    return {f.name for f in dataclasses.fields(MichelArguments)} - shared - {*option_fields(), "batch_size", "notes"}
