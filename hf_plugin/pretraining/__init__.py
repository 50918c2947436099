"""Pretraining on pairs of segments: masked words, and whether the second segment follows the first."""
