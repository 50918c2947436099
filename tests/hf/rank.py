"""One process of a data-parallel training: ``python -m tests.hf.rank FOLDER VARIANT ... [resume]``."""

import os
import sys
from pathlib import Path

import numpy as np
import torch

from hf_plugin import HeadPruningTrainer, pruner
from tests.hf.tiny import arguments, collate, sentences, tiny_bert


def pruners(variant: str) -> list:
    """Of heads; in ``weights`` of weights too, with masks after updates 2, 4 and from 6 on."""
    if variant == "spd":  # two phases, grafted layers
        return [pruner("spd_magnitude", sparsity=0.8), pruner("spd", replacing_rate=0.5)]
    if variant == "voita":
        return [pruner("voita", l0_penalty=0.05, joint_pruning=True)]
    schedule = {"annealing": True, "cooldown_steps": 6, "initial_temperature": 1.0}
    found = [pruner("dsp", num_of_heads=3, joint_pruning=variant != "pipelined", **schedule)]
    if variant == "weights":
        cubic = {"final_threshold": 0.2, "warmup_steps": 1, "initial_warmup": 1, "final_warmup": 3, "deltaT": 2}
        found.append(pruner("platon", **cubic, beta2=0.9))
    return found


def train(folder: Path, variant: str, resume: bool) -> None:
    """Train, then write this rank's gates, weights and masks."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    trainer = HeadPruningTrainer(
        model=model,
        args=arguments(
            folder,
            max_steps=8,
            gradient_accumulation_steps=2 // ranks,
            save_strategy="steps",
            save_steps=4,
            ddp_backend="gloo" if ranks > 1 else None,
            dataloader_pin_memory=False,
        ),
        pruners=pruners(variant),
        train_dataset=sentences(64),
        data_collator=collate,
    )
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4") if resume else None)
    values = {name: value.numpy() for name, value in model.state_dict().items()}
    if trainer.head_mask is not None:
        values["logits"] = trainer.session.pruners[0].logits
        values["gradients"] = trainer.session.gates.gradients.numpy()
    values.update({f"mask.{name}": mask.numpy() for name, mask in trainer.session.weight_masks().items()})
    np.savez(folder / f"rank{os.environ.get('RANK', '0')}.npz", **values)


def main() -> None:
    """One training after another."""
    torch.set_num_threads(1)
    folder, options = Path(sys.argv[1]), sys.argv[2:]
    for variant in options:
        if variant != "resume":
            train(folder / variant, variant, "resume" in options)


if __name__ == "__main__":
    main()
