"""The commands of the published manual (part "Enc-Dec on IWSLT"), with a tiny model and short schedules."""

import re
import shlex

import numpy as np
import pytest

from head_pruning.gates.dsp import DSPConfig, DSPPruner
from tests.fairseq.command_lines import DIMENSIONS, HEADS, MACHINE, decoded, same_decoding
from tests.fairseq.files import logits_of, mask_beside, mask_in, weights_of, zeroed_by_hand
from tests.fairseq.runner import PLUGIN, Runner, logged

DENSE = r"""
fairseq-train \
    data-bin/ \
    --arch transformer_iwslt_de_en --share-decoder-input-output-embed \
    --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 0.0 \
    --lr 5e-4 --lr-scheduler inverse_sqrt --warmup-updates 4000 \
    --dropout 0.3 --weight-decay 0.0001 \
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1 \
    --max-tokens 4096 \
    --max-epoch 60 \
    --save-dir checkpoints/
"""
JOINT_DSP = r"""
python run_dsp.py \
    data-bin/ \
    --arch transformer_iwslt_de_en --share-decoder-input-output-embed \
    --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 0.0 \
    --lr 5e-4 --lr-scheduler inverse_sqrt --warmup-updates 4000 \
    --dropout 0.3 --weight-decay 0.0001 \
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1 \
    --max-tokens 4096 \
    --max-epoch 60 \
    --eval-bleu \
    --eval-bleu-args '{"beam": 5, "max_len_a": 1.2, "max_len_b": 10}' \
    --eval-bleu-detok moses \
    --eval-bleu-remove-bpe \
    --best-checkpoint-metric bleu --maximize-best-checkpoint-metric \
    --save-dir $SAVE_DIR/ \
    --num-of-heads 4 \
    --pruning-lr 0.2 \
    --joint-pruning \
    --annealing \
    --initial-temperature 0.1 \
    --final-temperature 1e-8 \
    --cooldown-steps 15000
"""
STE = r"""
python run_dsp.py \
    data-bin/ \
    --arch transformer_iwslt_de_en --share-decoder-input-output-embed \
    --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 0.0 \
    --lr 5e-4 --lr-scheduler inverse_sqrt --warmup-updates 4000 \
    --dropout 0.3 --weight-decay 0.0001 \
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1 \
    --max-tokens 4096 \
    --max-epoch 60 \
    --eval-bleu \
    --eval-bleu-args '{"beam": 5, "max_len_a": 1.2, "max_len_b": 10}' \
    --eval-bleu-detok moses \
    --eval-bleu-remove-bpe \
    --best-checkpoint-metric bleu --maximize-best-checkpoint-metric \
    --save-dir $SAVE_DIR/ \
    --num-of-heads 4 \
    --pruning-lr 0.2 \
    --joint-pruning \
    --use-ste
"""
VOITA = r"""
python run_voita.py \
    data-bin/ \
    --arch transformer_iwslt_de_en --share-decoder-input-output-embed \
    --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 0.0 \
    --lr 5e-4 --lr-scheduler inverse_sqrt --warmup-updates 4000 \
    --dropout 0.3 --weight-decay 0.0001 \
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1 \
    --max-tokens 4096 \
    --max-epoch 60 \
    --keep-best-checkpoints 1 \
    --l0-penalty 200 \
    --save-dir $SAVE_DIR/
"""
PIPELINED_DSP = r"""
python run_dsp.py \
    data-bin/ \
    --arch transformer_iwslt_de_en --share-decoder-input-output-embed \
    --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 0.0 \
    --lr 5e-4 --lr-scheduler inverse_sqrt --warmup-updates 4000 \
    --dropout 0.3 --weight-decay 0.0001 \
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1 \
    --max-tokens 4096 \
    --reset-optimizer \
    --restore-file checkpoints/checkpoint_last.pt \
    --max-epoch 61 \
    --save-dir $SAVE_DIR/ \
    --num-of-heads 4 \
    --pruning-lr 0.2 \
    --annealing \
    --initial-temperature 0.1 \
    --final-temperature 1e-8 \
    --cooldown-steps 250
"""
GENERATE = r"""
python generate_dsp.py \
    data-bin \
    -s de -t en \
    --path $SAVE_DIR/checkpoint_best.pt \
    --quiet \
    --batch-size 32 --beam 5 --remove-bpe
"""
GENERATE_LAST = GENERATE.replace("checkpoint_best", "checkpoint_last")
GENERATE_VOITA = GENERATE_LAST.replace("generate_dsp", "generate_voita")

TINY = [*DIMENSIONS, *MACHINE, *shlex.split("--max-tokens 120 --max-epoch 2 --warmup-updates 4 --lr 0.01")]
SHORT = shlex.split("--cpu --num-workers 0 --max-len-a 1.2 --max-len-b 5 --required-batch-size-multiple 1")


def arguments(command: str, save_dir: str) -> list[str]:
    """The manual's command for fairseq's own, without the program's name."""
    words = shlex.split(command.replace("\\\n", " ").replace("$SAVE_DIR", save_dir))
    if words[0] == "fairseq-train":
        return words[1:]
    plugin = ["--user-dir", PLUGIN]
    if words[1].startswith("run_"):
        plugin += ["--task", "translation_head_pruning"]
    return [*plugin, *words[2:]]


