"""Register a pruning method of your own, outside of this package, and run it: 4 of 16 heads stay.

    python examples/own_method.py

A method is a dataclass of options, a pruner, and one call of ``register_pruner``; the hosts then know it by its name.
This one learns a sigmoid gate per head and keeps the K highest. Model and data are made on the spot.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification

from head_pruning import HeadPruningError, register_pruner
from head_pruning.gates.base import HeadGateConfig, HeadGatePruner
from hf_plugin import open_session, pruner

VOCABULARY, LENGTH, UPDATES = 12, 8, 200


@dataclass
class SigmoidConfig(HeadGateConfig):
    """Options of sigmoid gates: those that all methods with gates share, and one of its own."""

    sharpness: float = field(default=4.0, metadata={"help": "how steep the gates are over their logits, above 0"})


class SigmoidPruner(HeadGatePruner):
    """Learns a sigmoid gate per head; the K highest stay."""

    name = "sigmoid"

    def check_options(self) -> None:
        self.require_count()
        if self.config.sharpness <= 0:
            raise HeadPruningError(f"--sharpness is {self.config.sharpness}; it must be above 0.")
        super().check_options()

    def draw(self, step: int) -> np.ndarray:
        """The gates of one update, ``float64[N]``."""
        self.opened = 1 / (1 + np.exp(-self.config.sharpness * self.logits))
        return self.opened

    def chain(self, gradient: np.ndarray) -> np.ndarray:
        """The gradient with respect to the logits from that with respect to the gates."""
        return gradient * self.config.sharpness * self.opened * (1 - self.opened)


register_pruner(name="sigmoid", config=SigmoidConfig, pruner=SigmoidPruner)


def batch(step: int, examples: int = 64) -> dict[str, torch.Tensor]:
    """Sequences whose first token is 0, and whether one of the others is 1."""
    ids = torch.randint(1, VOCABULARY, (examples, LENGTH), generator=torch.Generator().manual_seed(step))
    ids[:, 0] = 0
    return {"input_ids": ids, "labels": (ids == 1).any(1).long()}


def main() -> None:
    """Train a small BERT with the method, then fix the heads that stay."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    sizes |= {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": LENGTH,
        "initializer_range": 0.1,
        "hidden_dropout_prob": 0.0,
    }
    model = BertForSequenceClassification(BertConfig(**sizes)).train()
    method = pruner("sigmoid", num_of_heads=4, joint_pruning=True, pruning_lr=0.05, sharpness=2.0)
    session = open_session(model, [method], total_steps=UPDATES)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(UPDATES):
        session.before_update(step)
        inputs = batch(step)
        outputs = model(**inputs)
        optimizer.zero_grad()
        session.loss(outputs.loss, inputs, outputs).backward()
        session.after_backward()
        session.before_step()
        optimizer.step()
        session.after_step()
        if step % 100 == 0:
            print(f"update {step:3d}  loss {outputs.loss.item():.3f}  open heads {method.expected_heads():.2f}")
    mask = session.harden()
    held_out = batch(-1, examples=1000)
    with torch.no_grad():
        right = (model.eval()(held_out["input_ids"]).logits.argmax(-1) == held_out["labels"]).float().mean().item()
    print(mask)
    print(f"accuracy with {mask.kept} of {mask.keep.size} heads by the method {method.name}: {right:.3f}")


if __name__ == "__main__":
    main()
