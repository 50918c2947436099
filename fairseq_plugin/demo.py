"""``make demo``: prune a small translation model with every method, on real text, on two CPU cores.

Trains a dense German-English model with ``fairseq-train``, prunes its heads with differentiable subset pruning and with
the baselines, decodes all of them with ``fairseq-generate`` and shows BLEU, the heads kept, and a picture of them.
"""

import argparse
import concurrent.futures
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from tqdm import tqdm

from head_pruning import HeadMask
from head_pruning.artifacts import write_json
from head_pruning.report.plots import plot_head_masks
from head_pruning.report.tables import text_table

ROOT = Path(__file__).resolve().parent.parent
USER_DIR = str(Path(__file__).resolve().parent)
# glibc gives large buffers back to the system after each use; keeping them nearly doubles CPU training speed.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "40000000000"}
HEADS = 36
MARGIN = 3.0
SHAPE = (
    "--arch transformer_iwslt_de_en --share-all-embeddings --encoder-layers 3 --decoder-layers 3 "
    "--encoder-attention-heads 4 --decoder-attention-heads 4 --encoder-embed-dim 128 --decoder-embed-dim 128 "
    "--encoder-ffn-embed-dim 512 --decoder-ffn-embed-dim 512"
).split()
TRAINING = [
    *("--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--clip-norm", "0.0", "--dropout", "0.1"),
    *("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1", "--max-tokens", "4096"),
    *("--lr-scheduler", "inverse_sqrt", "--weight-decay", "0.0001", "--disable-validation", "--no-epoch-checkpoints"),
    *("--log-format", "simple", "--log-interval", "10", "--seed", "1"),
]


@dataclass(frozen=True)
class Run:
    """One training from the dense model."""

    name: str
    title: str
    options: tuple[str, ...]


def runs(keep: int) -> list[Run]:
    """The pruned variants, K = ``keep`` heads where the method sets a number."""
    k = ("--num-of-heads", str(keep))
    anneal = ("--annealing", "--initial-temperature", "0.1", "--final-temperature", "1e-8", "--cooldown-steps", "0.5")
    return [
        Run("dsp", "DSP", (*k, "--joint-pruning", "--pruning-lr", "0.2", *anneal)),
        Run("ste", "STE", (*k, "--joint-pruning", "--pruning-lr", "0.2", "--use-ste")),
        Run("voita", "Voita", ("--l0-penalty", "200", "--pruning-lr", "0.2")),
        Run("random", "random heads", (*k, "--pruner", "random")),
    ]
