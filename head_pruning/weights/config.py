"""The options that all weight pruners share."""

from dataclasses import dataclass, field
from typing import Optional

POLICIES = ("revive", "nested", "retained")


@dataclass
class WeightConfig:
    """Options of every weight pruner."""

    weights_include: Optional[str] = field(
        default=None,
        metadata={
            "help": "regular expression of the parameters to prune; default: the projections of all attention and "
            "feed-forward blocks"
        },
    )
    weights_exclude: Optional[str] = field(
        default=None, metadata={"help": "regular expression of parameters to leave dense"}
    )
    prune_biases: bool = field(
        default=True, metadata={"help": "prune the biases of the chosen modules too, as the published code does"}
    )


@dataclass
class MaskConfig(WeightConfig):
    """Options of every weight pruner that draws masks."""

    weight_selection: Optional[str] = field(
        default=None,
        metadata={
            "help": "global (one threshold), tensor (one per tensor), N:M such as 2:4 (N of M neighbours stay), or "
            "ROWSxCOLUMNS such as 4x4 (whole blocks); default: the method's own"
        },
    )
    mask_policy: Optional[str] = field(
        default=None,
        metadata={
            "help": "revive (pruned weights are trained on between two masks), nested (a pruned weight never comes "
            "back) or retained (pruned weights keep their last value aside and come back with it); default: the "
            "method's own"
        },
    )
    block_pooling: str = field(
        default="avg", metadata={"help": "score of a block of weights: avg or max of its weights' scores"}
    )
