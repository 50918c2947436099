"""The rewound learning rate of gradual pruning, as a factor on the host's linear one."""

from types import SimpleNamespace

import pytest
import torch

from head_pruning import HeadPruningError, PruningSession, build_pruner
from head_pruning.registry import get_method
from head_pruning.schedules import rewound_rate

TOTAL, WARMUP = 40, 4
STEPS = {"policy_begin_step": 8, "policy_end_step": 0.6, "pruning_frequency": 5}


def _session(**options) -> PruningSession:
    own = {"target_sparsity": 0.5, "weights_include": "weight", **STEPS, **options}
    pruner = build_pruner(get_method("gradual_magnitude"), SimpleNamespace(**own))
    return PruningSession(torch.nn.Linear(4, 4), None, [pruner], total_steps=TOTAL).attach()


def test_the_factor_makes_the_rewound_rate_of_the_linear_one():
    session = _session(lr_rewind=True)
    session.warmup_steps = WARMUP
    rates = []
    for step in range(TOTAL):
        linear = step / WARMUP if step < WARMUP else (TOTAL - step) / (TOTAL - WARMUP)
        wanted = rewound_rate(step, total=TOTAL, warmup=WARMUP, begin=8, end=24, interval=5)
        rates.append(linear * session.lr_factor(step))
        assert rates[step] == pytest.approx(wanted, rel=1e-14)
    assert rates[12] < rates[13] == pytest.approx(rates[8], rel=1e-14)


def test_it_needs_a_linear_schedule_and_else_steers_no_host():
    session = _session(lr_rewind=True)
    assert session.steers_host
    with pytest.raises(HeadPruningError, match="lr-rewind.*linear"):
        session.metrics()
    assert not _session().steers_host
