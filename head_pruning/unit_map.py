"""What of a model can be pruned, in one fixed order, and which of it stays."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, field
from typing import Any, Callable, ClassVar, Iterator, Mapping, Optional, Sequence, Union

import numpy as np

from .compact.checks import MAX_HEADS, UNIT_MAP
from .compact.shapes import conform
from .errors import HeadPruningError

logger = logging.getLogger(__name__)

ATTENTION_KINDS = ("encoder_self", "decoder_cross", "decoder_self")
#: What a map can number: attention heads, the units of feed-forward blocks, or both, heads first.
NUMBERED = ("heads", "ffn", "both")


@dataclass(frozen=True)
class AttentionSite:
    """One attention module of a host model.

    Args:
        name: dotted module name, e.g. ``encoder.layers.0.self_attn``.
        kind: ``encoder_self``, ``decoder_self`` or ``decoder_cross``.
        layer: name of the host layer that the module belongs to.
        heads: number of prunable heads H (key/value groups under grouped-query attention).
        head_dim: width of one head in the input of the output projection, so that
            ``heads * head_dim`` is that input's last dimension.
        out_proj: dotted name of the output projection; its input is what a gate scales.
        projections: the dotted names of the query, key and value projections, in this order.
    """

    name: str
    kind: str
    layer: str
    heads: int
    head_dim: int
    out_proj: str
    projections: tuple[str, ...] = ()


@dataclass(frozen=True)
class FeedForwardSite:
    """One feed-forward block: ``in_proj`` makes ``width`` units that ``out_proj`` reads.

    ``gates`` are the projections beside ``in_proj`` whose outputs the units are multiplied with, as in SwiGLU; they
    belong to the units, and so does the half of an ``in_proj`` of twice the width. Where units are numbered, each is a
    head one feature wide.
    """

    name: str
    layer: str
    width: int
    in_proj: str
    out_proj: str
    gates: tuple[str, ...] = ()
    kind: ClassVar[str] = "feed_forward"
    head_dim: ClassVar[int] = 1

    @property
    def heads(self) -> int:
        """The number of units."""
        return self.width

    @property
    def projections(self) -> tuple[str, ...]:
        """What makes the units."""
        return (self.in_proj, *self.gates)


#: Whatever has units that a map may number.
Site = Union[AttentionSite, FeedForwardSite]


@dataclass(frozen=True)
class ExpertSite:
    """The experts of one feed-forward block, which one module holds as tensors ``[experts, ., .]``.

    Args:
        name: dotted module name.
        layer: name of the host layer.
        weights: dotted parameter names of their matrices.
        biases: dotted parameter names of their biases.
        transposed: whether each matrix is ``[in, out]`` and not ``[out, in]``; None where that is not known.
    """

    name: str
    layer: str
    weights: tuple[str, ...]
    biases: tuple[str, ...] = ()
    transposed: Optional[bool] = None


@dataclass(frozen=True)
class UnitMap:
    """The ordered sites of one model and the flat numbering of all its N heads.

    Heads are numbered site after site in the order of ``attention``, within a site from 0.
    An encoder-decoder map lists encoder self-attention, then decoder cross-attention, then
    decoder self-attention (the row order of the published code). :meth:`numbering` gives the map that numbers the
    units of feed-forward blocks, too; whatever counts heads then counts units with them.

    Args:
        attention: the attention sites.
        feed_forward: the feed-forward blocks.
        layers: dotted names of the host's layers in the order in which data goes through them; default: those that
            the sites name, in order of first appearance. A layer all of whose heads are gone names no site any more.
        experts: the experts that are tensors of one module.
        units: what is numbered, one of :data:`NUMBERED`.
    """

    attention: tuple[AttentionSite, ...]
    feed_forward: tuple[FeedForwardSite, ...] = ()
    layers: tuple[str, ...] = ()
    experts: tuple[ExpertSite, ...] = field(default=(), kw_only=True)
    units: str = field(default="heads", kw_only=True)
    #: Layers whose feed-forward units were all removed, so that none is missing here; the host's, never stored.
    emptied: tuple[str, ...] = field(default=(), kw_only=True, compare=False, repr=False)
    #: Says what of the model belongs to the heads of a site, see head_pruning.surgery; the host's, never stored.
    planner: Optional[Callable[[Any, Site], Any]] = field(default=None, compare=False, repr=False)
    #: What else the host does to a model whose heads were removed, e.g. changing classes; the host's, never stored.
    adapt: Optional[Callable[[Any], None]] = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        names = [site.name for site in self.attention]
        if not names:
            raise HeadPruningError(
                "The model has no attention module that can be mapped; describe its sites with AttentionSite "
                "and pass UnitMap((site, ...))."
            )
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise HeadPruningError(f"The unit map names {', '.join(twice)} twice; list each attention module once.")
        if self.units not in NUMBERED:
            raise HeadPruningError(f"A unit map cannot number {self.units!r}; give one of {', '.join(NUMBERED)}.")
        if sum(site.heads for site in self.attention) > MAX_HEADS:
            raise HeadPruningError(f"The unit map has {self.num_heads} heads, more than any model; correct its sites.")
        object.__setattr__(self, "layers", tuple(self.layers) or self._layers_of_sites())

    def _layers_of_sites(self) -> tuple[str, ...]:
        named = [site.layer for sites in (self.attention, self.feed_forward, self.experts) for site in sites]
        return tuple(dict.fromkeys(named))

    def numbering(self, units: str) -> "UnitMap":
        """The same map, which numbers ``units``: one of :data:`NUMBERED`.

        The units of experts are not numbered: a batch may pass an expert by.

        Raises:
            HeadPruningError: the units of feed-forward blocks are asked for, and the model has none that is mapped.
        """
        found = self if units == self.units else dataclasses.replace(self, units=units)
        if units != "heads" and not any(isinstance(site, FeedForwardSite) for site in found.sites):
            raise HeadPruningError("The model has no feed-forward block that can be mapped; prune its heads alone.")
        return found

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites whose heads or units are numbered, in that order."""
        heads = self.attention if self.units != "ffn" else ()
        return (*heads, *(site for site in self.feed_forward if self.units != "heads" and not _is_expert(site.name)))

    def told(self) -> "UnitMap":
        """This map, after a warning of feed-forward units that it should number and cannot: those of experts, and of
        layers without a block of a known layout.
        """
        left = self._without_units() if self.units != "heads" else []
        if left:
            names = ", ".join(left[:4]) + (f" and {len(left) - 4} more" if len(left) > 4 else "")
            logger.warning("the feed-forward units of %s cannot be pruned and stay as they are", names)
        return self

    def _without_units(self) -> list[str]:
        experts = [*(site.name for site in self.experts), *(s.name for s in self.feed_forward if _is_expert(s.name))]
        known = {site.layer for sites in (self.feed_forward, self.experts) for site in sites} | set(self.emptied)
        return [*experts, *(layer for layer in self.layers if layer not in known)]

    @property
    def num_heads(self) -> int:
        """N, the number of heads under control."""
        return sum(site.heads for site in self.sites)

    def slices(self) -> Iterator[tuple[Site, slice]]:
        """Each site with its slice of the flat numbering."""
        start = 0
        for site in self.sites:
            yield site, slice(start, start + site.heads)
            start += site.heads

    def kinds(self) -> dict[str, np.ndarray]:
        """For each kind of attention that is numbered, the flat indices of its heads."""
        found: dict[str, list[int]] = {}
        for site, where in self.slices():
            if isinstance(site, AttentionSite):
                found.setdefault(site.kind, []).extend(range(where.start, where.stop))
        return {kind: np.array(index) for kind, index in found.items()}

    def by_site(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """``[N]`` values, one per head, as site name to ``[heads]``."""
        return {site.name: values[where] for site, where in self.slices()}

    def rows(self) -> list[np.ndarray]:
        """For each site, the flat indices of its heads."""
        return [np.arange(where.start, where.stop) for _, where in self.slices()]

    def to_dict(self) -> dict:
        """A JSON-ready description; :meth:`from_dict` is its inverse.

        ``layers`` is left out where the sites tell it, and so are gates and experts where there are none, and
        ``units`` where these are heads, as files of older versions do.
        """
        return {
            "attention": [dataclasses.asdict(site) for site in self.attention],
            "feed_forward": [
                {key: value for key, value in dataclasses.asdict(site).items() if key != "gates" or value}
                for site in self.feed_forward
            ],
            **({"experts": [dataclasses.asdict(site) for site in self.experts]} if self.experts else {}),
            **({} if self.layers == self._layers_of_sites() else {"layers": list(self.layers)}),
            **({} if self.units == "heads" else {"units": self.units}),
        }

    @classmethod
    def from_dict(cls, data: Mapping) -> "UnitMap":
        """Rebuild a map from :meth:`to_dict`. Raises ValueError, naming the place, when it is none."""
        conform(data, UNIT_MAP, "the unit map")
        attention = _sites(AttentionSite, data["attention"])
        feed_forward = _sites(FeedForwardSite, data["feed_forward"])
        experts = _sites(ExpertSite, data.get("experts", ()))
        layers, units = tuple(data.get("layers", ())), data.get("units", "heads")
        return cls(attention, feed_forward, layers, experts=experts, units=units)

    def sizes(self) -> list[tuple[str, int]]:
        """Name and number of heads of each site that has any."""
        return [(site.name, site.heads) for site in self.sites if site.heads]

    def check_same_heads(self, other: "UnitMap", what: str) -> None:
        """Raise unless both maps number the same heads of the same sites; sites without heads do not count."""
        mine, theirs = self.sizes(), other.sizes()
        if mine != theirs:
            odd = sorted({name for name, _ in set(mine) ^ set(theirs)}) or ["the order of the sites"]
            raise HeadPruningError(
                f"{what} belongs to another architecture (they differ in {', '.join(odd[:3])}); "
                "use the model it was made for."
            )


def _is_expert(name: str) -> bool:
    return "experts" in name.split(".")


def _sites(kind: type, entries: Sequence[Mapping]) -> tuple:
    def frozen(value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    names = {each.name for each in dataclasses.fields(kind)}  # those of a later version are left out
    return tuple(kind(**{name: frozen(value) for name, value in entry.items() if name in names}) for entry in entries)


def alike(mine: Sequence[tuple[str, int]], theirs: Sequence[tuple[str, int]]) -> bool:
    """Whether two lists of :meth:`UnitMap.sizes` are of the same sites: equal, or equal but for one dotted prefix that
    all names of one of them have more, as those of a model with a task head (``bert.encoder...``, ``encoder...``).
    """
    if mine == theirs or not mine or not theirs:
        return mine == theirs
    base, longer = sorted((mine, theirs), key=lambda sizes: len(sizes[0][0]))
    prefix = longer[0][0].removesuffix(base[0][0])
    return prefix.endswith(".") and longer == [(prefix + name, heads) for name, heads in base]
