"""Prune a transformers model while the Trainer trains it, then cut the heads out: 4 of 16 heads stay.

    python examples/trainer.py [FOLDER]

The model is a small BERT with random weights, the sentences are made on the spot; nothing is downloaded. The outcome
lies in FOLDER (default: trainer-output).
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, TrainingArguments, set_seed

import hf_plugin
from hf_plugin import HeadPruningTrainer, pruner

VOCABULARY, LENGTH, KEEP = 12, 8, 4


def sentences(count: int, seed: int) -> list[dict]:
    """Token ids, the first always 0, and whether one of the others is 1."""
    ids = np.random.default_rng(seed).integers(1, VOCABULARY, (count, LENGTH))
    ids[:, 0] = 0
    labels = (ids == 1).any(1)
    return [{"input_ids": row.tolist(), "labels": int(label)} for row, label in zip(ids, labels)]


def accuracy(prediction) -> dict[str, float]:
    """What the Trainer reports of an evaluation."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(folder: Path) -> None:
    """Train, save, cut, load."""
    set_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=LENGTH,
        initializer_range=0.1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = AutoModelForSequenceClassification.from_config(config)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=64,
        per_device_eval_batch_size=256,
        max_steps=200,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        logging_steps=100,
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    # The number of heads falls from all to KEEP in the first half of training.
    method = pruner("head_sensitivity", num_of_heads=KEEP, joint_pruning=True, count_schedule="0:0.5")
    trainer = HeadPruningTrainer(
        model=model,
        args=arguments,
        train_dataset=sentences(3200, seed=1),
        eval_dataset=sentences(1000, seed=2),
        compute_metrics=accuracy,
        pruners=[method],
    )
    # With a Trainer of your own:  HeadPruningCallback(open_session(model, [method])).add_to(trainer)
    trainer.train()
    scores, mask = trainer.evaluate(), trainer.head_mask
    print(mask)
    print(f"accuracy with {mask.kept} of {mask.keep.size} heads: {scores['eval_accuracy']:.3f}")
    trainer.save_model(str(folder / "pruned"))  # an ordinary folder; the removed heads are zeros

    # Smaller and faster: the heads leave the tensors.
    pruned = AutoModelForSequenceClassification.from_pretrained(folder / "pruned")
    dense = sum(parameter.numel() for parameter in pruned.parameters())
    hf_plugin.prune_heads(pruned, mask)
    hf_plugin.save_compact(pruned, folder / "small", method=method.name)
    small = AutoModelForSequenceClassification.from_pretrained(folder / "small").eval()
    left = sum(parameter.numel() for parameter in small.parameters())

    ids = torch.tensor([row["input_ids"] for row in sentences(5, seed=3)])
    with torch.no_grad(), trainer.session.evaluating():
        difference = (small(ids).logits - model(ids).logits).abs().max().item()
    print(f"parameters: {dense} before, {left} after; largest difference of logits: {difference:.1e}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "trainer-output"))
