"""What wrote the files in this folder, with the version of the package before its files lay in rooms.

python -m tests.hf.before_rooms.make FOLDER
"""

import shutil
import sys
from pathlib import Path

from safetensors.torch import save_file

from hf_plugin import HeadPruningTrainer, prune_heads, pruner, save_compact
from tests.hf.tiny import arguments, collate, sentences, tiny_bert

HALF, STEPS = 6, 12


def trainer(folder: Path) -> HeadPruningTrainer:
    """Heads and weights pruned together, with a checkpoint in the middle."""
    return HeadPruningTrainer(
        model=tiny_bert(),
        args=arguments(folder, save_strategy="steps", save_steps=HALF, max_steps=STEPS),
        train_dataset=sentences(40),
        data_collator=collate,
        pruners=[
            pruner("dsp", num_of_heads=4, joint_pruning=True, annealing=True, cooldown_steps=0.8),
            pruner("platon", final_threshold=0.4, warmup_steps=2, deltaT=2, initial_warmup=1, final_warmup=1),
        ],
    )


def main(out: Path) -> None:
    """Write a checkpoint, the state that its run ended in, and a masked and a compact folder."""
    run = trainer(out / "run")
    run.train()
    run.save_model(str(out / "masked"))
    end = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    save_file(end, str(out / "end.safetensors"))
    shutil.move(out / "run" / f"checkpoint-{HALF}", out / f"checkpoint-{HALF}")
    shutil.rmtree(out / "run")
    for path in out.rglob("training_args.bin"):  # a pickle, which nothing reads
        path.unlink()
    for path in out.rglob("*.png"):
        path.unlink()
    model = tiny_bert(1)
    prune_heads(model, {0: [0, 1, 2, 3], 1: [1]})
    save_compact(model, out / "compact")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
