"""Which indices of a dimension stay when heads are cut out of it."""

from typing import Any, Iterable, Mapping, Optional, Sequence

import torch

HEADS, QUERIES = 1, 2  # kinds of blocks


def index_on(places: Sequence[int], device: torch.device) -> torch.Tensor:
    """Places on a device, which is not waited for."""
    return torch.tensor(places, dtype=torch.long).to(device, non_blocking=True)


def slices(
    blocks: Iterable[Sequence[int]],
    held: Sequence[int],
    kept: Sequence[int],
    queries: Optional[tuple[Sequence[int], Sequence[int]]] = None,
    repeat: int = 0,
) -> list[int]:
    """Indices of what stays of a dimension that is made of ``blocks`` for the heads ``held``.

    Args:
        blocks: see the top of the file.
        held: the heads there are.
        kept: the heads that stay.
        queries: the query heads there are, and those that stay; needed for blocks of query heads.
        repeat: query heads per head of the original, where the slices of a head are to be repeated for each of its
            query heads that stay; else 0.
    """
    found: list[int] = []
    start = 0
    for kind, width, *of in blocks:
        there: Sequence[Optional[int]]
        listed: Sequence[Optional[int]]
        there, listed = (queries if kind == QUERIES and queries else (held, kept)) if kind else ([None], [None])
        stay = set(listed)
        for head in there:
            if head is not None and of and not of[0] <= head < of[1]:
                continue
            if head in stay:
                times = 1
                if repeat and kind == HEADS:
                    assert queries is not None
                    times = sum(query // repeat == head for query in queries[1])
                found.extend(list(range(start, start + width)) * times)
            start += width
    return found


def stays(site: Mapping[str, Any], earlier: Optional[Mapping[str, Any]], blocks: Iterable[Sequence[int]]) -> list[int]:
    """Indices of what a site's recipe keeps of a dimension, whose tensor holds what the ``earlier`` recipe kept."""
    held, queries = _held(site, earlier)
    repeat = site["per_group"] if site.get("expanded") else 0
    return slices(blocks, held, held_heads(site), (queries, held_queries(site)), repeat)


def was(site: Mapping[str, Any], earlier: Optional[Mapping[str, Any]], blocks: Iterable[Sequence[int]]) -> int:
    """The size of that dimension before; counted, so that no size that a file claims makes a list of it."""
    held, queries = _held(site, earlier)
    size = 0
    for kind, width, *of in blocks:
        there = (queries if kind == QUERIES else held) if kind else [0]
        size += width * (sum(of[0] <= head < of[1] for head in there) if of and kind else len(there))
    return size


def _held(site: Mapping[str, Any], earlier: Optional[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
    if earlier is None:
        return list(range(site["heads"])), list(range(site["heads"] * site.get("per_group", 1)))
    return held_heads(earlier), held_queries(earlier)


def held_heads(site: Mapping[str, Any]) -> list[int]:
    """The heads of a site that its tensors hold: those that stay, or the dummy."""
    return site["kept"] or ([site["dummy"]] if site.get("dummy") is not None else [])


def held_queries(site: Mapping[str, Any]) -> list[int]:
    """The query heads of a site that its tensors hold, numbered as in the original."""
    of = site.get("per_group", 1)
    there = site.get("queries")
    return [
        query
        for head in held_heads(site)
        for query in range(head * of, head * of + of)
        if there is None or query in there
    ]
