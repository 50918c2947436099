"""One update of sparse progressive distillation on a real BERT against the mathematics written once more."""

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_plugin import pruner
from hf_plugin.mapping.unit_map import unit_map
from hf_plugin.training.session import open_session
from tests.core.gates.test_own_reference_gates import drawn_batch
from tests.reference import distillation as own
from tests.reference.bert import bert

LAYERS, HEADS = 3, 2


def model(seed: int, start=None) -> BertForSequenceClassification:
    config = BertConfig(
        hidden_size=8,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=12,
        vocab_size=20,
        max_position_embeddings=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )
    found, numbers = BertForSequenceClassification(config).double(), torch.Generator().manual_seed(seed)
    if start is not None:
        found.load_state_dict(start.state_dict())
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if start is None or ".layer." in name:
                drawn = torch.randn(parameter.shape, generator=numbers, dtype=torch.float64)
                parameter.copy_(drawn * 0.4 + (0.0 if start is None else parameter))
    return found


@pytest.mark.parametrize("drawn", [(1, 1, 1), (0, 1, 0), (1, 0, 1)])
def test_losses_and_gradients(drawn):
    teacher = model(0)
    student = model(1, start=teacher).train()
    states = [{name: value.numpy().copy() for name, value in each.state_dict().items()} for each in (teacher, student)]
    options = {"temperature": 2.0, "distill_padding": True, "published_schedule": True}
    spd = pruner("spd", teacher_path="drawn", replacing_rate=0.5, **options)
    spd.draw = lambda step: np.array(drawn, dtype=bool)
    session = open_session(
        student,
        [spd],
        load_teacher=lambda path, needs: (teacher, unit_map(teacher)),
        total_steps=1,
        steps_per_epoch=1,
    )
    batch = drawn_batch(3)
    tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
    session.before_update(0)
    out = student(**tensors)
    total = session.loss(out.loss, tensors, out, masks={"encoder": tensors["attention_mask"].bool()})
    total.backward()

    def losses(state):
        mine = bert([state if own_ else states[0] for own_ in drawn], batch, HEADS)
        return own.losses(mine, bert([states[0]] * LAYERS, batch, HEADS), 2.0)

    assert total.item() == pytest.approx(sum(losses(states[1])), rel=1e-9)
    for layer, part in ((0, "attention.self.value"), (1, "output.dense"), (2, "intermediate.dense")):
        name = f"bert.encoder.layer.{layer}.{part}.weight"
        gradient = student.get_parameter(name).grad
        if not drawn[layer]:
            assert gradient is None
            continue
        for place in ((0, 0), (3, 5)):
            moved = [{**states[1], name: states[1][name].copy()} for _ in range(2)]
            for state, step in zip(moved, (1e-6, -1e-6)):
                state[name][place] += step
            difference = (sum(losses(moved[0])) - sum(losses(moved[1]))) / 2e-6
            assert gradient[place].item() == pytest.approx(difference, rel=1e-5, abs=1e-8)