@pytest.fixture(scope="module")
def manual(data, tmp_path_factory) -> Runner:
    """A work folder with ``data-bin`` and, in ``checkpoints/``, the dense model."""
    folder = tmp_path_factory.mktemp("manual")
    (folder / "data-bin").symlink_to(data)
    runner = Runner(folder)
    runner.run("train", [*arguments(DENSE, ""), *TINY])
    return runner


def check_pruned(manual: Runner, save_dir: str, checkpoint: str, generate: str) -> None:
    """The manual's generate command prints BLEU, and what it decodes with is the model without the removed heads."""
    assert re.search(
        r"^Generate test with beam=5: BLEU4? = [\d.]+",
        manual.run("generate", [*arguments(generate, save_dir), *SHORT]).out,
        re.MULTILINE,
    )
    path = manual.folder / save_dir / checkpoint
    mask = mask_in(path)
    loud = [word for word in arguments(generate, save_dir) if word != "--quiet"]
    place = loud.index("--path") + 1
    outputs = {}
    for name, wanted in (("pruned", mask), ("dense", None)):
        loud[place] = str(zeroed_by_hand(path, manual.folder / save_dir / f"{name}.pt", wanted))
        outputs[name] = decoded(manual.run("generate", [*loud, *SHORT]).out)
    loud[place] = str(path)
    ours = decoded(manual.run("generate", [*loud, *SHORT]).out)
    assert len(ours) == 10
    same_decoding(ours, outputs["pruned"])
    assert ours != outputs["dense"]


def initial_logits(mask) -> np.ndarray:
    """What a run with seed 1 starts from."""
    pruner = DSPPruner(DSPConfig(num_of_heads=4))
    pruner.unit_map = mask.unit_map
    return pruner.initial_logits(np.random.default_rng([1, 0]))


def test_preprocessing(data, tmp_path):
    text = data.parent
    command = """fairseq-preprocess --source-lang de --target-lang en \
        --trainpref $TEXT/train --validpref $TEXT/valid --testpref $TEXT/test \
        --destdir data-bin/\
        --workers 20
    """
    words = shlex.split(command.replace("\\\n", " ").replace("$TEXT", str(text)))
    Runner(tmp_path).run("preprocess", [*words[1:], "--workers", "1"])
    assert (tmp_path / "data-bin" / "train.de-en.de.bin").read_bytes() == (data / "train.de-en.de.bin").read_bytes()


@pytest.mark.parametrize(
    "command, options, save_dir",
    [
        (JOINT_DSP, "--cooldown-steps 15", "dsp_checkpoints"),
        pytest.param(STE, "", "ste_checkpoints", marks=pytest.mark.slow),
    ],
)
def test_joint(manual, command, options, save_dir):
    done = manual.run("train", [*arguments(command, save_dir), *TINY, *shlex.split(options)])
    checkpoint = manual.folder / save_dir / "checkpoint_best.pt"
    assert mask_in(checkpoint).kept == 4
    mask = mask_beside(checkpoint)
    assert mask.kept == 4 and mask.keep.size == HEADS
    start = initial_logits(mask)
    logits = logits_of(manual.folder / save_dir / "checkpoint_last.pt")
    assert np.abs(logits - start).max() > 0.2
    assert set(np.argsort(-logits)[:4]) == set(np.flatnonzero(mask.keep))
    assert set(np.argsort(-logits)[:4]) != set(np.argsort(-start)[:4])
    assert logged(done.out, "valid_bleu")
    check_pruned(manual, save_dir, "checkpoint_best.pt", GENERATE)


@pytest.mark.slow
def test_voita(manual):
    # The manual's penalty of 200 closes all heads of a model this small, and a checkpoint without any is refused.
    done = manual.run("train", [*arguments(VOITA, "voita_checkpoints"), *TINY, "--l0-penalty", "5"])
    kept = logged(done.out, "heads_kept")
    checkpoint = manual.folder / "voita_checkpoints" / "checkpoint_last.pt"
    mask = mask_beside(checkpoint)
    assert kept[0] > kept[-1] == mask.kept  # still a large penalty
    assert len(list(checkpoint.parent.glob("checkpoint.best_loss_*.pt"))) == 1
    check_pruned(manual, "voita_checkpoints", "checkpoint_last.pt", GENERATE_VOITA)


@pytest.mark.slow
def test_pipelined(manual):
    save_dir = "dropout_checkpoints/pipelined"
    # The dense model has two epochs, so this is one: half of it, although fairseq goes on counting epochs.
    options = "--cooldown-steps 0.5 --max-epoch 3"
    done = manual.run("train", [*arguments(PIPELINED_DSP, save_dir), *TINY, *shlex.split(options)])
    checkpoint = manual.folder / save_dir / "checkpoint_last.pt"
    mask = mask_beside(checkpoint)
    assert mask.kept == 4
    temperature = logged(done.out, "temperature")
    assert temperature[(len(temperature) - 1) // 2 - 1] > 1e-8 == temperature[len(temperature) // 2 + 1]
    assert "kept heads by site" in done.out
    assert np.abs(logits_of(checkpoint) - initial_logits(mask)).max() > 0.2
    dense = weights_of(manual.folder / "checkpoints" / "checkpoint_last.pt")
    pruned = weights_of(checkpoint)
    assert dense.keys() == pruned.keys() and all((dense[name] == pruned[name]).all() for name in dense)
    check_pruned(manual, save_dir, "checkpoint_last.pt", GENERATE_LAST)
