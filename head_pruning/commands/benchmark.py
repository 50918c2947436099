"""``head-pruning benchmark``: how much faster a pruned model is, beside what its MACs allow.

With one model that has a head mask: the dense model against the same with the other heads cut out. With two models:
the first against the second. One forward pass each (of a sequence-to-sequence model: with as many target tokens), in
turns; the shortest time counts.
"""

import argparse
import copy
import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional

import torch

from ..errors import HeadPruningError
from ..hosts import Host, HostModel, find_host
from ..inference.runtimes import onnx_pass, onnx_session, torch_pass
from ..inference.sizes import mac_bound, measure_sizes
from ..inference.timing import fastest, stopwatch
from ..masks import HeadMask, full_mask
from ..report.tables import text_table
from ..surgery.removal import remove_heads
from .common import chosen_length, count, given_mask, note, note_step, print_json
from .flags import COUNTS


@dataclass(frozen=True)
class Contestant:
    """One model of the comparison: where it came from, and which of its heads are cut out to run it."""

    name: str
    host: Host
    path: Path
    loaded: HostModel
    mask: Optional[HeadMask] = None


def run(args: argparse.Namespace) -> None:
    """The command."""
    found = measured(args)
    if args.json:
        print_json(found)
    else:
        print(table(found))


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """What ``--json`` prints."""
    for name in COUNTS:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise HeadPruningError(f"--{name} must be 1 or more; it is {value}.")
    if args.model2 and args.mask:
        raise HeadPruningError("--mask is for one model, to be compared with itself; leave out --mask or the second.")
    contestants = _contestants(args)
    args.length = chosen_length(args.length, [contestant.loaded for contestant in contestants])
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="head-pruning-") as folder:
        return compare(contestants, args, Path(folder))


def _contestants(args: argparse.Namespace) -> list[Contestant]:
    found = []
    for path in filter(None, (args.model, args.model2)):
        host = find_host(path)
        note(f"loading {path}")
        found.append(Contestant(path, host, Path(path), host.load(Path(path), given_mask(args.mask))))
    if found[0].path == found[-1].path and len(found) == 2:
        raise HeadPruningError("Both models are the same; name one alone, or two different ones.")
    first = found[0]
    mask = first.loaded.mask
    if len(found) == 2 or mask is None or mask.keep.all():
        return found
    dense = Contestant(f"{first.name}, dense", first.host, first.path, first.loaded, full_mask(first.loaded.unit_map))
    cut = copy.deepcopy(first.loaded.model)
    remove_heads(cut, first.loaded.unit_map, mask)
    loaded = HostModel(cut, first.loaded.unit_map, None, first.loaded.example)
    return [dense, Contestant(f"{first.name}, compact", first.host, first.path, loaded, mask)]


def compare(contestants: list[Contestant], args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """:func:`measured` of these; ``folder`` is for exported files."""
    sizes = [measure_sizes(c.loaded.model, c.loaded.unit_map, c.loaded.example(1, args.length)) for c in contestants]
    prepare = _prepare(contestants, args, folder)
    watch = stopwatch("cpu", args.threads)
    times = {}
    for batch in dict.fromkeys((1, args.batch)):
        passes = prepare(batch)
        shown = f"batch {batch}: round {{}} of {args.rounds}"
        times[batch] = fastest(passes, args.rounds, watch, functools.partial(_note_turn, shown))
    note_step("")
    names = [contestant.name for contestant in contestants]
    found: dict[str, Any] = {name: getattr(args, name) for name in (*COUNTS, "runtime")}
    found["clock"] = "processor time" if args.threads == 1 else "wall clock"
    found["models"] = [
        {
            "model": name,
            "parameters": size.parameters,
            "macs": size.macs,
            "latency_ms": round(times[1][name], 3),
            "examples_per_second": round(1000.0 * args.batch / times[args.batch][name], 3),
        }
        for name, size in zip(names, sizes)
    ]
    if len(names) == 2:
        first, second = names
        bound = mac_bound(*sizes)
        speed_ups = {"latency": times[1], "throughput": times[args.batch]}
        found["mac_bound"] = round(bound, 4)
        found["speed_up"] = {what: round(taken[first] / taken[second], 4) for what, taken in speed_ups.items()}
        found["fraction_of_bound"] = {what: round(value / bound, 4) for what, value in found["speed_up"].items()}
    return found


def _prepare(
    contestants: list[Contestant], args: argparse.Namespace, folder: Path
) -> Callable[[int], dict[str, Callable[[], Any]]]:
    """For a batch size, the pass of each contestant."""
    if args.runtime == "torch":
        return lambda batch: {
            c.name: torch_pass(c.loaded.model, c.loaded.example(batch, args.length)) for c in contestants
        }
    sessions = {}
    for number, contestant in enumerate(contestants):
        if "onnx" not in contestant.host.exports:
            raise HeadPruningError(
                f"A model of {contestant.host.name} cannot be exported to onnx; choose --runtime torch."
            )
        note(f"exporting {contestant.name}")
        file = folder / f"{number}.onnx"
        # Two models are compared as they are, so a head mask beside them is not applied.
        whole = None if contestant.loaded.mask is None else full_mask(contestant.loaded.unit_map)
        contestant.host.exports["onnx"](contestant.path, file, contestant.mask or whole)
        sessions[contestant.name] = onnx_session(file, args.threads)
    return lambda batch: {
        c.name: onnx_pass(sessions[c.name], c.loaded.example(batch, args.length)) for c in contestants
    }


def _note_turn(shown: str, turn: int) -> None:
    note_step(shown.format(turn))


def table(found: dict[str, Any]) -> str:
    """What :func:`measured` found, for people."""
    header = ("", "parameters", "MACs", "ms, batch 1", f"examples/s, batch {found['batch']}")
    rows: list[tuple] = [
        (m["model"], count(m["parameters"]), count(m["macs"]), m["latency_ms"], m["examples_per_second"])
        for m in found["models"]
    ]
    if "speed_up" in found:
        gains, shares = found["speed_up"], found["fraction_of_bound"]
        rows.append(("speed-up", "", f"{found['mac_bound']:.2f}", gains["latency"], gains["throughput"]))
        rows.append(("of the MACs' bound", "", "", *(f"{value:.1%}" for value in shares.values())))
    about = f"{found['runtime']}, {found['length']} tokens, {found['threads']} thread(s), {found['clock']}, "
    return f"{text_table(header, rows)}\n{about}least of {found['rounds']} turns"
