"""GPP in fairseq: heads and feed-forward units fade out together, a run that was stopped goes on, and what is left."""

import numpy as np
import torch

from fairseq_plugin.exporting.checkpoints import export_compact, export_masked
from fairseq_plugin.host import load
from head_pruning.surgery.remaining import heads_left
from tests.fairseq.checkpoints import mask_beside, same_training_state
from tests.fairseq.command_lines import decoded, same_decoding

GPP = "--pruner gpp --target-sparsity 0.5 --save-interval-updates 3 --keep-interval-updates 9 --no-epoch-checkpoints"


def test_a_run_that_is_resumed_and_exported(runner, translation, tmp_path):
    runner.run("train", translation.train(tmp_path / "whole", GPP))
    (third,) = (tmp_path / "whole").glob("checkpoint_*_3.pt")
    runner.run("train", translation.train(tmp_path / "resumed", GPP, f"--restore-file {third}"))
    last = [tmp_path / name / "checkpoint_last.pt" for name in ("whole", "resumed")]
    same_training_state(*last)
    mask = mask_beside(last[0])
    assert mask.counts() == {"heads": (12, 24), "units": (48, 96)} and mask == mask_beside(last[1])
    export_masked(last[0], tmp_path / "masked.pt")
    export_compact(last[0], tmp_path / "compact.pt")
    small = load(tmp_path / "compact.pt").model
    assert np.array_equal(heads_left(small).keep, mask.keep)
    ours, theirs, gated = (
        decoded(runner.run("generate", translation.generate(path)).out)
        for path in (tmp_path / "compact.pt", tmp_path / "masked.pt", last[0])
    )
    same_decoding(ours, theirs)
    same_decoding(ours, gated)
    fc1 = torch.load(last[0], weights_only=True)["model"]["encoder.layers.0.fc1.weight"]
    assert len(fc1) == 24 > small.encoder.layers[0].fc1.out_features
