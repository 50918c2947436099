"""bf16 through hydra, and fairseq's moving average of weights."""

import numpy as np
import pytest
import torch

from tests.fairseq.command_lines import DSP, SENSITIVITY, SUBSET, decoded, same_decoding
from tests.fairseq.files import (
    logits_of,
    mask_beside,
    read,
    same,
    same_training_state,
    session_of,
    weights_of,
    zeroed_by_hand,
)
from tests.fairseq.runner import PLUGIN

YAML = """
# @package _group_
common: {{user_dir: {plugin}, log_format: json, log_interval: 1, cpu: true}}
task:
  _name: translation_head_pruning
  data: {data}
  num_of_heads: 4
  joint_pruning: true
{method}
model:
  _name: transformer
  share_decoder_input_output_embed: true
  encoder: {{embed_dim: 16, ffn_embed_dim: 24, layers: 2, attention_heads: 4}}
  decoder: {{embed_dim: 16, ffn_embed_dim: 24, layers: 2, attention_heads: 4}}
criterion: {{_name: label_smoothed_cross_entropy, label_smoothing: 0.1}}
dataset: {{max_tokens: 90, num_workers: 0, disable_validation: true}}
optimization: {{max_update: 8, lr: [0.01], clip_norm: 0.0}}
optimizer: {{_name: adam, adam_betas: "(0.9, 0.98)"}}
lr_scheduler: {{_name: inverse_sqrt, warmup_updates: 4}}
checkpoint: {{save_dir: {save_dir}, no_epoch_checkpoints: true}}
"""


METHODS = {
    "dsp": {"pruning_lr": 0.2, "annealing": "true", "initial_temperature": 0.1, "cooldown_steps": 6},
    "subset": {"pruner": "subset", "pruning_lr": 0.2, "count_schedule": '"0:6"'},
    "head_sensitivity": {"pruner": "head_sensitivity", "count_schedule": '"0:6"'},
}


def write_config(folder, method, **places) -> None:
    """A method's configuration as ``prune.yaml`` in a new folder."""
    folder.mkdir()
    options = "\n".join(f"  {name}: {value}" for name, value in METHODS[method].items())
    text = YAML.format(plugin=PLUGIN, method=options, **places)
    (folder / "prune.yaml").write_text(text.lstrip(), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    "precision, method",
    [
        ("common.bf16=true", "dsp"),
        ("common.bf16=false", "dsp"),
        ("common.bf16=true", "subset"),
        ("common.bf16=true", "head_sensitivity"),
    ],
)
def test_hydra(runner, translation, tmp_path, precision, method):
    write_config(tmp_path / "config", method, data=translation.data, save_dir=tmp_path / "run")
    place = ["--config-dir", tmp_path / "config", "--config-name", "prune", f"hydra.run.dir={tmp_path / 'hydra'}"]
    runner.run("hydra-train", [*place, precision])
    checkpoint = tmp_path / "run" / "checkpoint_last.pt"
    state = session_of(checkpoint)
    assert np.isfinite(logits_of(checkpoint)).all() and logits_of(checkpoint).any()
    if method != "head_sensitivity":
        assert state[f"{method}.adam.steps"] == 6 and state[f"{method}.adam.first"].any()
    assert mask_beside(checkpoint).kept == 4
    weight = weights_of(checkpoint)["encoder.layers.0.fc1.weight"]  # fairseq stores bf16 numbers as float32
    assert torch.equal(weight, weight.bfloat16().float()) == precision.endswith("true")
    ours = decoded(runner.run("generate", translation.generate(checkpoint)).out)
    hand = zeroed_by_hand(checkpoint, tmp_path / "hand.pt", mask_beside(checkpoint))
    same_decoding(ours, decoded(runner.run("generate", translation.generate(hand)).out))


@pytest.mark.slow
def test_multirun(runner, translation, tmp_path):
    """Hydra's basic launcher: jobs one after another in one process, each as if it were alone."""
    write_config(tmp_path / "config", "dsp", data=translation.data, save_dir="run")  # in the folder of the job
    place = ["--config-dir", tmp_path / "config", "--config-name", "prune"]
    runner.run("hydra-train", ["-m", *place, "task.num_of_heads=4,6", f"hydra.sweep.dir={tmp_path / 'jobs'}"])
    runner.run("hydra-train", [*place, "task.num_of_heads=6", f"hydra.run.dir={tmp_path / 'alone'}"])
    jobs = [tmp_path / "jobs" / number / "run" / "checkpoint_last.pt" for number in ("0", "1")]
    assert [mask_beside(job).kept for job in jobs] == [4, 6]
    same_training_state(jobs[1], tmp_path / "alone" / "run" / "checkpoint_last.pt")


