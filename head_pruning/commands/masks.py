"""``head-pruning show`` and ``head-pruning diff``: head masks, and where they differ."""

import argparse

from ..hosts import read_mask
from ..masks import HeadMask, numbered_alike
from ..report.plots import picture_path, plot_head_masks
from ..report.tables import head_table, text_table
from .common import note, print_json, short


def show(args: argparse.Namespace) -> None:
    """``head-pruning show``."""
    if args.plot:
        picture_path(args.plot)  # before anything is printed
    masks = {path: read_mask(path) for path in args.masks}
    for path, mask in masks.items():
        print(f"{path}\n{head_table(mask)}\n")
    masks = dict(zip(masks, numbered_alike(masks.values())))
    first = next(iter(masks.values()))
    rows = [(path, *first.compare(mask).values()) for path, mask in list(masks.items())[1:]]
    if rows:
        print(text_table(("compared with the first", "both", "only first", "only this", "jaccard"), rows))
    if args.plot:
        note(f"the picture is in {plot_head_masks(masks, args.plot)}")


def difference(first: HeadMask, second: HeadMask) -> dict[str, dict[str, list[int]]]:
    """By site: the heads that both keep, and those that only one of them keeps."""
    one, other = first.kept_heads(), second.fitted(first.unit_map, "The other mask").kept_heads()
    return {
        name: {
            "both": sorted(set(one[name]) & set(other[name])),
            "only_first": sorted(set(one[name]) - set(other[name])),
            "only_second": sorted(set(other[name]) - set(one[name])),
        }
        for name in one
    }


def diff(args: argparse.Namespace) -> None:
    """``head-pruning diff``."""
    if args.plot:
        picture_path(args.plot)
    first, second = numbered_alike([read_mask(args.first, dense=True), read_mask(args.second, dense=True)])
    overlap = first.compare(second)
    sites = difference(first, second)
    if args.json:
        files = {"first": args.first, "second": args.second, "kept": [first.kept, second.kept]}
        print_json({**files, **overlap, "sites": sites})
    else:
        rows, blocks = [], {site.name for site in first.unit_map.feed_forward}
        for name, parts in sites.items():
            signs = dict.fromkeys(range(len(first.by_site()[name])), ".")
            for part, sign in (("both", "#"), ("only_first", "<"), ("only_second", ">")):
                signs.update(dict.fromkeys(parts[part], sign))
            shown = "" if name in blocks else "".join(signs.values())
            rows.append((name, shown, *(len(heads) for heads in parts.values())))
        rows.append(("all", "", *list(overlap.values())[:3]))
        print(f"< {args.first}: {first.words}")
        print(f"> {args.second}: {second.words}")
        print(text_table(("site", "heads", "both #", "only <", "only >"), rows))
        print(f"jaccard index {overlap['jaccard']:.2f}")
    if args.plot:
        titles = [short(args.first), short(args.second)]
        if titles[0] == titles[1]:
            titles = ["first", "second"]
        note(f"the picture is in {plot_head_masks(dict(zip(titles, (first, second))), args.plot)}")
