"""Entities in sequences of tags, and how many were found."""

from typing import Sequence

Entity = tuple[str, int, int]


def entities(tags: Sequence[str]) -> set[Entity]:
    """Kind, first word and the word after the last of each entity, as CoNLL's evaluation reads them.

    Tags are ``O`` or a mark and a kind (``B-PER``), in IOB1, IOB2, IOBES or BILOU; a tag without a mark is a kind.
    """
    found: set[Entity] = set()
    kind, start, before = "", 0, ""
    for place, tag in enumerate([*tags, "O"]):
        mark, dash, name = tag.partition("-")
        name = name if dash else mark
        outside = tag == "O"
        begins = not outside and (
            not kind or name != kind or dash != "" and mark in ("B", "S", "U") or before in ("E", "S", "L", "U")
        )
        if kind and (outside or begins):
            found.add((kind, start, place))
            kind = ""
        if begins:
            kind, start = name, place
        before = mark if dash else ""
    return found


def entity_scores(
    found: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]], *, by_kind: bool = False
) -> dict[str, float]:
    """``precision``, ``recall`` and ``f1`` of whole entities, and the ``accuracy`` of single tags.

    Args:
        found: tags by sentence.
        wanted: the right ones.
        by_kind: also the first three of each kind, such as ``PER_f1``.
    """
    pairs = [(entities(a), entities(b)) for a, b in zip(found, wanted, strict=True)]
    scores = _ratios(*(sum(len(part) for part in parts) for parts in _counted(pairs)))
    tags = [(a, b) for one, other in zip(found, wanted) for a, b in zip(one, other, strict=True)]
    scores["accuracy"] = sum(a == b for a, b in tags) / max(1, len(tags))
    for kind in sorted({entity[0] for pair in pairs for part in pair for entity in part}) if by_kind else ():
        of_kind = [tuple({e for e in part if e[0] == kind} for part in pair) for pair in pairs]
        numbers = _ratios(*(sum(len(part) for part in parts) for parts in _counted(of_kind)))
        scores |= {f"{kind}_{name}": value for name, value in numbers.items()}
    return scores


def _counted(pairs: Sequence) -> tuple[list, list, list]:
    return [a & b for a, b in pairs], [a for a, _ in pairs], [b for _, b in pairs]


def _ratios(hits: int, found: int, wanted: int) -> dict[str, float]:
    return {
        "precision": hits / max(1, found),
        "recall": hits / max(1, wanted),
        "f1": 2 * hits / max(1, found + wanted),
    }
