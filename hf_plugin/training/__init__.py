"""Pruning in a Trainer: session, callback, checkpoints."""
