"""One process of a data-parallel training: ``python -m tests.hf.rank FOLDER [resume]``."""

import os
import sys
from pathlib import Path

import numpy as np
import torch

from hf_plugin import HeadPruningTrainer, pruner
from tests.hf.tiny import arguments, collate, sentences, tiny_bert


def main() -> None:
    """Train, then write this rank's gates and weights."""
    torch.set_num_threads(1)
    folder, options = Path(sys.argv[1]), sys.argv[2:]
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
        pruners=[
            pruner("dsp", num_of_heads=3, joint_pruning="pipelined" not in options, annealing=True)
            if "voita" not in options
            else pruner("voita", l0_penalty=0.05, joint_pruning=True)
        ],
        train_dataset=sentences(64),
        data_collator=collate,
    )
    trainer.session.pruners[0].config.cooldown_steps = 6
    trainer.session.pruners[0].config.initial_temperature = 1.0
    if "resume" in options:
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    else:
        trainer.train()
    values = {name: value.numpy() for name, value in model.state_dict().items()}
    values["logits"] = trainer.session.pruners[0].logits
    values["gradients"] = trainer.session.gates.gradients.numpy()
    np.savez(folder / f"rank{os.environ.get('RANK', '0')}.npz", **values)


if __name__ == "__main__":
    main()
