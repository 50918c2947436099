"""Removing heads for good: smaller tensors, equal outputs."""

from .plans import Blocks, SitePlan, columns_of, get_tensor, plain_plan, rows_of
from .remaining import (
    heads_kept_by,
    heads_left,
    mask_of_original,
    query_heads_left,
    recipe_of,
    site_now,
    sites_left,
)
from .removal import plan_recipe, remove_heads, remove_query_heads, removed_parameters

__all__ = [
    "Blocks",
    "SitePlan",
    "columns_of",
    "get_tensor",
    "heads_kept_by",
    "heads_left",
    "mask_of_original",
    "plain_plan",
    "plan_recipe",
    "query_heads_left",
    "recipe_of",
    "remove_heads",
    "remove_query_heads",
    "removed_parameters",
    "rows_of",
    "site_now",
    "sites_left",
]
