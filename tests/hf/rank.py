"""One process of a data-parallel training: ``python -m tests.hf.rank FOLDER VARIANT ... [resume] [fsdp]``."""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Sequence

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.nn.utils import prune

from hf_plugin import HeadPruningTrainer, pruner
from tests.hf.tiny import arguments, collate, sentences, tiny_bert

EPOCH = 8  # updates
SHARDED = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["BertLayer"]}}
# Pruners of weights alone: another policy each, or another way to select.
WEIGHTS = {
    "nested": ("movement", {"mask_policy": "nested"}),
    "retained": ("sensitivity", {"mask_policy": "retained"}),
    "gradual": ("gradual_magnitude", {"target_sparsity": 0.8, "pruning_frequency": 2, "policy_end_step": 6}),
    "pattern": ("magnitude", {"weight_selection": "2:4", "final_threshold": 0.5}),
    "lock": ("lock", {}),
    "further": ("magnitude", {"start_from_zeros": True}),
}
# Of feed-forward blocks: others have an odd one, so that ranks have unlike shards; here one rank has none of a tensor.
WIDTHS = {"nested": 1, "pattern": 32}


class Sharding:
    """Of a Trainer: shards by FSDP2 without a GPU too, where accelerate trains by DDP and says nothing."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            state = self.accelerator.state
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.is_fsdp_enabled = True


class ShardingTrainer(Sharding, HeadPruningTrainer):
    """A Trainer that shards."""


def pruners(variant: str) -> list:
    """Of heads; in ``weights`` of weights too, with masks after updates 2, 4 and from 6 on."""
    if variant == "spd":  # two phases, grafted layers
        return [pruner("spd_magnitude", sparsity=0.8), pruner("spd", replacing_rate=0.5)]
    if variant == "gpp":  # three phases: pruning begins with update 2 and ends with update 6
        gpp = pruner("gpp", prepruning_finetune_epochs=2 / EPOCH, prune_epochs=4 / EPOCH, retrain_lr_factor=0.5)
        return [gpp, pruner("dfd", window_size=2)]
    if variant == "voita":
        return [pruner("voita", l0_penalty=0.05, joint_pruning=True)]
    if variant in ("ste", "subset", "head_sensitivity"):
        return [pruner(variant, num_of_heads=3, joint_pruning=True)]
    cubic = {"final_threshold": 0.2, "warmup_steps": 1, "initial_warmup": 1, "final_warmup": 3, "deltaT": 2}
    if variant in WEIGHTS:
        method, options = WEIGHTS[variant]
        if method == "lock":
            return [pruner(method, **options)]
        # The gradients of key biases are rounding alone, since softmax does not see them: nothing to choose by.
        options = {"weights_exclude": r"key\.bias$", **options}
        return [pruner(method, **(options if "gradual" in method else {**cubic, **options}))]
    if variant in ("token", "average"):
        return [pruner("qat", quantization_begin=2, input_ranges=variant)]
    if variant == "dfd":
        return [pruner("dfd", window_size=2, distill_logits=1.0)]
    schedule = {"annealing": True, "cooldown_steps": 6, "initial_temperature": 1.0}
    found = [pruner("dsp", num_of_heads=3, joint_pruning=variant != "pipelined", **schedule)]
    if variant in ("weights", "taught"):
        found.append(pruner("platon", **cubic, beta2=0.9))
    if variant == "taught":
        found.append(pruner("logits", distill_logits=1.0, distill_hidden=0.5))
    return found


def train(folder: Path, variant: str, resume: bool, sharded: bool) -> None:
    """Train, then write the outcome, and this rank's gates, weights and masks."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    width = WIDTHS.get(variant, 31)
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, intermediate_size=width)
    if variant in ("lock", "further"):
        prune.remove(prune.l1_unstructured(model.bert.encoder.layer[0].output.dense, "weight", 0.5), "weight")
    trainer = ShardingTrainer(
        model=model,
        args=arguments(
            folder,
            max_steps=8,
            max_grad_norm=0.1,  # below the norms there are
            gradient_accumulation_steps=2 // ranks,
            save_strategy="steps",
            save_steps=4,
            ddp_backend="gloo" if ranks > 1 else None,
            dataloader_pin_memory=False,
            **(SHARDED if sharded else {}),
        ),
        pruners=pruners(variant),
        train_dataset=sentences(64),
        data_collator=collate,
    )
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4") if resume else None)
    tensors = model.state_dict().items()
    values = {name: (value.full_tensor() if sharded else value).numpy() for name, value in tensors}
    values["predictions"] = trainer.predict(sentences(8, seed=1)).predictions
    if trainer.head_mask is not None:
        state = trainer.session.pruners[0].state_dict()
        values.update({name: state[name] for name in ("logits", "z", "learnt") if name in state})
        values["gradients"] = trainer.session.gates.gradients.numpy()
    if trainer.session.of_kind("quantizes"):
        values["ranges"] = trainer.session.pruners[0].state_dict()["ranges"].reshape(-1, 4)
    values.update({f"mask.{name}": mask.numpy() for name, mask in trainer.session.weight_masks().items()})
    trainer.save_model(str(folder / "outcome"))
    np.savez(folder / f"rank{os.environ.get('RANK', '0')}.npz", **values)


def run_glue(folder: Path, sharded: bool) -> None:
    """A run of the script, in a folder with its data and model."""
    from hf_plugin.command_line.arguments import parse
    from hf_plugin.glue.run import GlueRun
    from hf_plugin.scripts.run import start

    trainer = type("ShardingPruningTrainer", (Sharding, GlueRun.pruning_trainer), {})
    line = "--task_name CoLA --data_dir data/CoLA --model_name_or_path bert-base-uncased --output_dir output"
    line += " --do_train --do_eval --use_cpu --max_steps 6 --max_grad_norm 0.1 --pruner dsp"
    line += " --num_of_heads 6 --joint_pruning --annealing --cooldown_steps 0.6"
    line += " --pruner_name platon --final_threshold 0.2 --warmup_steps 0.1"
    line += " --eval_strategy steps --eval_steps 3 --intermediate_masks --load_best_model_at_end --save_steps 3"
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    line += f" --per_device_train_batch_size 4 --gradient_accumulation_steps {2 // ranks}"
    config = json.dumps(SHARDED["fsdp_config"])
    words = [*line.split(), *(["--ddp_backend", "gloo", "--fsdp", "--fsdp_config", config] if sharded else [])]
    with contextlib.chdir(folder):
        start(type("ShardingGlue", (GlueRun,), {"pruning_trainer": trainer}), parse(words, "run_glue"))


def train_all(folder: Path, options: Sequence[str]) -> None:
    """One training after another."""
    for variant in options:
        if variant == "glue":
            run_glue(folder / variant, "fsdp" in options)
        elif variant not in ("resume", "fsdp"):
            train(folder / variant, variant, "resume" in options, "fsdp" in options)


def main() -> None:
    """Command line."""
    torch.set_num_threads(1)
    train_all(Path(sys.argv[1]), sys.argv[2:])


if __name__ == "__main__":
    main()
