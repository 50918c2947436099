"""Plain-text tables."""

from typing import Mapping, Optional, Sequence

from ..masks import HeadMask


def text_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """An aligned table: first column to the left, the others to the right; floats with two decimals."""
    cells = [
        [str(c) for c in header],
        *[[f"{c:.2f}" if isinstance(c, float) else str(c) for c in row] for row in rows],
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The same as GitHub-flavoured Markdown."""
    cells = [[f"{c:.2f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(header), ["---"] * len(header), *cells])


def head_table(mask: HeadMask, queries: Optional[Mapping[str, tuple[Sequence[int], int]]] = None) -> str:
    """The kept heads by site: one line per site, ``#`` for a head that stays and ``.`` for one that goes. Feed-forward
    units, which are too many for that, are counted.

    Args:
        mask: the heads.
        queries: of sites whose heads are groups that lost single query heads: the query heads that stay, and how many
            there were.
    """
    counted = {site.name for site in mask.unit_map.feed_forward}
    rows = [
        (name, "" if name in counted else _signs(keep), f"{sum(keep)}/{len(keep)}")
        for name, keep in mask.by_site().items()
    ]
    counts = mask.counts()
    rows += [(f"all {name}" if len(counts) > 1 else "all", "", f"{kept}/{of}") for name, (kept, of) in counts.items()]
    if not queries:
        return text_table(("site", "heads", "kept"), rows)
    more = {
        name: (_signs([query in kept for query in range(total)]), f"{len(kept)}/{total}")
        for name, (kept, total) in queries.items()
    }
    return text_table(
        ("site", "heads", "kept", "query heads", "kept"), [(*row, *more.get(row[0], ("", ""))) for row in rows]
    )


def _signs(keep: Sequence[bool]) -> str:
    return "".join("#" if kept else "." for kept in keep)
