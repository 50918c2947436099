"""Scores of heads from gradients."""

from .michel import ImportanceAccumulator, PruningRound, normalize_importance, pruning_rounds

__all__ = ["ImportanceAccumulator", "PruningRound", "normalize_importance", "pruning_rounds"]
