"""Adamax with decoupled decay, and how a Trainer gets it."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from head_pruning import HeadPruningError
from hf_plugin.command_line.arguments import parse
from hf_plugin.training.optimizers import Adamax, check_resumed, trainer_options
from tests.hf.tiny import tiny_bert

LINE = "--task_name MNLI --model_name_or_path m --output_dir out --use_cpu".split()


def walk(make, steps=7):
    """Where a parameter goes under always the same gradients."""
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(20, generator=generator))
    optimizer = make([parameter])
    for _ in range(steps):
        parameter.grad = torch.randn(20, generator=generator)
        optimizer.step()
    return parameter.detach(), optimizer


def test_without_decay_it_is_that_of_torch():
    ours, _ = walk(lambda p: Adamax(p, lr=0.01, eps=1e-6))
    theirs, _ = walk(lambda p: torch.optim.Adamax(p, lr=0.01, eps=1e-6))
    assert torch.equal(ours, theirs)


def test_the_decay_is_apart_from_the_gradient():
    """The rule of the published optimizer (with torch's correction of the first average), written out."""
    rate, decay, eps = 0.01, 0.5, 1e-6
    found, optimizer = walk(lambda p: Adamax(p, lr=rate, eps=eps, weight_decay=decay))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, generator=generator)
    average, largest = torch.zeros(20), torch.zeros(20)
    for t in range(1, 8):
        gradient = torch.randn(20, generator=generator)
        average = 0.9 * average + 0.1 * gradient
        largest = torch.maximum(0.999 * largest, gradient.abs() + eps)
        x = x - rate * (average / largest / (1 - 0.9**t) + decay * x)
    assert torch.allclose(found, x, atol=1e-6)
    assert optimizer.param_groups[0]["weight_decay"] == decay
    theirs, _ = walk(lambda p: torch.optim.Adamax(p, lr=rate, eps=eps, weight_decay=decay))
    assert not torch.allclose(theirs, x, atol=1e-3)


def test_a_parameter_without_gradient_stays():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = Adamax([parameter], lr=0.1, weight_decay=0.5)
    optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(3))


def test_gradients_of_a_closure():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = Adamax([parameter], lr=0.1, weight_decay=0.5)

    def closure():
        loss = (0.0 * parameter).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 0.0
    torch.testing.assert_close(parameter.detach(), torch.full((3,), 0.95))


@pytest.mark.parametrize("name", ["adamw", "adamax"])
def test_the_trainers_own_groups_and_settings(tmp_path, name):
    args = TrainingArguments(
        output_dir=str(tmp_path), learning_rate=3e-4, weight_decay=0.01, adam_epsilon=1e-6, use_cpu=True, report_to=[]
    )
    trainer = Trainer(model=tiny_bert(), args=args, **trainer_options(name, args))
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, Adamax if name == "adamax" else torch.optim.AdamW)
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.01, 0.0)
    assert (decayed["lr"], decayed["betas"], decayed["eps"]) == (3e-4, (0.9, 0.999), 1e-6)
    assert all(parameter.dim() > 1 for parameter in decayed["params"])


def test_flags():
    assert parse(LINE, "run_glue").optimizer == "adamw"
    assert parse([*LINE, "--optimizer", "adamax"], "run_glue").optimizer == "adamax"
    for words, sentence in (
        (
            "--optimizer adamax --optim sgd",
            "^--optimizer adamax and --optim sgd are two optimizers; drop one of them.$",
        ),
        ("--optimizer adam", "^--optimizer: invalid choice: 'adam' "),
    ):
        with pytest.raises(HeadPruningError, match=sentence):
            parse([*LINE, *words.split()], "run_glue")


def test_resuming_with_another_optimizer_is_a_sentence(tmp_path):
    check_resumed("adamw", tmp_path)  # the Trainer says what is missing
    for name, other, make in (("adamw", "adamax", torch.optim.AdamW), ("adamax", "adamw", Adamax)):
        _, optimizer = walk(lambda p, make=make: make(p, lr=0.01))
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        check_resumed(name, tmp_path)
        with pytest.raises(HeadPruningError, match=f"another optimizer than {other}; add --optimizer {name}"):
            check_resumed(other, tmp_path)
    whole = (tmp_path / "optimizer.pt").read_bytes()
    (tmp_path / "optimizer.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(HeadPruningError, match="optimizer.pt is damaged"):
        check_resumed("adamax", tmp_path)
