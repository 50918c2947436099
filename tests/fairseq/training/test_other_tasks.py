"""Language models and masked language models, and the criteria that fit translation."""

import re
import shlex

import numpy as np
import pytest

from fairseq_plugin.exporting.checkpoints import export_compact, export_masked
from tests.fairseq.command_lines import DSP, MACHINE
from tests.fairseq.files import logits_of, mask_beside, session_of, zeroed_by_hand
from tests.fairseq.runner import PLUGIN, Runner, logged


@pytest.fixture(scope="session")
def text(data, tmp_path_factory):
    """The English side alone, binarised for language models."""
    folder = tmp_path_factory.mktemp("text")
    prefixes = [f"--{split}pref={data.parent / split}.en" for split in ("train", "valid", "test")]
    Runner(folder).run("preprocess", ["--only-source", *prefixes, "--destdir", folder / "data-bin", "--workers", "1"])
    return folder / "data-bin"


def command(text, save_dir, task, model, *options):
    own = f"--user-dir {shlex.quote(PLUGIN)} --task {task} --optimizer adam --lr 0.01 --tokens-per-sample 24 \
        --max-tokens 120 --max-update 8 --disable-validation {model}"
    return [text, *shlex.split(own), *MACHINE, "--save-dir", save_dir, *(w for o in options for w in shlex.split(o))]


@pytest.mark.slow
def test_language_model(runner, text, tmp_path):
    model = "--arch transformer_lm --decoder-layers 3 --decoder-embed-dim 16 --decoder-ffn-embed-dim 24 \
        --decoder-attention-heads 4 --share-decoder-input-output-embed"
    runner.run("train", command(text, tmp_path / "run", "language_modeling_head_pruning", model, DSP))
    checkpoint = tmp_path / "run" / "checkpoint_last.pt"
    mask = mask_beside(checkpoint)
    assert mask.kept == 4 and mask.keep.size == 12
    assert {site.kind for site in mask.unit_map.attention} == {"decoder_self"}

    zeroed_by_hand(checkpoint, tmp_path / "hand.pt", mask)
    zeroed_by_hand(checkpoint, tmp_path / "dense.pt")
    export_masked(checkpoint, tmp_path / "masked.pt")
    export_compact(checkpoint, tmp_path / "compact.pt")
    losses, plugin = {}, ["--user-dir", PLUGIN]
    for name in ("pruned", "hand", "dense", "masked", "compact"):
        path = checkpoint if name == "pruned" else tmp_path / f"{name}.pt"
        rest = f"--gen-subset test --tokens-per-sample 12 --path {path} --cpu --batch-size 4 --num-workers 0 \
            --required-batch-size-multiple 1"
        # The masked export is one for fairseq without the plugin.
        out = runner.run("eval-lm", [text, *(plugin if name != "masked" else []), *shlex.split(rest)]).out
        losses[name] = float(re.search(r"Loss \(base 2\): ([\d.]+)", out).group(1))
    assert 0 < losses["pruned"] == losses["hand"] == losses["masked"] == losses["compact"] != losses["dense"]
    # The task is that of the checkpoint.
    rest = "--valid-subset valid --batch-size 4 --cpu --num-workers 0 --required-batch-size-multiple 1"
    assert (
        "valid on 'valid' subset" in runner.run("validate", [text, *plugin, "--path", checkpoint, *rest.split()]).out
    )


@pytest.mark.slow
def test_masked_language_model(runner, text, tmp_path):
    model = "--arch roberta_base --encoder-layers 3 --encoder-embed-dim 16 --encoder-ffn-embed-dim 24 \
        --encoder-attention-heads 4 --criterion masked_lm"
    for updates in (5, 8):
        line = command(text, tmp_path / "run", "masked_lm_head_pruning", model, DSP, f"--max-update {updates}")
        done = runner.run("train", line)
    checkpoint = tmp_path / "run" / "checkpoint_last.pt"
    assert mask_beside(checkpoint).kept == 4
    assert session_of(checkpoint)["dsp.adam.steps"] == 6 and session_of(checkpoint)["dsp.adam.first"].any()
    assert {site.kind for site in mask_beside(checkpoint).unit_map.attention} == {"encoder_self"}
    assert all(np.isfinite(logged(done.out, "loss")))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        "--criterion cross_entropy",
        "--criterion label_smoothed_cross_entropy --sentence-avg",
        "--criterion label_smoothed_cross_entropy_head_pruning",
        "--criterion adaptive_loss --adaptive-softmax-cutoff 8,16 --ddp-backend legacy_ddp",
    ],
)
def test_criteria(runner, translation, tmp_path, options):
    line = translation.train(tmp_path / "run", DSP, "--initial-temperature 1 --cooldown-steps 10", options, updates=3)
    if "adaptive" in options:
        line.remove("--share-decoder-input-output-embed")
    if "label_smoothed" not in options:
        del line[line.index("--label-smoothing") : line.index("--label-smoothing") + 2]
    runner.run("train", line)
    state = session_of(tmp_path / "run" / "checkpoint_last.pt")
    assert state["dsp.adam.steps"] == 3 and np.abs(state["dsp.adam.first"]).min() > 0
    assert np.isfinite(logits_of(tmp_path / "run" / "checkpoint_last.pt")).all()
    assert mask_beside(tmp_path / "run" / "checkpoint_last.pt").kept == 4


@pytest.mark.slow
def test_layerdrop(runner, translation, tmp_path):
    # Layers that were skipped at random in the first update are not taken for sites that never run.
    drop = "--encoder-layerdrop 0.5 --decoder-layerdrop 0.5"
    runner.run("train", translation.train(tmp_path / "run", DSP, drop, updates=10))
    assert mask_beside(tmp_path / "run" / "checkpoint_last.pt").kept == 4


def test_layerdrop_of_a_model_in_a_model(runner, text, tmp_path):
    """RoBERTa keeps it in the encoder of its encoder."""
    model = "--arch roberta_base --encoder-layers 3 --encoder-embed-dim 16 --encoder-ffn-embed-dim 24 \
        --encoder-attention-heads 4 --criterion masked_lm --encoder-layerdrop 0.5"
    runner.run("train", command(text, tmp_path / "run", "masked_lm_head_pruning", model, DSP, "--max-update 10"))
    assert mask_beside(tmp_path / "run" / "checkpoint_last.pt").kept == 4
