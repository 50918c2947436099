"""Pictures of head masks and of scores over what is kept: PNG, or SVG or PDF where the file's name ends so."""

import itertools
import mimetypes
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Mapping, Optional, Sequence

from ..errors import HeadPruningError
from ..files import atomic_path
from ..masks import HeadMask
from ..unit_map import AttentionSite

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

_COLOURS = {
    "encoder_self": "#3b6fb6",
    "decoder_cross": "#c8553d",
    "decoder_self": "#4f9d69",
    "feed_forward": "#8a6fb0",
}
_LABELS = {
    "encoder_self": "encoder",
    "decoder_cross": "cross",
    "decoder_self": "decoder",
    "feed_forward": "feed-forward units",
}


# Ending to what a file would else say of when it was written, and by which version.
_METADATA: dict[str, dict[str, None]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
    ".pdf": {"CreationDate": None, "Producer": None, "Creator": None},
}


def picture_path(path: "str | Path") -> Path:
    """Where a picture of this name is written: there; with ``.png`` added where the name ends as no file's does.

    Raises:
        HeadPruningError: it ends as a file of another kind.
    """
    path = Path(path)
    if path.suffix.lower() in _METADATA:
        return path
    if any(mimetypes.MimeTypes().guess_type(path.name)):  # an own one: what all systems know
        *most, last = _METADATA
        raise HeadPruningError(f"{path} is no name of a picture here; let it end in {', '.join(most)} or {last}.")
    return path.with_name(f"{path.name}.png")


def _figure(width: float, height: float, layout: Literal["constrained", "compressed"] = "constrained") -> "Figure":
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    return Figure(figsize=(width, height), layout=layout)


def plot_head_masks(masks: Mapping[str, HeadMask], path: "str | Path") -> Path:
    """Draw masks of one model side by side: a row per site, a square per head, filled where the head stays; of
    feed-forward units a bar, filled to the share that stays.

    Args:
        masks: title to mask.
        path: the picture to write, see :func:`picture_path`.

    Returns:
        The file that was written.

    Raises:
        HeadPruningError: the file's name is of another kind, or the disk takes nothing.
    """
    first = next(iter(masks.values()))
    sites = first.unit_map.sites
    widest = max((site.heads for site in sites if isinstance(site, AttentionSite)), default=12)
    width = 0.45 + 0.22 * widest
    titles = [_narrow(title, width) for title in masks]
    lines = 2 + max(title.count("\n") for title in titles)
    figure = _figure(2.2 + len(masks) * width, 0.7 + 0.25 * lines + 0.24 * len(sites), "compressed")
    panels = figure.subplots(1, len(masks), sharey=True, squeeze=False)[0]
    for panel, title, mask in zip(panels, titles, masks.values()):
        for row, (site, where) in enumerate(mask.unit_map.slices()):
            colour = _COLOURS.get(site.kind, "#555555")
            if not isinstance(site, AttentionSite):
                share = float(mask.keep[where].mean()) if site.heads else 0.0
                panel.barh(row, widest - 0.16, left=-0.42, height=0.84, color="#f2f2f2", edgecolor="#d5d5d5")
                panel.barh(row, (widest - 0.16) * share, left=-0.42, height=0.84, color=colour)
                continue
            for head, kept in enumerate(mask.keep[where]):
                panel.add_patch(
                    _square(
                        head, row, facecolor=colour if kept else "#f2f2f2", edgecolor=colour if kept else "#d5d5d5"
                    )
                )
        panel.set(xlim=(-0.6, widest - 0.4), ylim=(len(sites) - 0.4, -0.6), xticks=range(widest), aspect="equal")
        kept = mask.words if len(mask.counts()) > 1 else f"{mask.kept} of {mask.keep.size}"
        panel.set_title(_plain(f"{title}\n{kept}"), fontsize=9)
        panel.tick_params(length=0, labelsize=7)
        for spine in panel.spines.values():
            spine.set_visible(False)
    panels[0].set_yticks(range(len(sites)), [site.name for site in sites])
    shown = [kind for kind in _COLOURS if any(site.kind == kind for site in sites)]
    handles = [_square(0, 0, facecolor=_COLOURS[kind], label=_LABELS[kind]) for kind in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(shown), fontsize=8, frameon=False)
    return save_figure(figure, path)


