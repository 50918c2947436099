"""A criterion that shows the regulariser of the gates beside the loss."""

import math
from dataclasses import dataclass

from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)
from fairseq.logging import metrics


@dataclass
class PenaltyLoggingConfig(LabelSmoothedCrossEntropyCriterionConfig):
    """Options of label-smoothed cross-entropy."""


@register_criterion("label_smoothed_cross_entropy_head_pruning", dataclass=PenaltyLoggingConfig)
class LabelSmoothedCrossEntropyHeadPruningCriterion(LabelSmoothedCrossEntropyCriterion):
    """Label-smoothed cross-entropy that also logs the objective: loss plus penalty, per target token, base 2.

    The penalty's gradient is added by the session whatever the criterion, so it is only logged here.
    """

    def forward(self, model, sample, reduce=True):
        """As the base criterion, with ``penalty`` in the logging output."""
        loss, sample_size, log = super().forward(model, sample, reduce=reduce)
        session = getattr(self.task, "session", None)
        log["penalty"] = 0.0 if session is None else session.penalty()
        return loss, sample_size, log

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        """Log ``objective`` beside the base criterion's values."""
        super().reduce_metrics(logging_outputs)
        size = sum(log.get("sample_size", 0) for log in logging_outputs)
        total = sum(log.get("loss", 0) + log.get("penalty", 0.0) for log in logging_outputs)
        metrics.log_scalar("objective", total / size / math.log(2), size, round=3)
