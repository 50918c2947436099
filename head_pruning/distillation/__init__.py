"""Distillation: a frozen teacher, losses that compare a model with it, and its layers in the model's place."""

from __future__ import annotations

from .grafting import Grafts
from .teacher import Teacher

__all__ = ["Grafts", "Teacher"]
