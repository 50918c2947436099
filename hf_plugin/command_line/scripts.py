"""The scripts that train: what their command lines have in common, and where they differ."""

from dataclasses import dataclass, field
from typing import Any, Callable, Mapping

from head_pruning.choosing import CommandLine
from head_pruning.options import underscored
from head_pruning.registry import KINDS, methods

from .fields import (
    DataArguments,
    GlueArguments,
    NerArguments,
    PretrainingArguments,
    SquadArguments,
    SwagArguments,
    complete_config,
    complete_gpp,
    complete_pretraining,
    complete_squad,
)
from .old_flags import (
    CONFIG_SPELLINGS,
    GLUE_SPELLINGS,
    GPP_SPELLINGS,
    PRETRAINING_SPELLINGS,
    SPELLINGS,
    SQUAD_SPELLINGS,
    TABLE_SPELLINGS,
    Spelling,
)


@dataclass(frozen=True)
class Script:
    """One script.

    Args:
        name: without ``.py``.
        description: what it does.
        methods: the methods that it is bound to, the first unless the options imply another; empty: all.
        needs: the flags that are required although they have a default.
        defaults: of its methods' options.
        data: what it says of its data.
        sizes: the flags that must be 1 or more.
        training_defaults: of transformers' own flags.
        complete: writes into the flags that were set what the script's own say of transformers'.
        spellings: the old flags that it reads.
        own_warmup: whether --warmup_steps is a pruner's even where the pruner has none.
        bare: flags that may come without a value, and what they mean then.
    """

    name: str
    description: str
    methods: tuple[str, ...] = ()
    needs: tuple[str, ...] = ("output_dir",)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    data: type[DataArguments] = GlueArguments
    sizes: tuple[str, ...] = ("max_seq_length",)
    training_defaults: Mapping[str, Any] = field(default_factory=dict)
    complete: Callable[[dict[str, Any], list[str]], None] = lambda given, notes: None
    spellings: tuple[Spelling, ...] = SPELLINGS
    own_warmup: bool = False
    bare: Mapping[str, str] = field(default_factory=dict)

    @property
    def line(self) -> CommandLine:
        """How it spells the choice of methods."""
        return CommandLine(underscored, choosers(), self.methods, "run_glue.py")


def choosers() -> dict[str, tuple[str, ...]]:
    """The flags that name methods, with the kinds that each takes: those of kinds that have a method."""
    others = {kind.flag: (name,) for name, kind in KINDS.items() if name not in ("heads", "weights") and methods(name)}
    # run_squad.py has always called any pruner's name so.
    return {"pruner": ("heads", "weights"), "pruner_name": ("weights", "heads"), **others}


SCRIPTS = {
    script.name: script
    for script in (
        Script(
            "run_dsp",
            "Prune heads on a GLUE task with DSP (Li et al. 2021), or with its straight-through variant (--use_ste).",
            ("dsp", "ste"),
            needs=("output_dir", "num_of_heads"),
        ),
        Script(
            "run_voita",
            "Prune heads on a GLUE task with the L0 gates of Voita et al. 2019.",
            ("voita",),
            defaults={"l0_penalty": 0.5},
        ),
        Script(
            "run_glue",
            "Fine-tune on a GLUE task: dense, or with the pruning method that --pruner names or the options imply.",
            complete=complete_config,
            spellings=(*SPELLINGS, *GLUE_SPELLINGS, *CONFIG_SPELLINGS),
        ),
        Script(
            "run_GDbert_glue",
            "Prune heads and feed-forward units on a GLUE task with GPP, and learn from a teacher with DFD "
            "(--do_distill).",
            ("gpp",),
            defaults={"prepruning_finetune_epochs": 3.0, "prune_epochs": 10.0},
            # Those of the recipe: transformers' 3 would end before pruning does.
            training_defaults={"num_train_epochs": 32.0},
            complete=complete_gpp,
            spellings=(*SPELLINGS, *GLUE_SPELLINGS, *GPP_SPELLINGS),
        ),
        Script(
            "run_squad",
            "Fine-tune on SQuAD: dense, or with the pruning method that --pruner_name names or the options imply.",
            data=SquadArguments,
            sizes=SquadArguments.SIZES,
            training_defaults={"per_device_train_batch_size": 16, "per_device_eval_batch_size": 64},
            complete=complete_squad,
            spellings=(*SPELLINGS, *SQUAD_SPELLINGS, *CONFIG_SPELLINGS),
            own_warmup=True,
        ),
        *(
            Script(
                name,
                "Learn masked words and next sentences: dense, or with any pruning method, and from a teacher "
                "(--distill logits).",
                data=PretrainingArguments,
                sizes=(),
                complete=complete_pretraining,
                spellings=(*SPELLINGS, *PRETRAINING_SPELLINGS),
                bare={"distill": "True"},
            )
            for name in ("run_pretraining", "run_mlm")
        ),
        Script(
            "run_ner",
            "Fine-tune on token classification: dense, or with the pruning method that --pruner_name names.",
            data=NerArguments,
            complete=complete_config,
            spellings=(*SPELLINGS, *TABLE_SPELLINGS, *CONFIG_SPELLINGS),
        ),
        Script(
            "run_swag",
            "Fine-tune on multiple choice: dense, or with the pruning method that --pruner_name names.",
            data=SwagArguments,
            complete=complete_config,
            spellings=(*SPELLINGS, *TABLE_SPELLINGS, *CONFIG_SPELLINGS),
        ),
    )
}
