"""Results for people: tables and pictures."""

from .tables import head_table, text_table

__all__ = ["head_table", "text_table"]
