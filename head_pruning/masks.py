"""Which heads stay, and which feed-forward units where they are numbered."""

from __future__ import annotations

import json
import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Mapping, Optional, Sequence

import numpy as np

from .errors import HeadPruningError, one_line
from .files import atomic_path, parse_json, read_safetensors, write_safetensors
from .unit_map import FeedForwardSite, UnitMap, alike


@dataclass(frozen=True, eq=False)
class HeadMask:
    """Which heads stay: ``keep`` is a boolean array of N heads in the map's order."""

    unit_map: UnitMap
    keep: np.ndarray

    def __post_init__(self) -> None:
        given = np.asarray(self.keep).reshape(-1)
        if not ((given == 0) | (given == 1)).all():
            raise HeadPruningError(
                "The head mask has entries other than true and false (1 and 0); give one of them for each head."
            )
        keep = given.astype(bool)
        if keep.size != self.unit_map.num_heads:
            raise HeadPruningError(
                f"The head mask has {keep.size} entries but the model has {self.unit_map.num_heads} heads; "
                "use a mask made for this model."
            )
        object.__setattr__(self, "keep", keep)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HeadMask) and self.by_site() == other.by_site()

    @property
    def kept(self) -> int:
        """Number of heads that stay."""
        return int(self.keep.sum())

    def by_site(self) -> dict[str, list[bool]]:
        """Site name to one boolean per head."""
        return {site.name: self.keep[where].tolist() for site, where in self.unit_map.slices()}

    def kept_heads(self) -> dict[str, list[int]]:
        """Site name to the indices of the heads that stay."""
        return {site.name: np.flatnonzero(self.keep[where]).tolist() for site, where in self.unit_map.slices()}

    def numbering(self, units: str) -> "HeadMask":
        """The same mask over what :meth:`UnitMap.numbering` numbers; of what this mask does not tell, all stays."""
        unit_map, mine = self.unit_map.numbering(units), self.unit_map.by_site(self.keep)
        parts = [mine.get(site.name, np.ones(site.heads, dtype=bool)) for site in unit_map.sites]
        return HeadMask(unit_map, np.concatenate(parts))

    def counts(self) -> dict[str, tuple[int, int]]:
        """How many of the heads, and how many of the units where they are numbered, stay, and of how many."""
        found: dict[str, tuple[int, int]] = {}
        for site, where in self.unit_map.slices():
            name = "units" if isinstance(site, FeedForwardSite) else "heads"
            kept, total = found.get(name, (0, 0))
            found[name] = kept + int(self.keep[where].sum()), total + site.heads
        return found

    @property
    def words(self) -> str:
        """How much stays, for a line to print: ``7 of 24 heads``, ``7 of 24 heads and 100 of 768 units``."""
        return " and ".join(f"{kept} of {total} {name}" for name, (kept, total) in self.counts().items())

    def fits(self, unit_map: UnitMap) -> bool:
        """Whether the mask is of the heads of this map, see :func:`alike`."""
        return alike(self.unit_map.sizes(), unit_map.sizes())

    def fitted(self, unit_map: UnitMap, what: str = "The head mask") -> "HeadMask":
        """The same mask with the names of ``unit_map``: those of a model with a task head fit its base, and back.

        Raises:
            HeadPruningError: the mask is of another architecture; the sentence begins with ``what``.
        """
        if not self.fits(unit_map):
            unit_map.check_same_heads(self.unit_map, what)
        return HeadMask(unit_map, self.keep)

    def compare(self, other: "HeadMask") -> dict[str, float]:
        """Overlap of two masks of one model: heads both keep, heads only one keeps, and the Jaccard index."""
        other = other.fitted(self.unit_map, "The other mask")
        both = int((self.keep & other.keep).sum())
        either = int((self.keep | other.keep).sum())
        return {
            "both": both,
            "only_first": self.kept - both,
            "only_second": other.kept - both,
            "jaccard": both / either if either else 1.0,
        }

    def save(self, path: "str | Path") -> None:
        """Write to ``path`` (safetensors: one ``uint8[heads]`` per site, the map as metadata), atomically."""
        tensors = {f"heads.{name}": np.array(keep, dtype=np.uint8) for name, keep in self.by_site().items()}
        with atomic_path(path) as temporary:
            write_safetensors(temporary, tensors, {"unit_map": json.dumps(self.unit_map.to_dict())})

    @classmethod
    def load(cls, path: "str | Path") -> "HeadMask":
        """Read what :meth:`save` wrote. Raises HeadPruningError when the file is missing, damaged or has no heads."""
        tensors, metadata = read_safetensors(path)
        if "weight_shapes" in metadata and "unit_map" not in metadata:
            raise HeadPruningError(f"{path} holds masks of weights but no head mask: its run pruned no heads.")
        try:
            unit_map = UnitMap.from_dict(parse_json(metadata["unit_map"]))
            keep = [tensors[f"heads.{site.name}"].reshape(site.heads) for site in unit_map.sites]
            return cls(unit_map, np.concatenate(keep))
        except (KeyError, ValueError) as error:
            raise HeadPruningError(
                f"{path} is not a head mask ({one_line(error)}); write one with HeadMask.save."
            ) from error

    def __str__(self) -> str:
        kept = (f"{name}: {' '.join(map(str, heads)) or 'none'}" for name, heads in self.kept_heads().items())
        return f"{self.words} stay; {'; '.join(kept)}"


