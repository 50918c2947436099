"""How many of the kept heads a noisy draw keeps: ``python -m benchmarks.noise_overlap CHECKPOINT``.

CHECKPOINT is of a DSP training. Draws K heads by its logits plus Gumbel noise, as training does at a temperature of
nearly 0, and compares them with the K heads that the checkpoint keeps.
"""

import argparse

import numpy as np

from fairseq_plugin.checkpoints.stored import PruningState, load_checkpoint
from head_pruning.gates import gumbel

DRAWS = 2000


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    stored = PruningState.of(load_checkpoint(parser.parse_args().checkpoint))
    keep = stored.head_mask().keep
    logits = stored.of_session()["dsp.logits"]
    noise = gumbel(np.random.default_rng(0).random((DRAWS, logits.size)))
    drawn = np.argsort(-(logits + noise), axis=1)[:, : keep.sum()]
    shared = keep[drawn].sum(axis=1)
    print(
        f"{shared.mean():.2f} of {keep.sum()} heads shared; all of them in {100 * (shared == keep.sum()).mean():.0f} %"
    )


if __name__ == "__main__":
    main()
