"""Pruning the heads of a trained translation model by their importance."""
