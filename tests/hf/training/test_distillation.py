"""Gates that learn to the end of training, beside a teacher."""

import copy

import pytest
import torch

from head_pruning import HeadPruningError
from hf_plugin import open_session, pruner
from hf_plugin.mapping.unit_map import unit_map
from tests.hf.few_models import batch_of, make

RUNS = {
    "plain": None,
    "checkpointed": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
    "compiled": None,
}
REFUSED = {"reentrant": "checkpointed reentrantly", "compiled": "donated buffers"}


def gate_gradients(name: str, run: str, **options) -> torch.Tensor:
    """Of an update with the straight-through estimator and, where ``options`` are given, a teacher."""
    model, teacher = make(name).train(), make(name)
    model.config.use_cache = False
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    if RUNS[run] is not None:
        older = model.gradient_checkpointing_enable
        enable = getattr(model, "activation_checkpointing_enable", older)
        enable(**{f"{'gradient' if enable == older else 'activation'}_checkpointing_kwargs": RUNS[run]})
    pruners = [pruner("ste", num_of_heads=2, joint_pruning=True)]
    if options:
        pruners.append(pruner("logits", distill_logits=1.0, teacher_path="given", **options))
    given = lambda path, needs: (copy.deepcopy(teacher).eval(), unit_map(teacher))  # noqa: E731
    session = open_session(model, pruners, load_teacher=given, total_steps=4)
    torch.manual_seed(3)  # dropout's draws
    session.before_update(0)
    inputs = batch_of(name)
    called = torch.compile(model) if run == "compiled" else model
    session.loss(called(**inputs).loss, inputs).backward()
    return session.gates.gradients.clone()


@pytest.mark.parametrize("run", [*list(RUNS)[:3], pytest.param("compiled", marks=pytest.mark.slow)])
def test_they_learn_from_the_task_loss_alone_unless_told_to(run):
    alone = gate_gradients("llama", run)
    mixed = gate_gradients("llama", run, distill_while_choosing=True)
    assert (mixed - alone).abs().max() > 1e-2 * alone.abs().max()
    if run in REFUSED:
        with pytest.raises(HeadPruningError, match=f"{REFUSED[run]}.* Add --distill-while-choosing"):
            gate_gradients("llama", run, distill_while_choosing=False)
        return
    taught = gate_gradients("llama", run, distill_while_choosing=False)
    torch.testing.assert_close(taught, alone, rtol=0, atol=1e-4 * float(alone.abs().max()))
