"""Prune a model of your own in a plain PyTorch loop: 4 of 16 attention heads stay.

    python examples/plain_loop.py

The model is a small transformer encoder written here, with random weights. The task: does the first token of a
sequence occur again in it? Model and data are made on the spot; nothing is downloaded.
"""

import torch
from torch import nn

from head_pruning import AttentionSite, PruningSession, UnitMap
from head_pruning.gates.head_sensitivity import HeadSensitivityConfig, HeadSensitivityPruner

VOCABULARY, LENGTH, WIDTH, LAYERS, HEADS, KEEP = 12, 8, 32, 4, 4, 4
UPDATES = 400


class Attention(nn.Module):
    """Self-attention; the input of ``out`` is the heads side by side, which is what a gate scales."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        heads = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(heads.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention and a feed-forward block, each with a norm before it and a residual connection around it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm1, self.norm2 = Attention(), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class Classifier(nn.Module):
    """Token ids ``[examples, tokens]`` to two logits each."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.answer = nn.Linear(WIDTH, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.layers(self.tokens(ids) + self.positions.weight)
        return self.answer(x[:, 0])


def batch(step: int, examples: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences, in about half of which the first token occurs again, and whether it does."""
    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(VOCABULARY, (examples, LENGTH), generator=draw)
    return ids, (ids[:, 1:] == ids[:, :1]).any(1).long()


def accuracy(model: nn.Module) -> float:
    """Percent of 2000 sequences that training does not see."""
    ids, labels = batch(-1, examples=2000)
    with torch.no_grad():
        return 100 * (model.eval()(ids).argmax(1) == labels).float().mean().item()


def main() -> None:
    """Train with the gates on, keep the best heads, and show what is left."""
    torch.manual_seed(0)
    model = Classifier()
    # Where the heads are. hf_plugin.unit_map and fairseq_plugin find this out by themselves.
    sites = (
        AttentionSite(
            name=f"layers.{i}.attention",
            kind="encoder_self",
            layer=f"layers.{i}",
            heads=HEADS,
            head_dim=WIDTH // HEADS,
            out_proj=f"layers.{i}.attention.out",
            projections=tuple(f"layers.{i}.attention.{name}" for name in "qkv"),
        )
        for i in range(LAYERS)
    )
    # The number of heads falls from all to KEEP in the first half of training.
    config = HeadSensitivityConfig(num_of_heads=KEEP, joint_pruning=True, count_schedule="0:0.5")
    pruner = HeadSensitivityPruner(config)
    session = PruningSession(model, UnitMap(tuple(sites)), [pruner], total_steps=UPDATES).attach()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    model.train()
    for step in range(UPDATES):
        session.before_update(step)
        ids, labels = batch(step)
        outputs = model(ids)
        loss = session.loss(nn.functional.cross_entropy(outputs, labels), ids, outputs)
        optimizer.zero_grad()
        loss.backward()
        session.after_backward()
        session.before_step()
        optimizer.step()
        session.after_step()
        if step % 200 == 0 or step == UPDATES - 1:
            numbers = session.metrics()
            print(f"update {step:3d}  loss {loss.item():.3f}  open heads {numbers['heads_expected']:.2f}")

    mask = session.harden()  # exactly KEEP heads
    print(mask)
    print(f"accuracy with {mask.kept} of {mask.keep.size} heads: {accuracy(model):.1f} %")
    mask.save("plain_loop_masks.safetensors")
    session.detach()  # the model has all of its heads again; the mask is in the file


if __name__ == "__main__":
    main()
