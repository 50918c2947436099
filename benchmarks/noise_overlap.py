"""How many of the kept heads a noisy draw keeps: ``python -m benchmarks.noise_overlap CHECKPOINT``.

CHECKPOINT is of a DSP training. Draws K heads by its logits plus Gumbel noise, as training does at a temperature of
nearly 0, and compares them with the K heads that the checkpoint keeps.
"""

import argparse

import numpy as np

from fairseq_plugin.export import load_checkpoint
from fairseq_plugin.state import SESSION, mask_of_state, split_state
from head_pruning.gates import gumbel

DRAWS = 2000


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    state = split_state(load_checkpoint(parser.parse_args().checkpoint)["model"])[1]
    keep = mask_of_state(state).keep
    logits = state[f"{SESSION}dsp.logits"].numpy()
    noise = gumbel(np.random.default_rng(0).random((DRAWS, logits.size)))
    drawn = np.argsort(-(logits + noise), axis=1)[:, : keep.sum()]
    shared = keep[drawn].sum(axis=1)
    print(
        f"{shared.mean():.2f} of {keep.sum()} heads shared; all of them in {100 * (shared == keep.sum()).mean():.0f} %"
    )


if __name__ == "__main__":
    main()
