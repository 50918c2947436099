"""``head-pruning inspect``: where the heads of a model are, how large it is, how fast it can become."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any, Mapping, Optional

import torch
from torch import nn

from ..errors import HeadPruningError
from ..hosts import HostModel, find_host, kept_heads
from ..inference.sizes import Sizes, mac_bound, measure_sizes
from ..masks import full_mask
from ..report.plots import picture_path, plot_head_masks
from ..report.report_file import counts_told
from ..report.tables import head_table, text_table
from ..surgery.remaining import query_heads_left, recipe_of
from ..surgery.removal import remove_heads
from ..weights.engine.targets import numbered
from .common import chosen_length, count, given_mask, note, print_json, short

TOLD_OF_WEIGHTS = ("method", "weights_kept", "weights_total", "density")  # of pruning.json
TOLD_OF_HEADS_TOO = ("weights_of_dense", "density_of_dense", "left_dense")
DENSE = 0.05  # at most this share of zeros is that of an unpruned model: the embedding of padding


def run(args: argparse.Namespace) -> None:
    """The command."""
    if args.plot:
        picture_path(args.plot)  # before anything that takes long
    host = find_host(args.model)
    note(f"loading {args.model}")
    loaded = host.load(Path(args.model), given_mask(args.mask))
    mask = kept_heads(loaded) or full_mask(loaded.unit_map)
    queries = _query_heads(loaded)
    found = describe(loaded, chosen_length(args.length, [loaded]))
    if args.json:
        print_json({"model": args.model, "host": host.name, **found})
    else:
        print(f"{args.model}: {found['class']} of {host.name}, {found['state']}")
        print(f"{head_table(mask, queries)}\n")
        print(_sizes_table(found))
    if args.plot:
        note(f"the picture is in {plot_head_masks({short(args.model): mask}, args.plot)}")


def describe(loaded: HostModel, length: int) -> dict[str, Any]:
    """What ``--json`` prints; the heads that the mask removes are cut out of the model to count the rest."""
    if length < 1:
        raise HeadPruningError(f"--length {length} is no number of tokens; give 1 or more.")
    mask = kept_heads(loaded)
    queries = _query_heads(loaded)
    told = loaded.weights if isinstance(loaded.weights, Mapping) else {}
    weights = {name: told[name] for name in TOLD_OF_WEIGHTS} if told.keys() >= set(TOLD_OF_WEIGHTS) else None
    if weights:
        weights |= {name: told[name] for name in TOLD_OF_HEADS_TOO if name in told}
    zeros = _zeros(loaded.model)
    compact = recipe_of(loaded.model) is not None
    pending = None if loaded.mask is None or loaded.mask.keep.all() else loaded.mask
    inputs = loaded.example(1, length)
    sizes: dict[str, Sizes] = {"now": measure_sizes(loaded.model, loaded.unit_map, inputs)}
    refusal: Optional[str] = None
    name = type(loaded.model).__name__
    if pending is not None:
        try:
            remove_heads(loaded.model, loaded.unit_map, pending)
            sizes["compact"] = measure_sizes(loaded.model, loaded.unit_map, inputs)
        except HeadPruningError as error:
            refusal = str(error)
    shown = mask or full_mask(loaded.unit_map)
    return {
        "class": name,
        "state": _state(compact, pending is not None, weights is not None, zeros),
        "weights": weights,
        "zeros_of_matrices": zeros,
        **counts_told(shown),
        "sites": [
            {
                "site": site.name,
                "kind": site.kind,
                "heads": site.heads,
                "kept": shown.keep[where].nonzero()[0].tolist(),
                **_queries_of(queries.get(site.name)),
            }
            for site, where in shown.unit_map.slices()
        ],
        "length": length,
        "sizes": {state: dataclasses.asdict(size) for state, size in sizes.items()},
        "mac_bound": round(mac_bound(sizes["now"], sizes["compact"]), 4) if "compact" in sizes else None,
        "cannot_be_compact": refusal,
    }


def _query_heads(loaded: HostModel) -> dict[str, tuple[list[int], int]]:
    recipe = recipe_of(loaded.model)
    return {} if recipe is None else query_heads_left(recipe)


def _queries_of(queries: Optional[tuple[list[int], int]]) -> dict[str, Any]:
    return {} if queries is None else {"query_heads": queries[1], "query_heads_kept": queries[0]}


def _zeros(model: nn.Module) -> float:
    """The share of exact zeros among the entries of the model's matrices; new biases are zero anyway.

    Quantized matrices do not count: their entries are not what they hold.
    """
    matrices = [parameter.detach() for parameter in model.parameters() if parameter.dim() > 1]
    plain = [matrix for matrix in matrices if type(matrix) is torch.Tensor and matrix.is_floating_point()]
    zeros = sum(matrix.numel() - int(torch.count_nonzero(matrix)) for matrix in plain)
    return zeros / max(1, sum(matrix.numel() for matrix in plain))


def _state(compact: bool, pending: bool, weights: bool, zeros: float) -> str:
    words = ["compact"] * compact + ["with a head mask"] * pending + ["with pruned weights"] * weights
    return ", ".join(words) or ("dense" if zeros <= DENSE else "with zeros of unknown origin")


def _sizes_table(found: dict[str, Any]) -> str:
    sizes = found["sizes"]
    lines = {"parameters": "parameters", "bytes": "bytes of parameters", "macs": f"MACs of {found['length']} tokens"}
    rows: list[tuple] = [(words, *(count(size[key]) for size in sizes.values())) for key, words in lines.items()]
    rows.append(("of them in attention", *(f"{size['attention_macs'] / size['macs']:.1%}" for size in sizes.values())))
    plain = "compact" if found["state"].startswith("compact") and len(sizes) == 1 else "now"
    first = "dense" if found["state"] in ("dense", "with a head mask") else plain
    header = ("", first, *["compact"] * (len(sizes) - 1))
    table = text_table(header, rows)
    weights = found["weights"]
    if weights:
        table += f"\nOf {weights['weights_total']:,} weights {weights['weights_kept']:,} are kept: a density of "
        table += f"{weights['density']:.2%} ({weights['method']})."
        if "weights_of_dense" in weights:
            table += f" With the removed heads there were {weights['weights_of_dense']:,}: a density of "
            table += f"{weights['density_of_dense']:.2%}."
        if weights.get("left_dense"):
            left = weights["left_dense"]
            table += f"\nNot pruned are {sum(left.values()):,} weights of {numbered(left)}."
    if found["zeros_of_matrices"] > DENSE:
        table += f"\nOf the entries of matrices {found['zeros_of_matrices']:.1%} are zero."
    if found["mac_bound"]:
        share = sizes["compact"]["parameters"] / sizes["now"]["parameters"]
        table += f"\nThe compact model has {share:.1%} of the parameters; by its MACs it can be "
        table += f"{found['mac_bound']:.2f} times as fast."
    if found["cannot_be_compact"]:
        table += f"\n{found['cannot_be_compact']}"
    return table
