"""Time of the gates' own arithmetic: ``python -m benchmarks.gates [--json]``.

Compares the recursion written as a plain loop of K softmaxes in float64, with torch's autograd for its gradient, with
SoftTopK: forward and backward together, one thread, the two taking turns, the lowest processor time of all turns.
Beside them the exact subset: a draw of the conditional Bernoulli, its marginals and their gradient. Its time should
not depend on how many heads stay: ``subset_flat_n144`` is the largest over the smallest time of 12 to 132 of 144
heads, which take turns with each other; 2 at most is asked for.
"""

import argparse
import json
import time
from typing import Any, Callable, Sequence

import numpy as np
import torch

from head_pruning.gates import SoftTopK, gumbel, plan_rounds
from head_pruning.gates.engine.conditional_bernoulli import ConditionalBernoulli
from head_pruning.report import text_table

TINY = torch.finfo(torch.float64).tiny
SIZES = ((144, 132, 0.1), (144, 72, 0.1), (144, 12, 0.1), (72, 36, 0.1), (36, 9, 0.1))
SATURATED = (144, 132, 1e-8)
FLAT = (144, (12, 36, 72, 108, 132))


def plain_loop(logits: torch.Tensor, noise: torch.Tensor, keep_heads: int, temperature: float) -> torch.Tensor:
    """The mask, as a graph of torch operations."""
    r = logits + noise
    p = torch.exp(torch.log_softmax(r / temperature, -1))
    mask = p
    for _ in range(keep_heads - 1):
        r = r + torch.log(torch.clamp_min(1.0 - p, TINY))
        p = torch.exp(torch.log_softmax(r / temperature, -1))
        mask = mask + p
    return mask


def lowest_times(candidates: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Milliseconds of processor time of each candidate: the lowest of ``repeats`` turns."""
    times = [float("inf")] * len(candidates)
    for _ in range(repeats):
        for index, candidate in enumerate(candidates):
            start = time.process_time()
            candidate()
            times[index] = min(times[index], time.process_time() - start)
    return [1000.0 * seconds for seconds in times]


def measure(num_heads: int, keep_heads: int, temperature: float, repeats: int) -> list[float]:
    """Milliseconds of the plain loop, of SoftTopK (raises AssertionError when they disagree) and of the subset."""
    rng = np.random.default_rng(0)
    logits, gradient = rng.normal(size=num_heads), rng.normal(size=num_heads)
    noise = gumbel(rng.random(num_heads))
    rounds = plan_rounds(num_heads, keep_heads)
    leaf = torch.from_numpy(logits.copy()).requires_grad_(True)
    shared_noise, shared_gradient = torch.from_numpy(noise), torch.from_numpy(gradient)

    def loop() -> None:
        leaf.grad = None
        plain_loop(leaf, shared_noise, keep_heads, temperature).backward(shared_gradient)

    def closed_form() -> np.ndarray:
        return SoftTopK(logits + noise, rounds, temperature).backward(gradient)

    loop()
    expected = leaf.grad.numpy()
    np.testing.assert_allclose(closed_form(), expected, rtol=0, atol=1e-6 * max(1.0, np.abs(expected).max()))
    return lowest_times([loop, closed_form, exact(logits, gradient, keep_heads)], repeats)


def exact(logits: np.ndarray, gradient: np.ndarray, keep_heads: int) -> Callable[[], np.ndarray]:
    """An update of the exact subset: draw, marginals, gradient."""

    def once() -> np.ndarray:
        subset = ConditionalBernoulli(logits, keep_heads)
        subset.sample(np.random.default_rng([0, 1, 0]))
        return subset.covariance_times(gradient)

    return once


def measure_flat(num_heads: int, counts: Sequence[int], repeats: int) -> list[float]:
    """Milliseconds of the exact subset for each number of heads that stay, in turns."""
    rng = np.random.default_rng(0)
    logits, gradient = rng.normal(size=num_heads), rng.normal(size=num_heads)
    return lowest_times([exact(logits, gradient, count) for count in counts], repeats)


def main() -> None:
    """Print the table, or with ``--json`` one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--repeats", type=int, default=60, help="turns per size; the fastest counts")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error("--repeats must be 1 or more")
    torch.set_num_threads(1)
    results, rows = {}, []
    for num_heads, keep_heads, temperature in (*SIZES, SATURATED):
        slow, fast, subset = measure(num_heads, keep_heads, temperature, options.repeats)
        name = f"n{num_heads}_k{keep_heads}"
        if temperature == SATURATED[2]:
            name = f"saturated_{name}"
        else:
            results[f"subset_ms_{name}"] = round(subset, 4)
            results[f"subset_over_dsp_{name}"] = round(subset / fast, 3)
        results[f"topk_speedup_{name}"] = round(slow / fast, 3)
        results[f"topk_autograd_ms_{name}"] = round(slow, 4)
        results[f"topk_ms_{name}"] = round(fast, 4)
        cells = (
            num_heads,
            keep_heads,
            f"{temperature:g}",
            f"{slow:.3f}",
            f"{fast:.3f}",
            f"{slow / fast:.1f}x",
            f"{subset:.3f}",
        )
        rows.append(cells)
    flat = measure_flat(*FLAT, options.repeats)
    results[f"subset_flat_n{FLAT[0]}"] = round(max(flat) / min(flat), 3)
    if options.json:
        print(json.dumps(results))
    else:
        print(
            text_table(("heads", "kept", "temperature", "autograd ms", "SoftTopK ms", "speed-up", "subset ms"), rows)
        )
        told = ", ".join(f"{count}: {ms:.3f}" for count, ms in zip(FLAT[1], flat))
        print(f"subset ms of {FLAT[0]} heads by how many stay: {told}; within {max(flat) / min(flat):.2f}x")


if __name__ == "__main__":
    main()