def test_each_job_of_a_multirun_has_a_best_of_its_own(runner, translation, tmp_path):
    """The first of them learns, the second hardly does and stops by its own patience."""
    write_config(tmp_path / "config", "head_sensitivity", data=translation.data, save_dir="run")
    every = "dataset.disable_validation=false dataset.validate_interval_updates=2 checkpoint.patience=3"
    rates = ["optimization.lr=[0.01],[0.00001]", "optimization.max_update=12", f"hydra.sweep.dir={tmp_path / 'jobs'}"]
    place = ["--config-dir", tmp_path / "config", "--config-name", "prune"]
    runner.run("hydra-train", ["-m", *place, *every.split(), *rates])
    scores = []
    for number in ("0", "1"):
        saved = read(tmp_path / "jobs" / number / "run" / "checkpoint_best.pt")["extra_state"]
        scores.append(saved["best"])
        assert saved["best"] == saved["val_loss"]
    assert scores[0] < scores[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, options",
    [
        pytest.param(DSP, "", id="dsp"),
        pytest.param(DSP, "--ema-fp32", id="dsp-fp32"),
        pytest.param(f"{SUBSET} --count-schedule 0:3", "", id="subset"),
        pytest.param(f"{SENSITIVITY} --count-schedule 0:3", "", id="head_sensitivity"),
    ],
)
def test_moving_average(runner, translation, tmp_path, method, options):
    ema = f"--store-ema --ema-decay 0.5 {options}"
    runner.run("train", translation.train(tmp_path / "plain", method))
    runner.run("train", translation.train(tmp_path / "whole", method, ema))
    whole = tmp_path / "whole" / "checkpoint_last.pt"
    same_training_state(tmp_path / "plain" / "checkpoint_last.pt", whole)  # the average disturbs nothing

    runner.run("train", translation.train(tmp_path / "parts", method, ema, updates=3))
    runner.run("train", translation.train(tmp_path / "parts", method, ema))
    parts = tmp_path / "parts" / "checkpoint_last.pt"
    same_training_state(whole, parts)
    average = read(whole)["extra_state"]["ema"]
    own = {key: value for key, value in average.items() if not key.startswith("head_pruning.")}
    again = read(parts)["extra_state"]["ema"]
    same(own, {key: again[key] for key in own}, "ema")
    weights, name = weights_of(whole), "encoder.layers.0.fc1.weight"
    assert own.keys() == weights.keys() and not torch.equal(own[name], weights[name])

    # The averaged model is decoded with the heads of the run.
    state = read(whole)
    state["model"] = average
    torch.save(state, tmp_path / "whole" / "average.pt")
    hand = zeroed_by_hand(tmp_path / "whole" / "average.pt", tmp_path / "hand.pt", mask_beside(whole))
    outputs = [
        decoded(runner.run("generate", translation.generate(path)).out)
        for path in (tmp_path / "whole" / "average.pt", hand, whole)
    ]
    same_decoding(*outputs[:2])
    assert outputs[0] != outputs[2]


@pytest.mark.slow
def test_moving_average_of_a_plain_run_from_a_pruned_checkpoint(runner, translation, tmp_path):
    runner.run("train", translation.train(tmp_path / "first", DSP, "--store-ema --ema-decay 0.5"))
    first = tmp_path / "first" / "checkpoint_last.pt"
    line = translation.train(
        tmp_path / "second", f"--store-ema --ema-decay 0.5 --restore-file {first}", task="translation", updates=12
    )
    runner.run("train", line)
    second = tmp_path / "second" / "checkpoint_last.pt"
    assert np.array_equal(logits_of(first), logits_of(second))
    names = [name for name in read(first)["model"] if name.startswith("head_pruning.")]
    for part in (read(second)["model"], read(second)["extra_state"]["ema"]):
        same({name: part[name] for name in names}, {name: read(first)["model"][name] for name in names})