def numbered_alike(masks: Iterable[HeadMask]) -> list[HeadMask]:
    """Masks of one model with the names of the first, of heads and units where not all number the same.

    Raises:
        HeadPruningError: one is of another architecture.
    """
    masks = list(masks)
    if len({mask.unit_map.units for mask in masks}) > 1:
        masks = [mask.numbering("both") for mask in masks]
    return [mask.fitted(masks[0].unit_map, "The other mask") for mask in masks]


def full_mask(unit_map: UnitMap) -> HeadMask:
    """The mask that keeps every head."""
    return HeadMask(unit_map, np.ones(unit_map.num_heads, dtype=bool))


def lifted(left: HeadMask, mask: HeadMask) -> HeadMask:
    """``mask``, of the heads that ``left`` keeps, as a mask of all the heads that ``left`` is of."""
    keep = left.keep.copy()
    keep[left.keep] = mask.keep
    return HeadMask(left.unit_map, keep)


def whole_number(value: Any) -> Optional[int]:
    """``value`` as an integer; None where it is none, as truth values are not, of whatever library."""
    kind = str(getattr(value, "dtype", type(value).__name__))
    try:
        return None if "bool" in kind else operator.index(value)
    except TypeError:
        return None


def head_numbers(name: str, listed: Iterable[Any]) -> list[int]:
    """The numbers of heads as integers. Raises HeadPruningError, naming the site, for what is no list of integers."""
    given = list(listed) if isinstance(listed, Iterable) else [None]
    heads = [number for number in map(whole_number, given) if number is not None]
    if len(heads) < len(given):
        raise HeadPruningError(
            f"The heads to remove from {name} must be a list of integers, the numbers of the heads (not a truth value "
            "for each head: that is a HeadMask)."
        )
    return heads


def mask_without(unit_map: UnitMap, removed: Mapping[str, Sequence[int]], base: Optional[HeadMask] = None) -> HeadMask:
    """The mask that removes ``{site name: [head, ...]}`` from ``base`` (default: from all heads).

    Raises:
        HeadPruningError: there is no such site or head, or what is given is no list of whole numbers.
    """
    keep = (base.keep if base is not None else np.ones(unit_map.num_heads, dtype=bool)).copy()
    where = {site.name: (site, span) for site, span in unit_map.slices()}
    for name, heads in removed.items():
        if name not in where:
            raise HeadPruningError(f"There is no site {name}; the map has {', '.join(where)}.")
        site, span = where[name]
        numbers = head_numbers(name, heads)
        bad = [head for head in numbers if not 0 <= head < site.heads]
        if bad:
            raise HeadPruningError(f"{name} has heads 0 to {site.heads - 1}; {bad[0]} is not one of them.")
        keep[span.start + np.array(numbers, dtype=int)] = False
    return HeadMask(unit_map, keep)
