"""Optimizers of published recipes that transformers does not bring."""

from pathlib import Path
from typing import Any, Callable, Optional

import torch
from transformers import TrainingArguments

from head_pruning import HeadPruningError
from head_pruning.compact.shapes import conform
from head_pruning.errors import one_line
from head_pruning.pickled import load_pickled

#: What ``--optimizer`` takes; the first is the one that ``--optim`` names.
OPTIMIZERS = ("adamw", "adamax")


class Adamax(torch.optim.Adamax):
    """torch's Adamax with decoupled decay: weights shrink by ``lr * weight_decay`` a step, as under AdamW.

    torch adds the decay to the gradient, where the division by its largest value makes it as strong as the loss.
    """

    @torch.no_grad()
    def step(self, closure: Optional[Callable[[], float]] = None) -> Any:
        """One step; see :class:`torch.optim.Adamax`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()  # of the weights before their decay, as in torch's AdamW
        decays = [group["weight_decay"] for group in self.param_groups]
        for group, decay in zip(self.param_groups, decays):
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if decay and parameters:
                torch._foreach_mul_(parameters, 1.0 - float(group["lr"]) * decay)
            group["weight_decay"] = 0.0
        try:
            super().step()
            return loss
        finally:
            for group, decay in zip(self.param_groups, decays):
                group["weight_decay"] = decay


def trainer_options(name: str, args: TrainingArguments) -> dict[str, Any]:
    """What a Trainer must be given so that it trains with the optimizer ``name``, with the settings of ``args``."""
    if name == OPTIMIZERS[0]:
        return {}
    settings = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    return {"optimizer_cls_and_kwargs": (Adamax, settings)}


def check_resumed(name: str, checkpoint: Path) -> None:
    """Raise HeadPruningError if the checkpoint's optimizer is damaged or cannot go on as ``name``."""
    file = checkpoint / "optimizer.pt"
    if not file.is_file():
        return
    found = load_pickled(file, cure="resume from another checkpoint")
    try:
        state = conform(found, {"state": dict, "param_groups": [{"params": list}]})
        slots = conform(list(state["state"].values()), [dict])
    except ValueError as error:
        raise HeadPruningError(f"{file} is damaged ({one_line(error)}); resume from another checkpoint.") from error
    kept = {key for each in slots for key in each}
    if kept and (name == "adamax") != ("exp_inf" in kept):  # else its averages are missed at the first step
        other = next(known for known in OPTIMIZERS if known != name)
        raise HeadPruningError(
            f"The checkpoint {checkpoint} was trained with another optimizer than {name}; add --optimizer {other}, or "
            "start anew with --overwrite_output_dir."
        )
