"""A method that uses the whole contract, and writes down what is asked of it: in a plain loop and in every host."""

import contextlib
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from head_pruning import Pruner

#: Updates of a run, the first of its second phase, and by what the learning rate is multiplied.
UPDATES, SECOND = 6, 3
FACTORS = (1.0, 0.5, 2.0, 1.0, 0.25, 1.0)
UPDATE = ("before_update", "loss", "loss", "after_backward", "before_step", "optimizer", "after_step")


@dataclass
class ProbeConfig:
    """Options of the probe."""

    probe_strength: float = field(default=0.1, metadata={"help": "weight of the term that the probe adds"})


class Probe(Pruner):
    """Halves the task loss, adds a term of hidden states and attentions, and trains in two phases."""

    name = "probe"
    kind = "distils"
    needs = frozenset({"hidden_states", "attentions"})

    def __init__(self, config=None):
        super().__init__(config or ProbeConfig())
        self.seen, self.rates, self.calls = [], [], 0

    def attach(self, session):
        super().attach(session)
        self.second = False

    def enter_phase(self, phase):
        self.seen.append(f"enter_phase {phase}")
        self.second = bool(phase)

    def before_update(self, step):
        self.seen.append("before_update")

    def loss(self, loss, inputs, outputs):
        self.seen.append("loss")
        layers = len(self.session.unit_map.layers)
        stacks = len({name.rpartition(".")[0] for name in self.session.unit_map.layers})
        assert len(outputs.hidden_states) == layers + stacks
        assert len(outputs.attentions) == len(self.session.unit_map.attention)
        assert all(torch.is_tensor(logits) for logits in outputs.logits)
        self.calls += 1
        batch = outputs.hidden_states[0].shape[0]
        terms = []
        for state, mask in zip(outputs.hidden_states, outputs.masks):
            assert state.dim() == 3 and state.shape[0] == batch and state.requires_grad
            assert mask is None or mask.dtype == torch.bool and mask.shape == state.shape[:2]
            kept = state if mask is None else state[mask]
            terms.append(kept.float().square().mean())
        for site, each in zip(self.session.unit_map.attention, outputs.attentions):
            assert each.dim() == 4 and each.shape[:2] == (batch, site.heads) and each.requires_grad
            terms.append(each.float().square().mean())
        term = self.config.probe_strength * torch.stack(terms).mean()
        return 0.5 * loss + outputs.weight * term * (2.0 if self.second else 1.0)

    def after_backward(self, loss_scale, denominator, micro_batches):
        self.seen.append("after_backward")

    def before_step(self, step):
        self.seen.append("before_step")

    def after_step(self, step, lr_factor):
        self.seen.append("after_step")

    def skip_update(self, step):
        self.seen.append("skip_update")

    def lr_factor(self, step):
        return FACTORS[step]

    def phase(self, step):
        return int(step >= SECOND)

    def schedule_end(self, step):
        return SECOND if step < SECOND else None

    def state_dict(self):
        return {"calls": np.array([float(self.calls)])}

    def load_state_dict(self, state):
        self.calls = int(state["calls"][0])


@contextlib.contextmanager
def watching(probe):
    """Inside the block each step of an optimizer is written down among the hooks, with its learning rate."""

    def look(optimizer, args, kwargs):
        probe.seen.append("optimizer")
        probe.rates.append(float(optimizer.param_groups[0]["lr"]))

    handle = register_optimizer_step_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()


def expected(first: int = 0, last: int = UPDATES) -> list[str]:
    """What a run of the updates ``first`` to ``last`` - 1, of two micro-batches each, asks of the probe."""
    hooks = ["enter_phase 1"] if first > SECOND else []  # before a resumed run builds its optimizer
    for step in range(first, last):
        hooks += [*(["enter_phase 1"] if step == SECOND else []), *UPDATE]
    return hooks
