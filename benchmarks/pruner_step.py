"""What a weight pruner costs a training step: ``python -m benchmarks.pruner_step [--json] [--results]``.

PLATON (beta2 0.95, a mask every deltaT = 10 updates) on the 85.0 M pruned weights and biases of BERT-base, with random
gradients, beside the published formulas written straightforwardly (new tensors, ``torch.cat`` and ``kthvalue``) and
beside one step of ``torch.optim.AdamW`` with default arguments on the same tensors. The cubic phase is averaged over
windows of ten updates with one mask, the final phase over windows of ten masked updates, each updating its averages
once. All in one process, in turns. Each window of the pruner is divided by the mean of ten steps of AdamW just before
it and ten just after; the ratio is the median over the rounds, with its quartiles beside it (processor time with one
thread, wall time with more). Milliseconds are minima.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
from torch import nn

from head_pruning import PruningSession
from head_pruning.files import atomic_path, write_json
from head_pruning.report import text_table
from head_pruning.weights.platon import PlatonConfig, PlatonPruner

RESULTS = Path(__file__).resolve().parent / "results"
BETA1, BETA2, WINDOW, DENSITY = 0.85, 0.95, 10, 0.1
TOTAL = 10_000_000  # updates; the cubic phase is the first half but for one window, the final phase the second half
# What the cost depends on: option to default and meaning.
SIZES = {"layers": (12, "layers of the model"), "hidden": (768, "width of the model")}


def model(layers: int, hidden: int) -> nn.Module:
    """The pruned tensors of a BERT: six linear maps per layer."""
    shapes = [(hidden, hidden)] * 4 + [(hidden, 4 * hidden), (4 * hidden, hidden)]
    return nn.ModuleList(nn.Linear(*shape) for _ in range(layers) for shape in shapes)


class Reference:
    """The published formulas, one new tensor after the other (without their crash at k = 0)."""

    def __init__(self, weights: nn.Module) -> None:
        self.weights = dict(weights.named_parameters())
        self.window, self.average, self.uncertainty = (
            {name: torch.zeros_like(p) for name, p in self.weights.items()} for _ in range(3)
        )

    @torch.no_grad()
    def step(self, t: int, density: float, final: bool) -> None:
        """One update."""
        place = t % WINDOW
        for name, p in self.weights.items():
            if place == 0:
                self.average[name] = BETA1 * self.average[name] + (1 - BETA1) * self.window[name]
                deviation = (self.window[name] - self.average[name]).abs()
                self.uncertainty[name] = BETA2 * self.uncertainty[name] + (1 - BETA2) * deviation
                self.window[name] = (p * p.grad).abs()
            else:
                self.window[name] = (self.window[name] * place + (p * p.grad).abs()) / (place + 1)
        if final or place == 0:
            scores = {name: self.average[name] * self.uncertainty[name] for name in self.weights}
            flat = torch.cat([score.view(-1) for score in scores.values()])
            threshold = torch.kthvalue(flat, max(1, int(flat.numel() * (1 - density))))[0].item()
            for name, p in self.weights.items():
                p.masked_fill_(scores[name] < threshold, 0.0)


class Contest:
    """One set of weights and gradients, and what is compared on them."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.model = model(options.layers, options.hidden)
        self.threads = options.threads
        for p in self.model.parameters():
            p.grad = torch.randn_like(p)
        self.size = sum(p.numel() for p in self.model.parameters())
        config = PlatonConfig(
            final_threshold=DENSITY,
            warmup_steps=TOTAL // 2,
            initial_warmup=0,
            final_warmup=1,
            beta1=BETA1,
            beta2=BETA2,
            deltaT=WINDOW,
            weights_include=".",
        )
        self.pruner = PlatonPruner(config)
        self.session = PruningSession(self.model, None, [self.pruner], total_steps=TOTAL).attach()
        self.reference = Reference(self.model)
        parameters = list(self.model.parameters())
        self.adamw = {
            "AdamW": torch.optim.AdamW(parameters),
            "AdamW, fused": torch.optim.AdamW(parameters, fused=True),
        }
        # In the middle of the cubic phase, and in the final one.
        self.starts = {"cubic": TOTAL // 4 // WINDOW * WINDOW, "final": TOTAL // 4 * 3 // WINDOW * WINDOW}

    def ours(self, phase: str, steps: int = WINDOW) -> None:
        """The pruner's part of the updates of a window that starts at a multiple of deltaT."""
        for offset in range(steps):
            step = self.starts[phase] + offset - 1  # sessions count from 0, the schedule from 1
            self.session.before_update(step)
            self.session.after_backward()
            self.session.before_step()
            self.session.after_step()

    def straightforward(self, phase: str, steps: int = WINDOW) -> None:
        """The same by the reference."""
        for t in range(self.starts[phase], self.starts[phase] + steps):
            self.reference.step(t, self.pruner.density_at(t), phase == "final")

    def time(self, action: Callable[[], Any]) -> float:
        """Milliseconds: of the processor with one thread, by the clock with more."""
        clock = time.process_time if self.threads == 1 else time.perf_counter
        start = clock()
        action()
        return 1000.0 * (clock() - start)

    def check(self) -> None:
        """Both zero the same weights."""
        before = [p.detach().clone() for p in self.model.parameters()]
        results = []
        for run in (self.ours, self.straightforward):
            for phase in self.starts:
                run(phase, 2)
            run("final", 1)
            results.append([p.detach().clone() for p in self.model.parameters()])
            with torch.no_grad():
                for p, kept in zip(self.model.parameters(), before):
                    p.copy_(kept)
        different = sum(int(torch.count_nonzero((a == 0) != (b == 0))) for a, b in zip(*results))
        if different > 1e-6 * self.size:  # scores are rounded differently
            raise SystemExit(f"the pruner and the reference zero different weights: {different} of {self.size}")


Times = dict[str, list[float]]


def measure(options: argparse.Namespace) -> tuple[Times, Times, int, int]:
    """Milliseconds per update and ratios to AdamW of each contestant; the number of weights; bytes of the state."""
    contest = Contest(options)
    contest.check()
    turns: dict[str, tuple[int, Callable[[], Any]]] = {
        "PLATON, cubic": (WINDOW, lambda: contest.ours("cubic")),
        "PLATON, final": (WINDOW, lambda: contest.ours("final")),
        "AdamW, fused": (WINDOW, lambda: [contest.adamw["AdamW, fused"].step() for _ in range(WINDOW)]),
        "reference, cubic": (WINDOW, lambda: contest.straightforward("cubic")),
        # The reference draws its mask anew in each update of the final phase, so one of them tells.
        "reference, final": (1, lambda: contest.straightforward("final", 1)),
    }
    times: Times = {name: [] for name in ("AdamW", *turns)}
    ratios: Times = {name: [] for name in turns}

    def adamw() -> float:
        taken = contest.time(lambda: [contest.adamw["AdamW"].step() for _ in range(WINDOW)]) / WINDOW
        times["AdamW"].append(taken)
        return taken

    for steps, action in turns.values():  # to warm up
        if steps > 1:
            action()
    adamw()
    times["AdamW"].clear()
    before = adamw()
    for turn in range(options.rounds):
        for name, (steps, action) in turns.items():
            if name.startswith("reference") and turn >= options.reference_rounds:
                continue
            taken, after = contest.time(action) / steps, adamw()
            times[name].append(taken)
            ratios[name].append(2.0 * taken / (before + after))
            before = after
    state = sum(t.numel() * t.element_size() for t in contest.session.tensor_state().values())
    return times, ratios, contest.size, state


def summary(times: Times, ratios: Times, size: int, state: int, options: argparse.Namespace) -> dict[str, Any]:
    """What ``--json`` prints: ratios to one step of AdamW with their quartiles, and milliseconds per update."""
    found: dict[str, Any] = {}
    fused = float(np.median(ratios["AdamW, fused"]))
    for method, key in (("PLATON", "platon"), ("reference", "reference")):
        for phase in ("cubic", "final"):
            ratio = float(np.median(ratios[f"{method}, {phase}"]))
            found[f"{key}_{phase}_over_adamw"] = round(ratio, 4)
            found[f"{key}_{phase}_over_fused_adamw"] = round(ratio / fused, 4)
    return {
        **found,
        "quartiles": {name: np.quantile(values, (0.25, 0.75)).round(4).tolist() for name, values in ratios.items()},
        "ms_per_update": {name: round(min(values), 2) for name, values in times.items()},
        "weights": size,
        "state_bytes_per_weight": round(state / size, 3),
        **{name: getattr(options, name) for name in ("threads", "rounds", *SIZES)},
    }


def table(times: Times, ratios: Times) -> str:
    """The fastest turn of each, the ratios to AdamW, and their median as a multiple of the fused one."""
    rows, fused = [("AdamW", f"{min(times['AdamW']):.1f}", "", "", "", "")], np.median(ratios["AdamW, fused"])
    for name, values in ratios.items():
        middle, low, high = np.quantile(values, (0.5, 0.25, 0.75))
        rows.append(
            (name, f"{min(times[name]):.1f}", f"{middle:.3f}", f"{low:.3f}", f"{high:.3f}", f"{middle / fused:.2f}")
        )
    return text_table(("", "ms", "of AdamW", "25 %", "75 %", "of fused AdamW"), rows)


def write_results(outcome: dict[str, Any], text: str) -> None:
    """``benchmarks/results/pruner_step.md`` and ``.json``."""
    write_json(RESULTS / "pruner_step.json", outcome)
    title, about = __doc__.strip().split("\n\n", 1)
    lines = (
        f"# {title.split(':')[0]}",
        f"`python -m benchmarks.pruner_step --results`: {about}",
        f"{outcome['weights']} weights, {outcome['state_bytes_per_weight']:g} bytes of state per weight; threads: "
        f"{outcome['threads']}; rounds: {outcome['rounds']}; cpu, torch {torch.__version__}.",
        f"```\n{text}\n```",
    )
    with atomic_path(RESULTS / "pruner_step.md") as temporary:
        Path(temporary).write_text("\n\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Print the table, or with ``--json`` one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--results", action="store_true", help="write benchmarks/results/pruner_step.{md,json}")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each (default: %(default)s)")
    parser.add_argument(
        "--reference-rounds", type=int, default=2, help="turns of the slow reference (default: %(default)s)"
    )
    for name, (value, words) in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{words} (default: %(default)s)")
    options = parser.parse_args()
    if options.rounds < 1 or options.reference_rounds < 1:
        parser.error("--rounds and --reference-rounds must be 1 or more")
    torch.set_num_threads(options.threads)
    times, ratios, size, state = measure(options)
    outcome, text = summary(times, ratios, size, state, options), table(times, ratios)
    if options.results:
        write_results(outcome, text)
    print(json.dumps(outcome) if options.json else text)


if __name__ == "__main__":
    main()