def plot_scores(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    path: "str | Path",
    *,
    score: str,
    dense: Optional[tuple[str, float]] = None,
    total: Optional[float] = None,
    spread: Optional[Mapping[str, Sequence[tuple[float, float, float]]]] = None,
    unit: str = "heads",
    front: Sequence[tuple[float, float]] = (),
) -> None:
    """Score over what is kept, one line per method.

    Args:
        curves: method to its (heads kept, score) points.
        path: the picture to write, see :func:`picture_path`.
        score: name of the score, for the axis.
        dense: label and score of the unpruned model, drawn as a level line.
        total: number of heads of the unpruned model; None where the axis is no count of what is kept.
        spread: method to its (heads kept, lowest, highest) of several runs, drawn as bars.
        unit: what is kept, such as ``% of the weights`` (then ``total`` is 100), or without ``total`` the axis.
        front: the points that no other beats in both, drawn as a broad band.
    """
    figure = _figure(6.4, max(5.0, 4.0 + 0.1 * len(curves)))  # the legend has two columns
    panel = figure.subplots()
    if dense is not None:
        panel.axhline(dense[1], color="#888888", linestyle=":", label=dense[0] + (f" ({total} {unit})" * bool(total)))
    if len(front) > 1:
        panel.plot(*zip(*sorted(front)), color="#e3c565", linewidth=8, alpha=0.5, label="Pareto front", zorder=1)
    for marker, (name, points) in zip(itertools.cycle("osD^vP*X<>"), curves.items()):
        points = sorted(points)
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        (line,) = panel.plot(xs, ys, marker=marker, markersize=5, label=_plain(name))
        for heads, low, high in (spread or {}).get(name, ()):
            panel.vlines(heads, low, high, color=line.get_color(), alpha=0.6)
    if total is not None:
        panel.set_xticks(sorted({count for points in curves.values() for count, _ in points}))
    panel.set(xlabel=unit if total is None else f"{unit} kept of {total}", ylabel=_plain(score))
    panel.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    save_figure(figure, path)


def plot_runs(panels: Mapping[str, Mapping[str, Sequence[float]]], path: "str | Path") -> None:
    """Every run's score as a point, the mean as a bar: a panel per setting, a row per method, the best at the top.

    Args:
        panels: title to methods, each to the scores of its runs.
        path: the picture to write, see :func:`picture_path`.
    """
    rows = [len(methods) for methods in panels.values()]
    figure = _figure(6.4, 0.4 + sum(0.75 + 0.25 * count for count in rows))
    grid = figure.subplots(len(rows), 1, squeeze=False, gridspec_kw={"height_ratios": rows})[:, 0]
    for panel, (title, methods) in zip(grid, panels.items()):
        order = sorted(methods.items(), key=lambda item: sum(item[1]) / len(item[1]))
        for row, (_, scores) in enumerate(order):
            panel.plot(scores, [row] * len(scores), "o", markersize=5, alpha=0.7, color=_COLOURS["encoder_self"])
            panel.plot([sum(scores) / len(scores)], [row], "|", markersize=14, color="#222222")
        panel.set_yticks(range(len(order)), [_plain(name) for name, _ in order], fontsize=8)
        panel.set(ylim=(-0.6, len(order) - 0.4))
        panel.set_title(_plain(title), fontsize=9, loc="left")
        panel.grid(alpha=0.3)
    save_figure(figure, path)


def _narrow(title: str, width: float) -> str:
    """A title in lines that fit into a panel of so many inches, so that it does not run into the next one's."""
    letters = int(width / 0.085)  # of the average width in 9 points
    return "\n".join(part for line in title.splitlines() for part in textwrap.wrap(line, letters) or [""])


def _plain(text: str) -> str:
    """Text that matplotlib draws as it is: no formula, whatever is in it, and no name of what legends leave out."""
    return ("\u200b" if text.startswith("_") else "") + text.replace("$", r"\$")


def _square(x: float, y: float, **style: Any) -> "Rectangle":
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.42, y - 0.42), 0.84, 0.84, **style)


def save_figure(figure: "Figure", path: "str | Path") -> Path:
    """Write a picture whole, of equal content in equal bytes; what is returned and raised: :func:`plot_head_masks`."""
    from matplotlib import rc_context

    path = picture_path(path)
    ending = path.suffix.lower()
    options: dict[str, Any] = {"format": ending[1:], "metadata": _METADATA[ending]}
    with atomic_path(path) as temporary, rc_context({"svg.hashsalt": path.name}):
        figure.savefig(temporary, dpi=150 if ending == ".png" else "figure", **options)
    return path
