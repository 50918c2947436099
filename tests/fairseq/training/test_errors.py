"""Mistakes of a user end the command with one sentence, and leave nothing behind."""

import pytest

from head_pruning import HeadPruningError
from tests.fairseq.command_lines import DSP
from tests.fairseq.in_process import in_process


@pytest.mark.parametrize(
    "options, words",
    [
        ("--num-of-heads 0 --joint-pruning", "from 1 to 24"),
        pytest.param(
            "--num-of-heads 4 --use-ste --l0-penalty 5 --joint-pruning",
            "choose one with --pruner",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "--num-of-heads 4 --pruner nothing", "no pruner nothing; choose one of dsp", marks=pytest.mark.slow
        ),
        pytest.param("--annealing --joint-pruning", "no pruner is chosen", marks=pytest.mark.slow),
        ("--pruner dsp --annealing --joint-pruning", "add --num-of-heads"),
        pytest.param(f"{DSP} --min-heads-per-layer 1", "only 4 are kept", marks=pytest.mark.slow),
        (f"{DSP} --final-temperature 0", "must be above 0"),
        pytest.param(
            f"{DSP} --annealing --initial-temperature 1e-9",
            "is below --final-temperature 1e-08, but annealing lowers",
            marks=pytest.mark.slow,
        ),
        pytest.param("--pruner voita", "add --l0-penalty", marks=pytest.mark.slow),
    ],
)
def test_bad_options(translation, tmp_path, options, words):
    with pytest.raises(HeadPruningError, match=words):
        in_process(translation.train(tmp_path / "run", options))


@pytest.mark.parametrize(
    "options, words",
    [
        ("--num-of-heads 25 --joint-pruning", "more than the 24 heads"),
        pytest.param(f"{DSP} --cooldown-steps -3", "--cooldown-steps", marks=pytest.mark.slow),
        (f"{DSP} --cooldown-steps 0.5 --max-update 0", "whose length is not known"),
        ("--num-of-heads 4 --annealing", "no checkpoint was loaded"),
        pytest.param(
            "--num-of-heads 4 --annealing --restore-file missing.pt",
            "no checkpoint was loaded",
            marks=pytest.mark.slow,
        ),
        (f"{DSP} --lr 1e38 --warmup-init-lr 1e38", "is not finite after 1 updates; lower --lr"),
        pytest.param(
            f"{DSP} --lr 1e38 --warmup-init-lr 1e38 --weight-decay 3.3 --max-update 1",
            "is not finite after 1 updates",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            f"{DSP} --fp16 --fp16-no-flatten-grads --fp16-init-scale 4 --min-loss-scale 2 --lr 1e4",
            "bf16 in",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_command_ends_with_one_sentence(runner, translation, tmp_path, options, words):
    assert words in runner.fail("train", translation.train(tmp_path / "run", options))
    assert not list((tmp_path / "run").glob("*"))


def test_a_model_without_attention(runner, translation, tmp_path):
    line = translation.train(tmp_path / "run", DSP)
    lstm = ["--arch", "lstm", "--encoder-embed-dim", "8", "--decoder-embed-dim", "8"]
    keep = [word for word in line if word != "--share-decoder-input-output-embed"]
    for option in ("--encoder-ffn-embed-dim", "--decoder-ffn-embed-dim"):
        del keep[keep.index(option) : keep.index(option) + 2]
    for option in ("--encoder-attention-heads", "--decoder-attention-heads"):
        del keep[keep.index(option) : keep.index(option) + 2]
    assert "no attention module" in runner.fail("train", [*keep, *lstm])
