"""Parameters, multiply-accumulates and times."""

import pytest
import torch

from head_pruning import AttentionSite, UnitMap
from head_pruning.inference.sizes import mac_bound, measure_sizes
from head_pruning.inference.timing import fastest, stopwatch
from tests.macs import stack_macs


def test_counts_are_those_of_the_shapes(toy):
    model, unit_map = toy.make()
    source, target = torch.randn(2, 5, 12), torch.randn(2, 3, 12)
    sizes = measure_sizes(model, unit_map, {"source": source, "target": target})

    def attention(queries: int, keys: int) -> int:  # for 2 examples of width 12
        return 2 * (2 * queries * 12 * 12 + 2 * keys * 12 * 12 + 2 * queries * keys * 12)

    within = 2 * attention(5, 5) + attention(3, 5) + attention(3, 3)
    assert sizes.attention_macs == within
    assert sizes.macs == within + 2 * 3 * 12 * 5
    assert sizes.parameters == 4 * 4 * (12 * 12 + 12) + 12 * 5 + 5
    assert sizes.bytes == 4 * sizes.parameters
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_output_projection_outside_of_the_site_counts_as_attention_once(toy):
    model, unit_map = toy.make()
    inputs = {"source": torch.randn(1, 5, 12), "target": torch.randn(1, 3, 12)}
    (site,) = [site for site in unit_map.attention if site.name == "cross"]
    whole = measure_sizes(model, UnitMap((site,)), inputs)
    outside = AttentionSite("cross.q", site.kind, site.layer, 3, 4, site.out_proj, site.projections)
    projections = measure_sizes(model, UnitMap((outside,)), inputs)
    assert whole.attention_macs - projections.attention_macs == 2 * 3 * 5 * 12  # scores and sums are no projection


@pytest.mark.parametrize(
    ("shape", "attention", "bounds"),
    [
        # hidden, feed-forward, tokens: share of attention; bound at 3/4, 1/2, 1/4, 1/12 and 0 of the heads
        ((768, 3072, 32), 0.338, (1.09, 1.20, 1.34, 1.45, 1.51)),
        ((768, 3072, 128), 0.351, (1.10, 1.21, 1.36, 1.48, 1.54)),
        ((768, 3072, 256), 0.368, (1.10, 1.23, 1.38, 1.51, 1.58)),
        ((768, 3072, 512), 0.400, (1.11, 1.25, 1.43, 1.58, 1.67)),
        ((1024, 4096, 128), 0.347, (1.10, 1.21, 1.35, 1.47, 1.53)),
        ((512, 2048, 512), 0.429, (1.12, 1.27, 1.47, 1.65, 1.75)),
    ],
)
def test_bounds_of_known_shapes(shape, attention, bounds):
    dense = stack_macs(*shape)
    assert 1 - stack_macs(*shape, kept=0) / dense == pytest.approx(attention, abs=6e-4)
    for kept, bound in zip((3 / 4, 1 / 2, 1 / 4, 1 / 12, 0), bounds):
        assert dense / stack_macs(*shape, kept=kept) == pytest.approx(bound, abs=6e-3)


def test_bound_is_the_ratio_of_macs(toy):
    model, unit_map = toy.make()
    sizes = [
        measure_sizes(model, unit_map, {"source": torch.randn(n, 5, 12), "target": torch.randn(n, 3, 12)})
        for n in (3, 1)
    ]
    assert mac_bound(*sizes) == 3.0


def test_fastest_takes_turns_and_keeps_the_shortest_time():
    times = {"a": iter([9.0, 3.0, 7.0]), "b": iter([4.0, 5.0, 6.0])}
    runs, rounds = [], []

    def watch(action):
        name = action()
        return next(times[name])

    def action(name):
        return lambda: runs.append(name) or name

    found = fastest({name: action(name) for name in times}, 3, watch, rounds.append)
    assert found == {"a": 3.0, "b": 4.0} and rounds == [1, 2, 3]
    # One turn each to warm up; then both take one turn in each round.
    assert len(runs) == 8 and all(set(runs[i : i + 2]) == {"a", "b"} for i in range(0, 8, 2))


def test_fastest_goes_on_until_enough_time_has_passed():
    rounds = []
    fastest({"a": lambda: None}, 2, lambda action: 10.0, rounds.append, at_least=45.0)
    assert rounds == [1, 2, 3, 4, 5]


def test_stopwatch_counts_processor_time_in_milliseconds():
    def work():
        return sum(range(200_000))

    watch = stopwatch()
    assert 0.1 < watch(work) < 1000.0
    # Sleeping takes no processor time.
    assert watch(lambda: __import__("time").sleep(0.05)) < 20.0
    assert stopwatch(threads=2)(lambda: __import__("time").sleep(0.05)) > 45.0
