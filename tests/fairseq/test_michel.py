"""Michel pruning from the command line of the manual, resumed, and against a direct computation."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from head_pruning import HeadMask
from tests.fairseq.command_lines import HEADS
from tests.fairseq.runner import ROOT

# The manual's line; what follows it is appended.
MANUAL = """-s de -t en -a transformer_iwslt_de_en --restore-file {checkpoint}
    --optimizer adam --adam-betas '(0.9,0.98)'
    --reset-optimizer --batch-size 32 --beam 5 --remove-bpe --num-of-heads 4 --exact-pruning"""


@pytest.fixture(scope="module")
def dense(translation, tmp_path_factory):
    """A dense checkpoint trained by plain ``translation``."""
    from tests.fairseq.runner import Runner

    folder = tmp_path_factory.mktemp("dense")
    Runner(folder).run("train", translation.train(folder / "out", task="translation", updates=30))
    return folder / "out" / "checkpoint_last.pt"


def _command(data, dense, save_dir, *more):
    line = [str(data), *shlex.split(MANUAL.format(checkpoint=dense))]
    return [sys.executable, "-m", "fairseq_plugin.run_michel", *line, "--save-dir", str(save_dir), "--cpu", *more]


def _run(command):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def _rounds(folder):
    return json.loads((folder / "michel_rounds.json").read_text(encoding="utf-8"))["rounds"]


def test_the_manuals_command_prunes_round_by_round(data, dense, tmp_path):
    done = _run(_command(data, dense, tmp_path, "--max-len-b", "10"))
    assert done.returncode == 0, done.stderr
    rounds = _rounds(tmp_path)
    assert [r["heads"] for r in rounds] == list(range(HEADS, -1, -4))
    assert "heads kept  removed %  BLEU" in done.stdout
    for r in rounds[:-1]:
        mask = HeadMask.load(tmp_path / "michel_masks" / f"heads{r['heads']}.safetensors")
        assert mask.kept == r["heads"] and mask.kept_heads() == r["kept_heads_by_site"]
    # Exact pruning measures anew: the ranking is not that of the first round throughout.
    assert rounds[1]["importance"] != rounds[2]["importance"]


def test_a_killed_run_goes_on_to_the_same_rounds(data, dense, tmp_path):
    options = ("--max-len-b", "5", "--beam", "1")
    assert _run(_command(data, dense, tmp_path / "whole", *options)).returncode == 0
    process = subprocess.Popen(
        _command(data, dense, tmp_path / "killed", *options),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    report = tmp_path / "killed" / "michel_rounds.json"
    deadline = time.monotonic() + 120
    while not (report.exists() and len(_rounds(tmp_path / "killed")) >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = len(_rounds(tmp_path / "killed"))
    assert before < len(_rounds(tmp_path / "whole"))
    assert _run(_command(data, dense, tmp_path / "killed", *options)).returncode == 0
    assert _rounds(tmp_path / "killed") == _rounds(tmp_path / "whole")


def test_importance_is_the_sum_of_absolute_derivatives(data, dense, tmp_path):
    from fairseq import checkpoint_utils

    import fairseq_plugin  # noqa: F401  (reads checkpoints)
    from fairseq_plugin.unit_map import unit_map

    for flag in ((), ("--signed-importance",)):
        folder = tmp_path / f"signed{len(flag)}"
        done = _run(
            _command(data, dense, folder, "--beam", "1", "--score-sentences", "2", "--num-of-heads", "23", *flag)
        )
        assert done.returncode == 0, done.stderr
    models, saved, task = checkpoint_utils.load_model_ensemble_and_task(
        [str(dense)], arg_overrides={"data": str(data)}
    )
    model, criterion = models[0].eval(), task.build_criterion(saved.criterion)
    here = unit_map(model)
    modules = dict(model.named_modules())
    task.load_dataset("train")
    batches = task.get_batch_iterator(task.dataset("train"), max_sentences=32, max_positions=(1024, 1024))
    signed, absolute = np.zeros(here.num_heads), np.zeros(here.num_heads)
    for sample in batches.next_epoch_itr(shuffle=False):
        derivatives = []
        for site, _ in here.slices():
            # Derivative at 1 of scaling one head = the inner product of its output columns with their gradient.
            modules[site.out_proj].weight.grad = None
            modules[f"{site.name}"]._set_skip_embed_dim_check()
        criterion(model, sample)[0].backward()
        for site, _ in here.slices():
            weight = modules[site.out_proj].weight
            derivatives.append((weight.grad * weight).view(weight.shape[0], site.heads, -1).sum((0, 2)).detach())
        values = torch.cat(derivatives).double().numpy()
        signed += values
        absolute += abs(values)
    for expected, folder in ((absolute, tmp_path / "signed0"), (signed, tmp_path / "signed1")):
        got = np.array(_rounds(folder)[1]["importance"])
        rows = expected.reshape(-1, 4)
        rows = rows / np.sqrt((rows**2).sum(1, keepdims=True))
        rows = (rows - rows.min()) / (rows.max() - rows.min())
        np.testing.assert_allclose(got, rows.reshape(-1), atol=2e-4)


def test_rounds_of_other_settings_are_neither_taken_nor_replaced(data, dense, tmp_path):
    copy = tmp_path / "checkpoint_last.pt"
    options = ("--max-len-b", "5", "--beam", "1", "--num-of-heads", "23", "--score-sentences", "2")
    copy.write_bytes(dense.read_bytes())
    assert _run(_command(data, copy, tmp_path / "out", *options)).returncode == 0
    first = (tmp_path / "out" / "michel_rounds.json").read_bytes()
    # The same name, but not the same checkpoint.
    state = torch.load(dense, weights_only=False)
    state["model"]["decoder.layers.0.fc1.weight"] *= -1
    torch.save(state, copy)
    refused = _run(_command(data, copy, tmp_path / "out", *options, "--num-of-heads", "22"))
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    sentence = refused.stderr.splitlines()[-1]
    assert "(another --restore-file, --num-of-heads was 23 and is now 22); choose another --save-dir" in sentence
    assert (tmp_path / "out" / "michel_rounds.json").read_bytes() == first


@pytest.mark.parametrize(
    "change, words",
    [
        (("--num-of-heads", "99"), "from 1 to 24"),
        (("--num-of-heads", "0"), "from 1 to 24"),
        (("--score-at", "four"), "--score-at is four"),
        (("--restore-file", "nothing.pt"), "There is no checkpoint nothing.pt"),
    ],
)
def test_bad_input_ends_with_one_sentence(data, dense, tmp_path, change, words):
    done = _run(_command(data, dense, tmp_path / "out", *change))
    assert done.returncode == 1
    assert words in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not Path(tmp_path / "out" / "michel_rounds.json").exists()
