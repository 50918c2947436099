"""Command lines of tiny translation runs, and what their output says."""

import re
import shlex
from pathlib import Path

import numpy as np

from tests.fairseq.runner import PLUGIN

# Six attention layers of four heads: N = 24.
DIMENSIONS = shlex.split(
    "--encoder-layers 2 --decoder-layers 2 --encoder-embed-dim 16 --decoder-embed-dim 16 --encoder-ffn-embed-dim 24 "
    "--decoder-ffn-embed-dim 24 --encoder-attention-heads 4 --decoder-attention-heads 4"
)
# Without the multiple of 1 fairseq drops the last batch.
MACHINE = shlex.split(
    "--cpu --num-workers 0 --log-format json --log-interval 1 --no-epoch-checkpoints --required-batch-size-multiple 1"
)
HEADS = 24


DSP = "--num-of-heads 4 --pruning-lr 0.2 --joint-pruning --annealing --initial-temperature 0.1 --cooldown-steps 6"
SUBSET = "--pruner subset --num-of-heads 4 --pruning-lr 0.2 --joint-pruning"
SENSITIVITY = "--pruner head_sensitivity --num-of-heads 4 --joint-pruning"
VOITA = "--l0-penalty 5 --pruning-lr 0.1"
PIPELINED = "--num-of-heads 4 --pruning-lr 0.2 --annealing --initial-temperature 0.1 --cooldown-steps 6"


class Translation:
    """Builds command lines; later options win."""

    def __init__(self, data: Path) -> None:
        self.data = data

    def train(self, save_dir, *options, task="translation_head_pruning", updates=8, tokens=90) -> list:
        """A short training run; ``options`` are strings of options, split as a shell would."""
        own = f"--user-dir {shlex.quote(PLUGIN)} --task {task} --arch transformer_iwslt_de_en \
            --share-decoder-input-output-embed --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 0 \
            --lr 0.01 --lr-scheduler inverse_sqrt --warmup-updates 4 --dropout 0.1 --max-tokens {tokens} \
            --criterion label_smoothed_cross_entropy --label-smoothing 0.1 --max-update {updates} --disable-validation"
        more = [word for option in options for word in shlex.split(option)]
        return [self.data, *shlex.split(own), *DIMENSIONS, *MACHINE, "--save-dir", save_dir, *more]

    def generate(self, path, *options) -> list:
        """Decode the test set with the default task."""
        own = f"--user-dir {shlex.quote(PLUGIN)} --batch-size 32 --beam 2 --max-len-a 1 --max-len-b 5 --cpu \
            --num-workers 0 --required-batch-size-multiple 1"
        more = [word for option in options for word in shlex.split(option)]
        return [self.data, "--path", path, *shlex.split(own), *more]


def decoded(output: str) -> dict[int, tuple[str, list[float]]]:
    """Sentence number to its best hypothesis and the scores of its tokens, from fairseq-generate's output."""
    texts = dict(re.findall(r"^H-(\d+)\t[^\t]+\t(.*)$", output, re.MULTILINE))
    scores = dict(re.findall(r"^P-(\d+)\t(.*)$", output, re.MULTILINE))
    return {int(number): (text, [float(s) for s in scores[number].split()]) for number, text in texts.items()}


def same_decoding(ours: dict, theirs: dict) -> None:
    """Assert that two results of :func:`decoded` are equal, up to rounding."""
    assert ours.keys() == theirs.keys() and ours
    for number, (text, scores) in ours.items():
        assert text == theirs[number][0]
        np.testing.assert_allclose(scores, theirs[number][1], atol=2e-4)
